"""The crawl against real servers: pictures as fetched, one status a URL, and a killed crawl that goes on."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.web.crawl import REASONS
from stages.base import StageError, Stopped
from stages.crawl import Config, run
from tests.data_helpers import make_job, picture
from tests.hostile_site import HostileSite

pytestmark = pytest.mark.slow


def pairs(directory: Path, urls: list[str]) -> Path:
    """A filter stage's directory with one pair a URL."""
    (directory / "out").mkdir(parents=True, exist_ok=True)
    table = pa.table({"query": [f"query {i}" for i in range(len(urls))], "url": urls})
    pq.write_table(table, directory / "out" / "pairs.parquet")
    return directory


def process(config: dict[str, Any], directory: Path, inputs: Path, **env: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "tests.stage_process",
        "crawl",
        json.dumps(config),
        str(directory),
        f"pairs={inputs}",
    ]
    root = Path(__file__).parent.parent
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=root, env={**os.environ, **env})


def rows_of(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["url"]: row for row in pq.read_table(directory / "out" / "pictures.parquet").to_pylist()}


def endings(tars: Path) -> set[str]:
    found: set[str] = set()
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {Path(name).suffix for name in tar.getnames()}
    return found


def noise(seed: int, side: int = 128) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_url_has_its_status_and_pictures_are_as_fetched(tmp_path: Path) -> None:
    files = {
        "/good.webp": picture(),
        "/good.png": picture(101, 399, format="PNG"),
        "/named.webp": picture(format="JPEG"),
        "/small.webp": picture(99, 300),
        "/wide.webp": picture(401, 100),
        "/page.webp": b"<!doctype html><p>moved</p>",
        "/cut.webp": noise(1)[:9000],
        "/animation.gif": picture(format="GIF"),
        "/huge.png": picture(1200, 1000, format="PNG"),
    }
    expected = {
        "/good.webp": "ok",
        "/good.png": "ok",
        "/named.webp": "ok",
        "/redirect": "ok",
        "/small.webp": "too_small",
        "/wide.webp": "bad_aspect",
        "/page.webp": "not_an_image",
        "/cut.webp": "truncated",
        "/animation.gif": "unsupported_format",
        "/huge.png": "bomb",
        "/nothing": "not_found",
        "/500": "http_error",
        "/noai": "disallowed",
        "/big": "too_large",
        "/drip": "timeout",
    }
    with HostileSite(files) as site:
        urls = {site.url + path: status for path, status in expected.items()}
        urls |= {"ftp://site.example/x": "bad_url", "http://no-such-host.invalid/x": "unreachable"}
        job = make_job(tmp_path / "crawl", pairs=pairs(tmp_path / "filter", sorted(urls)))
        config = Config(
            allow_private=True,
            timeout_s=2,
            max_pixels=1_000_000,
            max_bytes=1_000_000,
            urls_per_piece=6,
            retries=0,
            host_delay_s=0,
        )
        report = run(config, job)
        found = rows_of(job.directory)
        assert {url: row["status"] for url, row in found.items()} == urls
        for path in ("/good.webp", "/good.png", "/named.webp", "/redirect"):
            row = found[site.url + path]
            data = files.get(path, files["/good.webp"])
            with (job.out / row["tar"]).open("rb") as tar:
                tar.seek(row["offset"])
                assert tar.read(row["bytes"]) == data
            assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (found[site.url + "/good.png"]["width"], found[site.url + "/good.png"]["height"]) == (101, 399)
    assert (
        report.counts["urls"]
        == len(urls)
        == report.counts["kept"] + sum(report.counts[f"dropped_{reason}"] for reason in REASONS)
    )
    dropped = pq.read_table(job.out / "dropped.parquet").to_pylist()
    assert {row["url"]: row["reason"] for row in dropped} == {u: s for u, s in urls.items() if s != "ok"}
    assert endings(job.out / "tars") == {
        ".webp",
        ".png",
        ".jpg",
        ".json",
    }  # by content, whatever the URL says
    assert not list((job.out / "tars").glob(".*"))


def test_private_addresses_are_refused_by_default(tmp_path: Path) -> None:
    with HostileSite({"/good.webp": picture()}) as site:
        job = make_job(tmp_path / "crawl", pairs=pairs(tmp_path / "filter", [site.url + "/good.webp"]))
        with pytest.raises(StageError, match="private_address 1"):
            run(Config(), job)
        assert not site.hits
        assert run(Config(allow_private=True), job).counts["kept"] == 1  # the failed pieces were not kept


