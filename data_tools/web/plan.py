"""The order of a crawl: URLs cut into pieces so that hosts are interleaved and no two processes share one.

A URL belongs to a lane by the hash of its host; a lane is worked on by one process at a time, so that limits
a host hold without a word between processes. In a lane, the first URL of each host comes first, then the
second of each …: the many hosts with few URLs are done early, and what is left in the end is what the largest
host makes everybody wait for anyway. URLs of the stage's own site have no limits: they are in no lane.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.web.opener import host_of, url_problem

MOST_LANES = 256
NO_LANE = -1
_BATCH = 100_000


@dataclass(frozen=True)
class Plan:
    """Pieces of URLs. Grows with the URLs, by their own bytes and 8 more."""

    urls: pa.LargeStringArray  # piece after piece
    starts: np.ndarray  # int64 (pieces + 1,): where each piece begins
    lanes: np.ndarray  # int64 (pieces,): NO_LANE where any process may take it

    def __len__(self) -> int:
        return len(self.lanes)

    def size(self, piece: int) -> int:
        return int(self.starts[piece + 1] - self.starts[piece])

    def piece(self, piece: int) -> pa.LargeStringArray:
        return self.urls.slice(int(self.starts[piece]), self.size(piece))

    def identity(self) -> str:
        """A hash of all of it."""
        digest = hashlib.sha256(self.starts.tobytes() + self.lanes.tobytes())
        for start in range(0, len(self.urls), _BATCH):
            digest.update("\n".join(self.urls.slice(start, _BATCH).to_pylist()).encode())
        return digest.hexdigest()


def number_of(text: str) -> int:
    """A number that a text alone decides: its share, its lane."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def share_key(url: str, is_own: Callable[[str], bool]) -> str:
    """What decides in which share of a crawl a URL is: its host, as limits hold a host."""
    if is_own(url) or url_problem(url) is not None:
        return url
    return host_of(url)


def make_plan(urls: pa.LargeStringArray, is_own: Callable[[str], bool], per_piece: int) -> Plan:
    """The plan of URLs that are sorted, different, and have no `url_problem`."""
    count = len(urls)
    lanes_wanted = min(MOST_LANES, max(1, count // per_piece))
    hosts: dict[str, int] = {"": 0}  # the stage's own site
    lane_of = [NO_LANE]
    host = np.empty(count, np.int64)
    for i, url in enumerate(_each(urls)):
        name = "" if is_own(url) else host_of(url)
        if name not in hosts:
            hosts[name] = len(hosts)
            lane_of.append(number_of(f"lane of {name}") % lanes_wanted)  # not as a share is drawn
        host[i] = hosts[name]
    lane = np.array(lane_of, np.int64)[host]
    order = np.lexsort((np.arange(count), _ranks(host, len(hosts)), lane))
    lane = lane[order]
    starts = [0]
    for first, end in _runs(lane):
        starts += [*range(first + per_piece, end, per_piece), end]
    begin = np.array(starts, np.int64)
    return Plan(urls.take(pa.array(order)), begin, lane[begin[:-1]])


def keep(plan: Plan, folder: Path) -> None:
    """Note the plan in `folder`; pieces that a crawl by another plan left there are removed."""
    path = folder / "plan.txt"
    text = json.dumps({"plan": plan.identity()})
    if not path.is_file() or path.read_text() != text:
        for found in [*folder.glob("*.tar"), *folder.glob("*.parquet"), *folder.glob("*_stats.json")]:
            if found.name[0].isdigit():
                found.unlink()
        (folder / "plan.tmp").write_text(text)
        (folder / "plan.tmp").replace(path)
    for leftover in folder.glob(".piece-*"):
        shutil.rmtree(leftover)


def _each(urls: pa.LargeStringArray) -> Iterator[str]:
    for start in range(0, len(urls), _BATCH):
        yield from urls.slice(start, _BATCH).to_pylist()


def _ranks(group: np.ndarray, groups: int) -> np.ndarray:
    """Of each element, how many of its group stand before it."""
    order = np.argsort(group, kind="stable")
    first = np.zeros(groups + 1, np.int64)
    np.cumsum(np.bincount(group, minlength=groups), out=first[1:])
    ranks = np.empty(len(group), np.int64)
    ranks[order] = np.arange(len(group)) - first[group[order]]
    return ranks


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of equal values."""
    if len(values):
        cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
        yield from pairwise(cuts)
