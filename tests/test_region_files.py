"""Regions from files: the layouts of the field, how entries meet samples, and what is wrong with them."""

import base64
import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.regions.ids import Entries, collapsed, compile_id, ids_of_sample, match
from data_tools.regions.store import RegionError, RegionStore
from data_tools.shards import ShardIndex, ShardWriter
from stages.base import Report, StageError
from stages.regions import Config, run
from tests.training_case import make_job, picture

R, V = 3, 8
SIZE = (48, 40)  # of the pictures of the corpus
NUMBERS = (391895, 60623, 483108, 15)


def write_corpus(directory: Path) -> Path:
    """Four pictures named as COCO's are."""
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, shard_bytes=20_000, splits=["train", "test"], labels=[])
    for place, number in enumerate(NUMBERS):
        image = picture(place)
        record = {
            "key": f"k{place}",
            "url": f"http://images.example/val2014/COCO_val2014_{number:012d}.jpg?size=1",
            "title": "t",
            "content": "",
            "queries": [],
            "captions": [],
            "sha256": hashlib.sha256(image).hexdigest(),
            "width": SIZE[0],
            "height": SIZE[1],
            "labels": {},
            "licence": "MIT",
            "split": "train" if place < 3 else "test",
        }
        writer.write(image, "png", record)
    writer.close()
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("shard") / "out")


def features(number: int, regions: int = R) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((regions, V)).astype(np.float32)


def boxes(number: int, regions: int = R) -> np.ndarray:
    """x1, y1, x2, y2 in pixels of a picture of SIZE."""
    corners = np.random.default_rng(number + 1).uniform(0, 1, (regions, 2, 2)) * SIZE
    corners.sort(axis=1)
    return corners.reshape(regions, 4).astype(np.float32)


def write_npy(
    directory: Path, numbers: Any = NUMBERS, name: str = "all", **arrays: np.ndarray
) -> dict[str, str]:
    """The files of a part; `arrays` in place of, or beside, the plain ones."""
    made = {
        "features": np.stack([features(n) for n in numbers]),
        "boxes": np.stack([boxes(n) for n in numbers]),
    } | arrays
    part = {}
    for kind, array in made.items():
        np.save(directory / f"{name}_{kind}.npy", array)
        part[kind] = f"{name}_{kind}.npy"
    (directory / f"{name}_ids.txt").write_text("".join(f"{number}\n" for number in numbers))
    return part | {"ids": f"{name}_ids.txt"}


def tsv_line(number: int, regions: int = R, scores: bool = False, shown_in: tuple[int, int] = SIZE) -> str:
    def coded(array: np.ndarray) -> str:
        return base64.b64encode(array.tobytes()).decode()

    scale = np.array([*shown_in, *shown_in], np.float32) / np.array([*SIZE, *SIZE], np.float32)
    cells = [str(number), *map(str, shown_in)]
    if scores:
        conf = np.linspace(0.1, 0.9, regions, dtype=np.float32)
        cells += [coded(np.arange(regions, dtype=np.int64)), coded(conf)]
    return "\t".join(
        [*cells, str(regions), coded(boxes(number, regions) * scale), coded(features(number, regions))]
    )


def made(directory: Path, corpus: Path, layout: str, *parts: dict[str, str], **changed: Any) -> Report:
    config = {"from": "files", "layout": layout, "parts": list(parts), "regions": R} | changed
    stage = {name: config.pop(name) for name in ("max_missing_share", "dtype") if name in config}
    job = make_job(directory / "stage", corpus)
    shutil.rmtree(job.directory, ignore_errors=True)  # another source has another directory
    job.recipe_directory = directory
    job.directory.mkdir(exist_ok=True)
    return run(Config(**{"source": config, "dtype": "float32"} | stage), job)


def stored(directory: Path) -> dict[str, Any]:
    """By key, None where there are none."""
    store = RegionStore.open(directory / "stage" / "out")
    table = pq.read_table(directory / "stage" / "out" / "keys.parquet")
    keys = table["key"].to_pylist()
    rows = store.rows_of(keys, table["picture"].to_pylist()).tolist()
    return {key: None if row < 0 else store.row(row) for key, row in zip(keys, rows, strict=True)}


