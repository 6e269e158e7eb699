"""A crawl of a hostile web, in a process of its own: `python -m tests.hostile_world SPEC.json`.

`run` starts it in a network namespace that has a loopback device and nothing else, where the system lets us,
and in any case under the guard of tests/guarded. The process starts the server, runs the crawl stage and the
shard stage on it, and prints what came of it and what the server saw.
"""

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data_helpers import make_job, picture
from tests.hostile_site import HostileSite

ROOT = Path(__file__).parent.parent
GOOD = [f"/good/{i}.webp" for i in range(30)]
# What each URL must come to; {port} is that of the server on 127.0.0.1.
EXPECTED = {
    **{f"http://site{i % 10}.test{path}": "ok" for i, path in enumerate(GOOD)},
    "http://hop.test/to?http://site1.test/good/1.webp%3Fagain": "ok",
    "http://busy.test/busy": "ok",
    "http://date.test/busy-date": "ok",
    "http://flaky.test/flaky": "ok",
    "http://reset.test/reset": "ok",
    "http://gzip.test/gzip": "ok",
    "http://both.test/good/2.webp": "ok",
    "http://slow-robots.test/good/3.webp": "ok",
    "http://closed.test/closed": "too_many_requests",
    "http://broken.test/500": "http_error",
    "http://broken.test/403": "http_error",
    "http://broken.test/nothing": "not_found",
    "http://loop.test/loop": "http_error",
    "http://hung.test/hung": "timeout",
    "http://drip.test/drip": "timeout",
    "http://headers.test/headers": "timeout",
    "https://silent.test/": "timeout",
    "http://hanging.test/x": "timeout",
    "http://many.test/x": "timeout",
    "http://nowhere.invalid/x": "unreachable",
    "http://big.test/big": "too_large",
    "http://big.test/promised": "too_large",
    "http://gzip.test/gzip-bomb": "too_large",
    "http://gzip.test/br": "unsupported_format",
    "http://bomb.test/bomb.png": "bomb",
    "http://html.test/page.jpg": "not_an_image",
    "http://cut.test/cut.webp": "truncated",
    "http://noai.test/noai": "disallowed",
    "http://closed-by-robots.test/good/1.webp": "robots",
    "http://robots-503.test/good/1.webp": "robots",
    "http://hop.test/to?http://closed-by-robots.test/good/2.webp": "robots",
    "http://evil.test/to?http://169.254.169.254/latest/meta-data": "private_address",
    "http://evil.test/to?http://metadata.test/latest": "private_address",
    "http://evil.test/to?http://inside.test/x": "private_address",
    "http://evil.test/to?http://127.0.0.1:{port}/good/1.webp": "private_address",
    "http://evil.test/to?http://[::ffff:10.0.0.1]/x": "private_address",
    "http://evil.test/to?file:///etc/passwd": "bad_url",
    "http://evil.test/to?gopher://inside.test/x": "bad_url",
    "http://169.254.169.254/latest/meta-data": "private_address",
    "http://inside.test/x": "private_address",
    "http://local.test:{port}/good/1.webp": "private_address",
    "http://[::1]:{port}/good/1.webp": "private_address",
    "file:///etc/passwd": "bad_url",
}
CONFIG = {
    "timeout_s": 1.0,
    "request_deadline_s": 2.5,
    "retries": 1,
    "backoff_s": 0.2,
    "retry_after_max_s": 5.0,
    "per_host": 2,
    "host_delay_s": 0.03,
    "threads": 8,
    "processes": 2,
    "urls_per_piece": 50,
    "max_bytes": 1_000_000,
    "max_pixels": 1_000_000,
}
ROBOTS: dict[str, str | int] = {
    "closed-by-robots.test": "User-agent: *\nDisallow: /good/\n",
    "robots-503.test": 503,
    "slow-robots.test": "User-agent: tandem\nCrawl-delay: 0.4\n",
}


