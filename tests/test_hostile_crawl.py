"""The crawl of a hostile web: it ends by itself, keeps its limits, reaches no refused address, loses no good
picture, and gives the same bytes by whatever distributor."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import crawl, shard
from tests import hostile_world
from tests.data_helpers import make_job, picture
from tests.hostile_site import HostileSite
from tests.test_crawl import pairs, process, rows_of

GUARDED = Path(__file__).parent / "guarded"
CROWD = 100


def test_the_guard_writes_down_what_it_blocks(tmp_path: Path) -> None:
    program = (
        "import socket\n"
        "for try_ in (lambda: socket.socket().connect(('169.254.169.254', 80)),\n"
        "             lambda: socket.socket(2, 2).sendto(b'x', ('10.1.2.3', 53)),\n"
        "             lambda: socket.getaddrinfo('name.example', 80)):\n"
        "    try: try_()\n"
        "    except PermissionError: print('refused')\n"
    )
    env = os.environ | {"PYTHONPATH": str(GUARDED), "TEST_WORLD": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["refused"] * 3
    assert (tmp_path / "blocked.txt").read_text().splitlines() == [
        "socket.connect 169.254.169.254",
        "socket.sendto 10.1.2.3",
        "socket.getaddrinfo name.example",
    ]


def check_limits(found: dict[str, Any]) -> None:
    """What the server saw of the crawl."""
    config = hostile_world.CONFIG
    assert max(found["most_at_once"].values()) <= config["per_host"]
    assert found["gaps_s"]["crowd.test"]["mean"] >= 0.95 * config["host_delay_s"]
    assert found["gaps_s"]["slow-robots.test"]["mean"] >= 0.3  # its Crawl-delay is 0.4
    assert found["robots_hits"].pop("robots-503.test") == 2  # a 5xx is asked again, once
    assert found["robots_hits"].pop("closed-by-robots.test") <= 2  # redirected to by way of another process
    assert set(found["robots_hits"].values()) == {1}
    assert found["agents"] == ["Mozilla/5.0 (compatible; tandem)"]


@pytest.mark.slow
@pytest.mark.usefixtures("spark")
def test_a_hostile_web_twice_and_by_spark(tmp_path: Path) -> None:
    runs = [
        hostile_world.run(tmp_path / "one", CROWD),
        hostile_world.run(tmp_path / "two", CROWD, processes=1, threads=16, urls_per_piece=20),
        hostile_world.run(tmp_path / "spark", CROWD, distributor="spark"),
    ]
    for found in runs:
        assert found["wrong"] == {}
        assert found["counts"]["kept"] == CROWD + list(hostile_world.EXPECTED.values()).count("ok")
        assert found["blocked"] == []
        check_limits(found)
        assert found["shards"] == runs[0]["shards"]


@pytest.mark.slow
def test_a_piece_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    files = {f"/{i}.webp": picture(100 + i, 120) for i in range(40)}
    with HostileSite(files) as site:
        urls = [site.url + path for path in files]
        job = make_job(tmp_path / "crawl", pairs=pairs(tmp_path / "filter", urls))
        config = crawl.Config(allow_private=True, host_delay_s=0.25, piece_deadline_s=3, processes=1)
        report = crawl.run(config, job)
        asked = sum(site.hits.values())
    assert 8 <= report.counts["kept"] <= asked <= 13
    assert report.counts["kept"] + report.counts["dropped_deadline"] == 40
    statistics = pq.read_table(job.out / "statistics.parquet").to_pylist()
    assert {row["status"]: row["count"] for row in statistics} == {
        "deadline": report.counts["dropped_deadline"],
        "ok": report.counts["kept"],
    }


@pytest.mark.slow
def test_a_picture_that_ends_or_holds_up_its_process_costs_itself_alone(tmp_path: Path) -> None:
    files = {f"/{i}.webp": picture(100 + i, 120) for i in range(20)}
    files |= {"/9a.webp": picture() + b"stuck", "/9b.webp": picture() + b"crash"}
    config = {
        "allow_private": True,
        "host_delay_s": 0,
        "stall_limit_s": 3,
        "urls_per_piece": 8,
        "processes": 1,
    }
    with HostileSite(files) as site:
        inputs = pairs(tmp_path / "filter", [site.url + path for path in files])
        env = {"PYTHONPATH": f"{GUARDED}:{Path(__file__).parent.parent}", "TEST_BAD_DECODER": "1"}
        out, err = process(config, tmp_path / "crawl", inputs, **env).communicate(timeout=300)
        found = rows_of(tmp_path / "crawl")
        assert json.loads(out)["kept"] == 20, err
        statuses = {url.removeprefix(site.url): row["status"] for url, row in found.items()}
    assert statuses == dict.fromkeys(files, "ok") | {"/9a.webp": "stuck", "/9b.webp": "stuck"}


def shards_of(crawled: Path, directory: Path) -> dict[str, bytes]:
    job = make_job(directory, pictures=crawled)
    shard.run(shard.Config(), job)
    return {
        str(path.relative_to(job.out)): path.read_bytes() for path in job.out.rglob("*") if path.is_file()
    }


def full_pairs(directory: Path, urls: list[str]) -> Path:
    hostile_world.write_pairs(directory, urls)
    return directory


@pytest.mark.slow
def test_a_changed_rule_fetches_only_the_difference(tmp_path: Path) -> None:
    files = {f"/{i:02d}.webp": picture(100 + i, 120, (i, 0, 0)) for i in range(30)} | {
        "/good.webp": picture()
    }
    lost = ["/gone.webp", "/403", "/500"]
    settings: dict[str, Any] = {"allow_private": True, "host_delay_s": 0, "retries": 0, "processes": 1}

    def crawled(name: str, inputs: Path, **changes: Any) -> Any:
        job = make_job(tmp_path / name, pairs=inputs)
        return job, crawl.run(crawl.Config(**settings | changes), job)

    with HostileSite(files) as site:
        urls = [site.url + path for path in [*files, *lost]]
        before = full_pairs(tmp_path / "before", urls[:20] + urls[-3:])
        after = full_pairs(tmp_path / "after", urls[5:])
        first, _ = crawled("crawls/first", before)
        with (first.out / "tars" / "00000.tar").open("r+b") as tar:  # one picture is not what it was
            tar.seek(rows_of(first.directory)[urls[12]]["offset"])
            tar.write(b"\0\0\0\0")
        site.hits.clear()
        second, report = crawled("crawls/second", after, min_side_px=110)
        asked = {urls.index(site.url + path) for path in site.hits}
        assert asked == {12, *range(20, len(urls))}  # and what failed, as other rules may not fail it
        assert report.metrics["crawl/reused"] == 14
        fresh, expected = crawled("elsewhere/fresh", after, min_side_px=110)
        assert report.counts == expected.counts
        assert report.counts["dropped_too_small"] == 5
        assert shards_of(second.directory, tmp_path / "shard") == shards_of(
            fresh.directory, tmp_path / "again"
        )
        linked = next((second.out / "tars").glob("reused-*.tar"))
        assert linked.samefile(first.out / "tars" / "00000.tar")
        site.hits.clear()
        _, report = crawled("crawls/third", after, min_side_px=110, again=1)
        assert set(site.hits) == {"/500"}  # the rest is known, or failed for good
        assert report.counts == expected.counts
        site.hits.clear()
        _, report = crawled("crawls/fourth", after, min_side_px=110, user_agent="other")
        assert len(site.hits) == len(urls) - 5  # what may be asked for changed: nothing is taken over
        assert report.counts == expected.counts