def assert_those_of(found: Any, number: int, classes: Any = -1) -> None:
    assert np.array_equal(found.features, features(number))
    corners = boxes(number) / np.array([*SIZE, *SIZE])
    np.testing.assert_allclose(found.positions[:, :4], corners, atol=1e-6)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    np.testing.assert_allclose(found.positions[:, 4], area, atol=1e-6)
    assert np.array_equal(found.classes, np.broadcast_to(classes, R))


def test_npy_files_of_two_parts_in_another_order(corpus: Path, tmp_path: Path) -> None:
    classes = np.arange(2 * R).reshape(2, R)
    one = write_npy(tmp_path, (NUMBERS[3], NUMBERS[1]), "dev", classes=classes)
    two = write_npy(tmp_path, (999, NUMBERS[0], NUMBERS[2]), "train")  # 999 is no picture of the corpus
    (tmp_path / "names.txt").write_text("".join(f"class {n}\n" for n in range(6)))
    report = made(tmp_path, corpus, "npy", one, two, class_names="names.txt")
    assert report.counts["with_regions"] == 4
    found = stored(tmp_path)
    for place, number in enumerate(NUMBERS):
        own = {1: classes[1], 3: classes[0]}.get(place, -1)
        assert_those_of(found[f"k{place}"], number, own)
    assert RegionStore.open(tmp_path / "stage" / "out").class_names == [f"class {n}" for n in range(6)]


@pytest.mark.parametrize("rows", ["once", "each"])
def test_five_lines_a_picture_as_where_captions_were_counted(corpus: Path, tmp_path: Path, rows: str) -> None:
    part = write_npy(tmp_path)
    (tmp_path / part["ids"]).write_text("".join(f"{n}\n" * 5 for n in NUMBERS))
    if rows == "each":
        for name in ("features", "boxes"):
            np.save(tmp_path / part[name], np.load(tmp_path / part[name]).repeat(5, axis=0))
    made(tmp_path, corpus, "npy", part, repeats=5)
    for place, number in enumerate(NUMBERS):
        assert_those_of(stored(tmp_path)[f"k{place}"], number)


def test_boxes_of_another_size_as_fractions_or_none(corpus: Path, tmp_path: Path) -> None:
    shown = np.array([[600, 800]] * 4)
    scaled = np.stack([boxes(n) / np.array([*SIZE, *SIZE]) * np.array([600, 800, 600, 800]) for n in NUMBERS])
    part = write_npy(tmp_path, boxes=scaled)
    with pytest.raises(StageError, match=r"in a picture of 48 × 40: not x1, y1, x2, y2 in it; set box_units"):
        made(tmp_path, corpus, "npy", part)
    made(tmp_path, corpus, "npy", write_npy(tmp_path, boxes=scaled, sizes=shown))
    assert_those_of(stored(tmp_path)["k1"], NUMBERS[1])
    fractions = write_npy(tmp_path, boxes=scaled / np.array([600, 800, 600, 800]))
    made(tmp_path, corpus, "npy", fractions, box_units="fractions")
    assert_those_of(stored(tmp_path)["k1"], NUMBERS[1])
    bare = {name: path for name, path in part.items() if name != "boxes"}
    made(tmp_path, corpus, "npy", bare, positions="none")
    assert stored(tmp_path)["k1"].positions.tolist() == [[0, 0, 1, 1, 1]] * R


def test_tsv_lines_of_bottom_up_attention(corpus: Path, tmp_path: Path) -> None:
    lines = [tsv_line(number, shown_in=(96, 80)) for number in NUMBERS]  # as the detector saw them
    (tmp_path / "a.tsv").write_text("\n".join(lines[2:]) + "\n")
    (tmp_path / "b.tsv").write_text("\n".join(lines[:2]))  # no line feed at the end
    made(tmp_path, corpus, "tsv", {"features": "a.tsv"}, {"features": "b.tsv"})
    for place, number in enumerate(NUMBERS):
        assert_those_of(stored(tmp_path)[f"k{place}"], number)