def killed_after_pieces(running: subprocess.Popen[str], tars: Path, pieces: int) -> None:
    """SIGKILL to the stage's process once some pieces are done; its workers must not outlive it for long."""
    limit = time.monotonic() + 60
    while len(list(tars.glob("*_stats.json"))) < pieces:
        assert time.monotonic() < limit
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        time.sleep(0.01)
    workers = psutil.Process(running.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_killed_and_run_again_fetches_no_finished_piece_twice(tmp_path: Path) -> None:
    files = {f"/{i:03d}.webp": picture(100 + i, 120) for i in range(200)}
    with HostileSite(files, delay_s=0.02) as site:
        inputs = pairs(tmp_path / "filter", [site.url + path for path in files])
        config = {"allow_private": True, "urls_per_piece": 10, "threads": 2, "processes": 2, "retries": 0}
        config |= {"host_delay_s": 0, "per_host": 2}
        tars = tmp_path / "crawl" / "out" / "tars"
        killed_after_pieces(process(config, tmp_path / "crawl", inputs), tars, 4)
        done = [int(path.name[:5]) for path in tars.glob("*_stats.json")]
        assert not (tmp_path / "crawl" / "out" / "pictures.parquet").exists()
        assert 4 <= len(done) < 20
        again = process(config, tmp_path / "crawl", inputs)
        out, err = again.communicate(timeout=100)
        assert again.returncode == 0, err
        assert json.loads(out)["kept"] == 200
        paths = sorted(files)
        finished = {path for piece in done for path in paths[piece * 10 : piece * 10 + 10]}
        assert all(site.hits[path] == 1 for path in finished)
        before = sum(site.hits.values())
        third = process(
            config, tmp_path / "crawl", inputs
        )  # as after a kill between the pieces and DONE.json
        assert third.wait(timeout=100) == 0
        third.communicate()
        assert sum(site.hits.values()) == before


def test_workers_of_a_killed_stage_do_not_write_that_its_site_is_gone(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for i in range(600):
        (site / f"{i:03d}.webp").write_bytes(picture(100 + i % 50, 120))
    inputs = pairs(tmp_path / "filter", [f"http://site.example/{i:03d}.webp" for i in range(600)])
    local = {"url_prefix": "http://site.example/", "folder": str(site)}
    config = {"local_site": local, "urls_per_piece": 20, "threads": 2, "processes": 2, "retries": 0}
    killed_after_pieces(process(config, tmp_path / "crawl", inputs), tmp_path / "crawl" / "out" / "tars", 2)
    again = process(config, tmp_path / "crawl", inputs)
    out, err = again.communicate(timeout=100)
    assert again.returncode == 0, err
    assert json.loads(out)["kept"] == 600


def test_damaged_pieces_are_fetched_again(tmp_path: Path) -> None:
    files = {f"/{i}.webp": picture(100 + i, 120) for i in range(8)}
    with HostileSite(files) as site:
        job = make_job(
            tmp_path / "crawl", pairs=pairs(tmp_path / "filter", [site.url + path for path in files])
        )
        config = Config(allow_private=True, host_delay_s=0, urls_per_piece=2)
        run(config, job)
        before = rows_of(job.directory)
        tars = job.out / "tars"
        (tars / "00000_stats.json").write_text('{"count": 2')  # killed within its write
        (tars / "00001.tar").write_bytes((tars / "00001.tar").read_bytes()[:700])
        (tars / "00002.parquet").unlink()
        run(config, job)
        after = rows_of(job.directory)
        place = {"offset", "tar"}
        assert [{k: v for k, v in row.items() if k not in place} for row in after.values()] == [
            {k: v for k, v in row.items() if k not in place} for row in before.values()
        ]
        assert sorted(site.hits[f"/{i}.webp"] for i in range(8)) == [1, 1, 2, 2, 2, 2, 2, 2]


def test_a_full_disk_is_named_and_finished_pieces_stay(tmp_path: Path) -> None:
    files = {f"/{i}.png": picture(100 + i, 120) for i in range(4)} | {
        f"/big{i}.png": noise(i, 300) for i in range(4)
    }
    with HostileSite(files) as site:
        inputs = pairs(tmp_path / "filter", [site.url + path for path in files])
        config = {
            "allow_private": True,
            "urls_per_piece": 4,
            "processes": 1,
            "host_delay_s": 0,
            "per_host": 1,
        }
        full = process(config, tmp_path / "crawl", inputs, FILE_LIMIT="200000")
        _, err = full.communicate(timeout=100)
        assert full.returncode == 2, err
        assert "no space left" in err
        assert str(tmp_path / "crawl" / "out") in err
        assert "run the same command again" in err
        again = process(config, tmp_path / "crawl", inputs)
        out, err = again.communicate(timeout=100)
        assert again.returncode == 0, err
        assert json.loads(out)["kept"] == 8
        small = [site.hits[path] for path in files if "big" not in path]
        assert small == [1] * 4  # the piece of the small ones was complete


def test_asked_to_stop_it_stops_between_pieces_and_goes_on_later(tmp_path: Path) -> None:
    files = {f"/{i}.webp": picture(100 + i, 120) for i in range(12)}
    with HostileSite(files) as site:
        inputs = pairs(tmp_path / "filter", [site.url + path for path in files])
        asked = iter([False] * 2 + [True] * 100)
        config = Config(allow_private=True, host_delay_s=0, urls_per_piece=2, processes=1)
        with pytest.raises(Stopped):
            run(config, make_job(tmp_path / "crawl", should_stop=lambda: next(asked), pairs=inputs))
        assert 2 <= sum(site.hits.values()) < 12
        assert run(config, make_job(tmp_path / "crawl", pairs=inputs)).counts["kept"] == 12
        assert set(site.hits.values()) == {1}


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "filter" / "out").mkdir(parents=True)
    job = make_job(tmp_path / "crawl", pairs=tmp_path / "filter")
    with pytest.raises(StageError, match=r"pairs.parquet: cannot be read .* Run the filter stage again"):
        run(Config(), job)
    pairs(tmp_path / "filter", ["http://site.example/x"])
    site: Any = {"url_prefix": "http://site.example/", "folder": "none"}
    with pytest.raises(StageError, match="no such folder"):
        run(Config(local_site=site), job)
    with pytest.raises(ValueError, match="must start with http://"):
        Config(local_site={"url_prefix": "site.example", "folder": "x"})  # type: ignore[arg-type]
