"""Checking shards: each kind of damage is found and named, in corpora and in any webdataset's tars."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.shards import check as shard_check
from data_tools.shards.check import CheckReport, as_json, check, find_shards
from data_tools.shards.files import CorpusError
from data_tools.shards.findings import safe_name, split_name
from tests.shard_case import change, image, pair, record, rows, tar_of, write_corpus


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "out")


@pytest.fixture
def corpus(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "corpus"))


def report(*places: Path, decode: bool = False, processes: int = 1) -> CheckReport:
    return check(find_shards(list(places), decode), processes)


def told(*places: Path, decode: bool = False) -> list[tuple[str, str]]:
    return [(finding.kind, finding.key) for finding in report(*places, decode=decode).findings]


def bare(corpus: Path) -> Path:
    """The same tars, without manifest and index."""
    (corpus / "manifest.json").unlink()
    (corpus / "index.parquet").unlink()
    return corpus


def reseal(corpus: Path) -> None:
    """Let the manifest tell of the index and the shards as they are now."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    index = (corpus / "index.parquet").read_bytes()
    manifest["index"] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    for shard in manifest["shards"]:
        data = (corpus / shard["path"]).read_bytes()
        shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (corpus / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_corpus(corpus: Path) -> None:
    found = report(corpus, decode=True)
    assert (found.findings, found.kinds.total()) == ([], 0)
    assert (found.samples, found.sound) == (12, 12)
    assert found.shards == len(list(corpus.rglob("*.tar"))) > 2
    assert found.manifest
    found = report(bare(corpus), decode=True)
    assert (found.findings, found.sound, found.manifest) == ([], 12, False)


@pytest.mark.slow
def test_processes_do_not_matter(corpus: Path) -> None:
    place = rows(corpus)["0004"]
    change(corpus / place["shard"], place["image_offset"] + 3, b"??")
    assert as_json(report(corpus, processes=3)) == as_json(report(corpus))


def flip(corpus: Path, key: str, part: str, by: int) -> tuple[str, int]:
    """Change a byte at `by` from where a sample's part begins; its shard, and the byte."""
    row = rows(corpus)[key]
    place = row[f"{part}_offset"] + by
    data = (corpus / row["shard"]).read_bytes()
    change(corpus / row["shard"], place, bytes([data[place] ^ 0x10]))
    return row["shard"], place


def test_a_flipped_bit_names_the_sample_and_the_place(corpus: Path) -> None:
    shard, _ = flip(corpus, "0003", "image", 40)
    flip(corpus, "0007", "json", 20)
    header_shard, header = flip(corpus, "0009", "json", -500)
    found = report(corpus)
    by_key = {finding.key: finding for finding in found.findings}
    row = rows(corpus)
    assert (by_key["0003"].kind, by_key["0003"].shard) == ("data", shard)
    assert by_key["0003"].offset == row["0003"]["image_offset"]
    assert (by_key["0007"].kind, by_key["0007"].offset) == ("data", row["0007"]["json_offset"])
    assert (by_key["0009"].kind, by_key["0009"].shard) == ("header", header_shard)
    assert by_key["0009"].offset == header // 512 * 512 == row["0009"]["json_offset"] - 512
    assert (found.samples, found.sound) == (12, 10)  # the index still finds what a broken header hides
    assert len(found.findings) == 3


def test_padding_harms_no_sample(corpus: Path) -> None:
    row = rows(corpus)["0002"]
    change(corpus / row["shard"], row["json_offset"] + row["json_bytes"] + 1, b"\x40")
    found = report(corpus)
    assert [(f.kind, f.key, f.harmless) for f in found.findings] == [("padding", "0002", True)]
    assert found.sound == 12


def test_a_bit_that_tar_does_not_read_is_found_by_the_manifest(corpus: Path) -> None:
    row = rows(corpus)["0002"]
    change(
        corpus / row["shard"], row["image_offset"] - 512 + 155, b"0"
    )  # after the end of the header's checksum
    assert told(corpus) == [("bytes", "")]
    assert told(bare(corpus)) == []


def test_a_truncated_and_a_missing_shard(corpus: Path) -> None:
    shards = sorted(corpus.rglob("*.tar"))
    row = rows(corpus)["0001"]
    data = (corpus / row["shard"]).read_bytes()
    (corpus / row["shard"]).write_bytes(data[: row["image_offset"] + 10])
    shards[-1].unlink()
    found = report(corpus)
    name = str(shards[-1].relative_to(corpus))
    gone = [key for key, row in rows(corpus).items() if row["shard"] == name]
    assert ("missing", name) in {(f.kind, f.shard) for f in found.findings}
    assert {f.key for f in found.findings if f.kind == "truncated"} >= {"0001"}
    cut = [k for k, r in rows(corpus).items() if r["shard"] == row["shard"] and k >= "0001"]
    assert found.sound == 12 - len(gone) - len(cut)


def test_an_index_that_tells_of_other_bytes(corpus: Path) -> None:
    table = pq.read_table(corpus / "index.parquet").to_pylist()
    table[0]["image_offset"] += 512
    table[5]["sha256"] = "0" * 64
    pq.write_table(
        pa.Table.from_pylist(table, pq.read_schema(corpus / "index.parquet")), corpus / "index.parquet"
    )
    assert ("index", "") in told(corpus)  # the manifest tells of another index: it is not trusted
    reseal(corpus)
    assert told(corpus) == [("moved", "0000"), ("data", "0005")]


def test_an_index_that_tells_of_no_bytes_or_of_a_key_twice(corpus: Path) -> None:
    table = pq.read_table(corpus / "index.parquet").to_pylist()
    table[1] |= {"image_offset": -5, "image_bytes": 1 << 62}
    table[2]["image_bytes"] = 1 << 62
    table[3]["sha256"] = None
    table.append(dict(table[-1]))
    schema = pq.read_schema(corpus / "index.parquet")
    pq.write_table(pa.Table.from_pylist(table, schema), corpus / "index.parquet")
    reseal(corpus)
    found = set(told(corpus))
    assert found >= {("index", "0001"), ("truncated", "0002"), ("index", "0003"), ("duplicate", "0011")}
    assert ("index", "") in found  # more rows than samples
    assert report(corpus).sound >= 11


def test_a_damaged_index_and_a_damaged_manifest_leave_the_tars_to_be_judged(corpus: Path) -> None:
    change(corpus / "index.parquet", 4, b"????")
    found = report(corpus)
    assert [finding.kind for finding in found.findings] == ["index"]
    assert found.sound == 12
    (corpus / "manifest.json").write_text('{"format": 1')
    found = report(corpus)
    assert found.kinds["manifest"] == 1
    assert found.sound == 12


def test_a_manifest_cannot_lead_out_of_the_corpus(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["shards"][0]["path"] = "../../etc/passwd"
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    found = report(corpus)
    assert "leads out of the corpus" in found.findings[0].detail
    assert all("etc" not in finding.shard for finding in found.findings)


def test_a_shard_that_the_manifest_does_not_know(corpus: Path) -> None:
    shutil.copy(corpus / "train" / "train-00000.tar", corpus / "train" / "more.tar")
    assert told(corpus) == [("manifest", "")]


def test_members_of_two_shards_in_one(corpus: Path) -> None:
    first, second = sorted(corpus.rglob("*.tar"))[:2]
    members = []
    for path in (first, second):
        with tarfile.open(path) as tar:
            members.append([(m.name, tar.extractfile(m).read()) for m in tar])  # type: ignore[union-attr]
    mixed = [member for two in zip(*members, strict=False) for member in two]
    tar_of(first, mixed)
    found = report(corpus)
    own = {key for key, row in rows(corpus).items() if row["shard"] == str(first.relative_to(corpus))}
    foreign = {name[:4] for name, _ in mixed} - own
    assert {f.key for f in found.findings if f.kind == "unindexed"} == foreign
    assert {f.key for f in found.findings if f.kind == "duplicate"} >= foreign
    assert found.sound >= 12
    assert {finding.kind for finding in report(first).findings} == {"interleaved"}


# ------------------------------------------------------------------------------------ tars of anyone


def test_a_picture_without_a_record_and_the_other_way(tmp_path: Path) -> None:
    members = [*pair(0), pair(1)[0], pair(2)[1], *pair(3)]
    assert told(tar_of(tmp_path / "a.tar", members)) == [("partner", "0001"), ("partner", "0002")]


def test_a_caption_that_the_others_have(tmp_path: Path) -> None:
    members = [m for n in range(4) for m in [*pair(n), (f"{n:04d}.txt", b"a caption")]]
    assert told(tar_of(tmp_path / "a.tar", members)) == []
    del members[5]
    assert told(tar_of(tmp_path / "a.tar", members)) == [("partner", "0001")]
    assert report(tmp_path / "a.tar").sound == 4


def test_keys_that_come_twice(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [*pair(0), *pair(1), *pair(0)])
    assert told(tmp_path / "a.tar") == [("duplicate", "0000")] * 2
    tar_of(tmp_path / "a.tar", [*pair(0), *pair(1), *pair(0, title="another")])
    assert told(tmp_path / "a.tar") == [("duplicate", "0000"), ("duplicate_differs", "0000")]
    tar_of(tmp_path / "a.tar", [*pair(0), *pair(1)])
    tar_of(tmp_path / "b.tar", [*pair(1), *pair(2)])
    found = report(tmp_path)
    assert [(f.shard, f.kind, f.key) for f in found.findings] == [("b.tar", "duplicate", "0001")]
    assert "a.tar" in found.findings[0].detail
    assert found.kinds == {"duplicate": 1}


def test_many_shared_keys_are_counted_and_some_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_check, "MOST_FINDINGS", 2)
    members = [member for number in range(5) for member in pair(number)]
    for name in "abc":
        tar_of(tmp_path / f"{name}.tar", members)
    found = report(tmp_path)
    assert found.kinds == {"duplicate": 10}
    assert 0 < len(found.findings) < 10


def test_records_that_are_none(tmp_path: Path) -> None:
    broken = [b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 200_000]
    members = [m for n, data in enumerate(broken) for m in [pair(n)[0], (f"{n:04d}.json", data)]]
    assert told(tar_of(tmp_path / "a.tar", members)) == [("record", f"{n:04d}") for n in range(len(broken))]
    other = [pair(0)[0], ("0000.json", json.dumps(record(1)).encode())]
    assert told(tar_of(tmp_path / "a.tar", other)) == [("record", "0000")]


def test_pictures_are_compared_with_records_where_most_agree(tmp_path: Path) -> None:
    wrong = [("0009.png", image(9) + b"x"), pair(9)[1]]
    path = tar_of(tmp_path / "a.tar", [*pair(0), *pair(1), *wrong])
    assert told(path) == [("data", "0009")]
    # img2dataset's checksum is of the picture as it was fetched, before it was made smaller
    resized = [m for n in range(5) for m in pair(n, sha256="0" * 64)]
    assert told(tar_of(tmp_path / "b.tar", resized)) == []
    assert report(tmp_path / "b.tar").sound == 5


def test_pictures_that_cannot_be_decoded(tmp_path: Path) -> None:
    members = [m for n in range(3) for m in pair(n, sha256=None)]
    members[2] = ("0001.png", image(1)[:-30])
    path = tar_of(tmp_path / "a.tar", members)
    assert told(path) == []
    assert told(path, decode=True) == [("undecodable", "0001")]
    assert report(path, decode=True).sound == 2


@pytest.mark.parametrize(
    "name",
    ["../../x.png", "/etc/x.png", "a/../../x.png", "x\n.png", "x\x1b[2J.png", "..\\x.png", "\u202egnp.x.png"],
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    path = tar_of(tmp_path / "a.tar", [*pair(0), (name, b"x")])
    assert [kind for kind, _ in told(path)] == ["name"]
    assert report(path).sound == 1
    assert not safe_name(name)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [*pair(0), ("\udcff.png", b"x")], errors="surrogateescape")
    found = report(path)
    assert [(f.kind, f.key) for f in found.findings] == [("name", "\\udcff")]
    json.dumps(as_json(found)).encode()


def test_links_and_devices_are_named_and_never_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    tar_of(path, pair(0))
    with tarfile.open(path, "a") as tar:
        for type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{type.decode()}.png")
            info.type, info.linkname = type, "/etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert [kind for kind, _ in told(path)] == ["not_a_file"] * 5
    assert report(path).sound == 1


def test_a_sparse_member_is_named(tmp_path: Path) -> None:
    info = tarfile.TarInfo("s.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    data = tar_of(tmp_path / "a.tar", pair(0)).read_bytes()
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes([1]) * 512 + data)
    assert told(tmp_path / "a.tar") == [("not_a_file", "s")]


def test_what_is_no_tar(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("picture", image(1)), ("zeros", bytes(10_240))):
        (tmp_path / f"{name}.tar").write_bytes(data)
    found = {f.shard: f.kind for f in report(tmp_path).findings}
    assert found == {"empty.tar": "not_a_tar", "picture.tar": "not_a_tar"}
    (tmp_path / "folder.tar").mkdir()
    assert ("missing", "") in told(tmp_path)


def test_places_without_shards_are_said(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(CorpusError, match="a corpus with a manifest; name it alone"):
        find_shards([corpus, tmp_path])
    stage = tmp_path / "stage"
    shutil.move(corpus, stage / "out")
    assert find_shards([stage]).manifest is not None
    shutil.rmtree(stage)
    with pytest.raises(CorpusError, match="there is no such file"):
        find_shards([tmp_path / "none"])
    with pytest.raises(CorpusError, match=r"no \.tar file is below"):
        find_shards([tmp_path])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.png", ("a", "png")),
        ("dir.x/a.seg.PNG", ("dir.x/a", "seg.png")),
        ("a", ("a", "")),
        ("dir/.json", ("dir/", "json")),
    ],
)
def test_keys_are_webdatasets(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_an_index_of_before_has_no_record_checksums(corpus: Path) -> None:
    table: Any = pq.read_table(corpus / "index.parquet").drop_columns(["json_crc32"])
    pq.write_table(table, corpus / "index.parquet")
    reseal(corpus)
    assert told(corpus) == []
    manifest = (corpus / "manifest.json").read_text()
    row = rows(corpus)["0005"]
    place = (corpus / row["shard"]).read_bytes().index(b"title 5")
    change(corpus / row["shard"], place, b"Title")
    found = report(corpus)
    assert [(f.kind, f.key, f.harmless) for f in found.findings] == [("checksum", "", False)]
    flip(corpus, "0003", "json", 3)
    assert ("data", "0003") in told(corpus)
    assert (corpus / "manifest.json").read_text() == manifest