def test_another_number_of_regions_is_cut_by_score_or_counts_as_missing(corpus: Path, tmp_path: Path) -> None:
    columns = ["img_id", "img_w", "img_h", "objects_id", "objects_conf", "num_boxes", "boxes", "features"]
    lines = [tsv_line(n, regions, scores=True) for n, regions in zip(NUMBERS, (3, 5, 2, 3), strict=True)]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    with pytest.raises(StageError, match=r"1 of 4 samples .*k2 \(2 regions of 3\); .*missing\.parquet lists"):
        made(tmp_path, corpus, "tsv", {"features": "a.tsv"}, columns=columns)
    report = made(tmp_path, corpus, "tsv", {"features": "a.tsv"}, columns=columns, max_missing_share=0.25)
    assert report.counts["missing_few_regions"] == 1
    found = stored(tmp_path)
    assert found["k2"] is None
    assert_those_of(found["k0"], NUMBERS[0], np.arange(R))
    assert np.array_equal(found["k1"].features, features(NUMBERS[1], 5)[2:])  # the scores rise
    assert found["k1"].classes.tolist() == [2, 3, 4]
    plain = [tsv_line(n, 5 if n == NUMBERS[1] else R) for n in NUMBERS]
    (tmp_path / "a.tsv").write_text("\n".join(plain))
    with pytest.raises(StageError, match="5 regions, more than 3, and no scores to choose by"):
        made(tmp_path, corpus, "tsv", {"features": "a.tsv"})


@pytest.mark.skipif(find_spec("h5py") is None, reason="h5py, of the extra `regions`, is not installed")
@pytest.mark.parametrize("named", ["features", "image_features"])
def test_hdf5_files(corpus: Path, tmp_path: Path, named: str) -> None:
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[named] = np.stack([features(n) for n in NUMBERS])
        file["boxes" if named == "features" else "image_bb"] = np.stack([boxes(n) for n in NUMBERS])
        file["objects_id"] = np.arange(4 * R).reshape(4, R)
        file["image_w"], file["image_h"] = np.full(4, SIZE[0]), np.full(4, SIZE[1])
        if named == "features":
            file["image_ids"] = [f"COCO_val2014_{n:012d}.jpg" for n in NUMBERS]
    part = {"features": "a.h5"}
    if named == "image_features":
        with pytest.raises(StageError, match=r"a\.h5: no dataset image_ids or .*; give `ids`"):
            made(tmp_path, corpus, "hdf5", part)
        (tmp_path / "ids.json").write_text(json.dumps(list(NUMBERS)))
        part["ids"] = "ids.json"
    made(tmp_path, corpus, "hdf5", part)
    for place, number in enumerate(NUMBERS):
        assert_those_of(stored(tmp_path)[f"k{place}"], number, np.arange(4 * R).reshape(4, R)[place])
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:300])
    with pytest.raises(StageError, match=r"a\.h5: cannot be read as HDF5"):
        made(tmp_path, corpus, "hdf5", part)


@pytest.mark.skipif(find_spec("h5py") is not None, reason="h5py is installed")
def test_hdf5_without_its_library_names_the_remedy(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"needs h5py.*pip install 'tandem\[regions\]'"):
        made(tmp_path, corpus, "hdf5", {"features": "a.h5"})


def test_what_is_wrong_with_npy_files_is_named(corpus: Path, tmp_path: Path) -> None:
    def refused(says: str, part: dict[str, str], *more: dict[str, str], **changed: Any) -> None:
        with pytest.raises(StageError, match=says):
            made(tmp_path, corpus, "npy", part, *more, **changed)

    whole = np.stack([features(n) for n in NUMBERS])
    part = write_npy(tmp_path)
    path = tmp_path / part["features"]
    path.write_bytes(path.read_bytes()[:-10])
    refused(r"all_features\.npy: cannot be read as a \.npy array \(mmap length", part)
    refused(
        r"an array of the shape \(4, 24\); it must have 3 dim",
        write_npy(tmp_path, features=whole.reshape(4, -1)),
    )
    refused(r"all_boxes\.npy: the shape \(4, 3, 5\)", write_npy(tmp_path, boxes=np.zeros((4, 3, 5))))
    refused(
        r"all_features\.npy: 3 rows, but .*all_ids\.txt has 4 ids", write_npy(tmp_path, features=whole[:3])
    )
    nan = whole.copy()
    nan[2, 1, 0] = np.nan
    refused(
        r"sample k2: .*all_features\.npy: entry 2: features that are no finite",
        write_npy(tmp_path, features=nan),
    )
    narrow = write_npy(tmp_path, (1, 2), "narrow", features=whole[:2, :, :4])
    refused("features of 4 numbers, but .*all_features.npy has 8", write_npy(tmp_path), narrow)
    (tmp_path / "n.txt").write_text("a\n" * 7)
    many = write_npy(tmp_path, classes=np.full((4, R), 7))
    refused("classes from 7 to 7; allowed: -1 … 6", many, class_names="n.txt")
    refused("the id '15' stands a second time", write_npy(tmp_path), write_npy(tmp_path, (15,), "again"))
    refused("ids 0 … 1 are not the same .*set repeats", write_npy(tmp_path), repeats=2)
    few = write_npy(tmp_path, NUMBERS[:2])
    refused(r"2 of 4 samples have no regions, .* allows 0: k3 \(the files have no entry of its id\)", few)
    assert not (tmp_path / "stage" / "out" / "manifest.json").exists()