def _files(crowd: int) -> dict[str, bytes]:
    pictures = {path: picture(100 + i, 120) for i, path in enumerate(GOOD)}
    pictures |= {f"/crowd/{i}.webp": picture(110, 100 + i % 200, (i % 250, 9, 9)) for i in range(crowd)}
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    return pictures | {
        "/good.webp": picture(),
        "/good/1.webp?again": picture(),
        "/bomb.png": bomb.getvalue(),
        "/page.jpg": b"<!doctype html><p>moved</p>",
        "/cut.webp": picture(300, 300, format="JPEG")[:400],
    }


def run(directory: Path, crowd: int = 0, **config: Any) -> dict[str, Any]:
    """Crawl the hostile web and `crowd` pictures of one host, in `directory`; what `_work` prints.

    Also `namespace`: whether the process had a network of its own.
    """
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text(json.dumps({"crowd": crowd, "config": CONFIG | config}))
    command = [sys.executable, "-m", "tests.hostile_world", str(directory / "spec.json")]
    alone = ["unshare", "-n", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    namespace = (
        shutil.which("unshare") is not None
        and shutil.which("ip") is not None
        and subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    )
    path = os.pathsep.join([str(ROOT / "tests" / "guarded"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*alone, *command] if namespace else command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "TEST_WORLD": str(directory)},
        timeout=3600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    blocked = directory / "blocked.txt"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {
        "namespace": namespace,
        "blocked": blocked.read_text().splitlines() if blocked.exists() else [],
    }


def _work(directory: Path, crowd: int, config: dict[str, Any]) -> dict[str, Any]:
    """The server, the two stages, and what came of them."""
    from stages import crawl, shard

    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
    with HostileSite(_files(crowd), robots=ROBOTS) as site:
        ports = {"80": site.port, "443": silent.getsockname()[1]}
        (directory / "ports.json").write_text(json.dumps(ports))
        expected = {url.replace("{port}", str(site.port)): status for url, status in EXPECTED.items()}
        expected |= {f"http://crowd.test/crowd/{i}.webp": "ok" for i in range(crowd)}
        write_pairs(directory / "filter", sorted(expected))
        job = make_job(directory / "crawl" / "one", pairs=directory / "filter")
        began = time.monotonic()
        report = crawl.run(crawl.Config(**config), job)
        seconds = time.monotonic() - began
    shard_job = make_job(directory / "shard", pictures=job.directory)
    shard.run(shard.Config(), shard_job)
    table = pq.read_table(job.out / "pictures.parquet", columns=["url", "status", "detail"])
    found = {row["url"]: row for row in table.to_pylist()}
    wrong = {
        url: [status, found[url]["status"], found[url]["detail"]]
        for url, status in expected.items()
        if found[url]["status"] != status
    }
    return {
        "urls": len(expected),
        "counts": {name: count for name, count in report.counts.items() if count},
        "wrong": wrong,
        "seconds": seconds,
        "shards": {
            str(path.relative_to(shard_job.out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(shard_job.out.rglob("*"))
            if path.is_file()
        },
        "most_at_once": dict(site.most_at_once),
        "gaps_s": {host: _gaps(starts) for host, starts in site.starts.items() if len(starts) > 1},
        "robots_hits": dict(site.robots_hits),
        "requests": sum(site.hits.values()) + sum(site.robots_hits.values()),
        "agents": sorted(site.agents),
    }


def _gaps(starts: list[float]) -> dict[str, float]:
    gaps = sorted(later - earlier for earlier, later in pairwise(sorted(starts)))
    return {"mean": sum(gaps) / len(gaps), "median": gaps[len(gaps) // 2]}


def write_pairs(directory: Path, urls: list[str]) -> None:
    """A filter stage's directory with one pair a URL."""
    (directory / "out").mkdir(parents=True)
    count = len(urls)
    columns = {"query": [f"query {i}" for i in range(count)], "url": urls, "title": ["a title"] * count}
    columns |= {"content": ["a content"] * count, "show": [100] * count, "click": [30] * count}
    pq.write_table(pa.table(columns), directory / "out" / "pairs.parquet")


if __name__ == "__main__":
    spec = Path(sys.argv[1])
    print(json.dumps(_work(spec.parent, **json.loads(spec.read_text()))))