def test_what_is_wrong_with_tsv_files_is_named(corpus: Path, tmp_path: Path) -> None:
    def refused(says: str, text: str) -> None:
        (tmp_path / "a.tsv").write_text(text)
        with pytest.raises(StageError, match=says):
            made(tmp_path, corpus, "tsv", {"features": "a.tsv"})

    lines = [tsv_line(number) for number in NUMBERS]
    refused(r"a\.tsv: is empty", "")
    refused(
        r"a\.tsv: line 4: 5 columns, not 6; the file is cut short",
        "\n".join([*lines[:3], lines[3].rpartition("\t")[0]]),
    )
    refused(r"a\.tsv: line 4: features .*", "\n".join(lines)[:-9])
    refused(r"line 2: features is no base64", "\n".join([lines[0], lines[1][:-8] + "!" * 8, *lines[2:]]))
    refused(
        r"line 1: is no line of image_id", "\n".join([lines[0].replace(f"\t{R}\t", "\tthree\t"), *lines[1:]])
    )
    refused(r"the id '15' stands a second time", "\n".join([*lines, lines[3]]))


@pytest.mark.parametrize(
    ("url", "pattern", "ids"),
    [
        (
            "http://a.example/val2014/COCO_val2014_000000391895.jpg",
            None,
            ["COCO_val2014_000000391895", "391895"],
        ),
        ("1000092795.jpg", None, ["1000092795"]),
        ("http://a.example/7.png?x=8", None, ["7"]),
        ("http://a.example/album/12/show", r"album/(?P<id>\d+)", ["12"]),
        ("http://a.example/show", r"album/(?P<id>\d+)", []),
        ("http://a.example/cat.webp", None, ["cat"]),
    ],
)
def test_the_ids_of_a_url(url: str, pattern: str | None, ids: list[str]) -> None:
    assert list(ids_of_sample({"key": "k", "url": url}, compile_id(pattern))) == ids


def test_ids_meet_by_name_before_number_and_by_one_sample_alone() -> None:
    entries = Entries()
    entries.add(0, ["/data/train2014/COCO_train2014_000000000007.jpg", "000000000009"], "a")
    records = [
        {"key": key, "url": f"http://x.example/{key}.jpg"}
        for key in ("COCO_train2014_000000000007", "b_9", "c")
    ]
    assert match(entries, records, None) == [(0, 0), (0, 1), None]
    with pytest.raises(RegionError, match="samples b_9 and c_9 both go by the same id; give an expression"):
        match(entries, [{"key": "b_9"}, {"key": "c_9"}], None)
    with pytest.raises(RegionError, match="5 ids are no multiple of repeats: 2"):
        collapsed(list("aabbc"), 2, "x")
    with pytest.raises(RegionError, match="the id of entry 1 is empty"):
        Entries().add(0, ["a", " "], "x")


def test_a_store_of_another_corpus_has_no_rows_of_this_one(corpus: Path, tmp_path: Path) -> None:
    made(tmp_path, corpus, "npy", write_npy(tmp_path))
    store, index = RegionStore.open(tmp_path / "stage" / "out"), ShardIndex.open(corpus, "test")
    assert np.array_equal(store.row(int(store.rows_of(index.keys, index.pictures)[0])).features, features(15))
    with pytest.raises(RegionError, match="sample k3: the regions are of another picture"):
        store.rows_of(index.keys, ["0" * 64])
