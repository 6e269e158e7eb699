"""Checking a corpus, or the tars of any webdataset: what is damaged, which sample it is, and where.

A directory with manifest.json is a corpus: every byte of it is accounted for. Other tars are judged by what
they hold. What grows with the corpus: 12 bytes a sample (to find keys that come twice), and a shard's members
in each worker. Of a shard's findings the first MOST_FINDINGS are told; their number by kind is exact.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.shards.files import CorpusError, DirectoryFiles
from data_tools.shards.findings import Examined, Finding
from data_tools.shards.format import INDEX, RECORD_CRC, read_manifest
from data_tools.shards.samples import examine
from data_tools.shards.side_by_side import side_by_side
from data_tools.shards.tar_scan import TarFile

MOST_FINDINGS = 1000  # that are told of one shard, and of keys that several share
MOST_IN_ALL = 100_000


@dataclass(frozen=True)
class ShardTask:
    """One shard to look at."""

    path: Path
    shard: str  # its name in findings and in the index
    index: Path | None = None  # that its samples are listed in
    bytes: int | None = None  # as the manifest says
    sha256: str | None = None
    samples: int | None = None
    decode: bool = False


@dataclass
class ShardReport:
    """What was found in one shard."""

    shard: str
    bytes: int = 0
    samples: int = 0  # keys that stand in it
    sound: int = 0
    findings: list[Finding] = field(default_factory=list)  # the first MOST_FINDINGS
    kinds: Counter[str] = field(default_factory=Counter)  # of all
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # of its sound samples' keys


@dataclass
class CheckReport:
    """What was found in all shards."""

    shards: int = 0
    bytes: int = 0
    samples: int = 0
    sound: int = 0
    findings: list[Finding] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    manifest: bool = False  # there is one, so that every byte was compared with what was written

    def say(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.kinds[finding.kind] += 1


@dataclass(frozen=True)
class Corpus:
    """The shards that are to be looked at, and what was found before that."""

    tasks: list[ShardTask]
    manifest: dict[str, Any] | None
    index: Path | None  # None: there is none, or it is not to be trusted
    findings: list[Finding]


def find_shards(places: list[Path], decode: bool = False) -> Corpus:
    """The shards of a corpus (one directory with a manifest, or whose out/ has one), or of any tars.

    A manifest or an index that is damaged is a finding, and the shards are judged without it.

    Raises:
        CorpusError: a place is not there, no tar is below it, or a corpus is one of several places.
    """
    for place in places:
        if not place.exists():
            raise CorpusError(f"{place}: there is no such file or directory")
    corpora = [at for place in places for at in (place, place / "out") if (at / "manifest.json").is_file()]
    if corpora and len(places) > 1:
        raise CorpusError(f"{corpora[0]}: a corpus with a manifest; name it alone")
    if corpora:
        return _of_manifest(corpora[0], decode)
    tasks = []
    for place in places:
        paths = sorted(place.rglob("*.tar")) if place.is_dir() else [place]
        tasks += [ShardTask(path, str(path.relative_to(place) if place.is_dir() else path)) for path in paths]
    if not tasks:
        raise CorpusError(f"{', '.join(map(str, places))}: no .tar file is below; name a corpus or its tars")
    if len({task.shard for task in tasks}) < len(tasks):  # two directories with equal names
        tasks = [ShardTask(task.path, str(task.path)) for task in tasks]
    return Corpus([replace(task, decode=decode) for task in tasks], None, None, [])


def _of_manifest(directory: Path, decode: bool) -> Corpus:
    findings: list[Finding] = []
    try:
        manifest = read_manifest(DirectoryFiles(directory))
        shards = [(s["path"], s["bytes"], s["sha256"], s["samples"]) for s in manifest["shards"]]
        said = (manifest["index"]["bytes"], manifest["index"]["sha256"])
        if not all(_below(name) for name, *_ in shards):
            raise CorpusError("a shard's path leads out of the corpus")
    except (CorpusError, KeyError, TypeError) as error:
        findings.append(Finding("manifest.json", "manifest", "", 0, f"the manifest cannot be used: {error}"))
        tars = [
            ShardTask(path, str(path.relative_to(directory)), decode=decode)
            for path in sorted(directory.rglob("*.tar"))
        ]
        return Corpus(tars, None, None, findings)  # nobody can say any more whether the index is whole
    index = _usable_index(directory, said, findings)
    tasks = [ShardTask(directory / n, n, index, size, sha, count, decode) for n, size, sha, count in shards]
    known = {name for name, *_ in shards}
    for path in sorted(directory.rglob("*.tar")):
        if str(path.relative_to(directory)) not in known:
            name = str(path.relative_to(directory))
            findings.append(Finding(name, "manifest", "", 0, "the manifest knows no such shard"))
    if index is not None and pq.read_metadata(index).num_rows != sum(count for *_, count in shards):
        findings.append(Finding("index.parquet", "index", "", 0, "its rows are not the manifest's samples"))
    return Corpus(tasks, manifest, index, findings)


def _usable_index(directory: Path, said: tuple[int, str], findings: list[Finding]) -> Path | None:
    """index.parquet, if it is the manifest's and has its columns; else that is a finding."""
    path = directory / "index.parquet"
    problem = ""
    try:
        if not set(INDEX) <= set(pq.read_schema(path).names):
            problem = "the index lacks columns"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if (path.stat().st_size, found) != said:
            problem = "the index is not the one that the manifest tells of"
    except (OSError, pa.ArrowException) as error:
        problem = f"the index cannot be read: {error}"
    if problem:
        findings.append(Finding("index.parquet", "index", "", 0, problem))
        return None
    return path


def check(
    corpus: Corpus, processes: int, on_progress: Callable[[int], None] = lambda shards: None
) -> CheckReport:
    """Look at every shard, `processes` side by side; findings come in the order of the shards.

    Raises:
        WorkerLost: a worker process was killed.
    """
    report = CheckReport(manifest=corpus.manifest is not None)
    for finding in corpus.findings:
        report.say(finding)
    hashes: list[np.ndarray] = []
    for shard in side_by_side(check_shard, corpus.tasks, processes):
        report.shards += 1
        report.bytes += shard.bytes
        report.samples += shard.samples
        report.sound += shard.sound
        report.findings += shard.findings[: MOST_IN_ALL - len(report.findings)]
        report.kinds += shard.kinds
        hashes.append(shard.hashes)
        on_progress(1)
    count, shared = _shared_keys(corpus.tasks, hashes)
    report.findings += shared
    report.kinds += Counter({"duplicate": count})
    return report


def check_shard(task: ShardTask) -> ShardReport:
    """In a worker: one shard, without the list of its samples."""
    made = look_at(task)
    keys = [sample.key for sample in made.samples]
    findings = made.findings[:MOST_FINDINGS]
    kinds = Counter(finding.kind for finding in made.findings)
    return ShardReport(made.shard, made.bytes, made.keys, len(keys), findings, kinds, hashes_of(keys))


def look_at(task: ShardTask) -> Examined:
    """One shard: its samples and findings. A file that cannot be read is a finding."""
    rows = index_rows(task.index, task.shard) if task.index is not None else None
    try:
        file = TarFile(task.path)
    except OSError as error:
        made = Examined(task.shard, keys=len(rows or ()))
        made.say("missing", "", 0, f"the shard cannot be read: {error.strerror}")
        for row in rows or ():
            made.lost[row["key"]] = "missing: its shard cannot be read"
        return made
    try:
        made = examine(file, task.shard, rows, task.decode, task.sha256)
    finally:
        file.close()
    if task.bytes is not None and made.bytes != task.bytes:
        short = made.bytes < task.bytes
        said = f"{made.bytes:,} bytes, and {task.bytes:,} were written"
        made.say("truncated" if short else "bytes", "", min(made.bytes, task.bytes), said)
    if rows is not None and task.samples not in (None, len(rows)):
        made.say("index", "", 0, f"{len(rows)} rows in the index, {task.samples} samples in the manifest")
    return made


def index_rows(index: Path, shard: str) -> list[dict[str, Any]]:
    """A shard's rows; only the row groups that hold any are read."""
    names = [name for name in pq.read_schema(index).names if name in INDEX or name == RECORD_CRC]
    rows: list[dict[str, Any]] = pq.read_table(
        index, columns=names, filters=[("shard", "=", shard)]
    ).to_pylist()
    return rows


def hashes_of(keys: list[str]) -> np.ndarray:
    """64 bits of each key: 23 million keys share one by chance once in 70,000 corpora."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=np.uint64)


def _shared_keys(tasks: list[ShardTask], hashes: list[np.ndarray]) -> tuple[int, list[Finding]]:
    """How many samples have a key of an earlier shard's; the first of them, named by another reading."""
    everything = np.concatenate([*hashes, np.empty(0, np.uint64)])
    everything.sort()
    again = everything[1:][everything[1:] == everything[:-1]]
    shared, found, first = np.unique(again), list[Finding](), dict[str, str]()
    for task, own in zip(tasks, hashes, strict=True):
        places = np.flatnonzero(np.isin(own, shared))
        if not len(places) or len(found) >= MOST_FINDINGS:
            continue
        samples = look_at(task).samples
        for sample in (samples[place] for place in places[:MOST_FINDINGS]):
            before = first.setdefault(sample.key, task.shard)
            if before != task.shard:
                said = f"the sample is in {before} too"
                found.append(Finding(task.shard, "duplicate", sample.key, sample.image.offset, said))
    return len(again), found


def as_json(report: CheckReport) -> dict[str, Any]:
    """For --json."""
    findings = [
        {
            "shard": f.shard,
            "kind": f.kind,
            "key": f.key,
            "offset": f.offset,
            "harmless": f.harmless,
            "detail": f.detail,
        }
        for f in report.findings
    ]
    counts = {"shards": report.shards, "bytes": report.bytes, "samples": report.samples}
    return counts | {"sound": report.sound, "kinds": dict(report.kinds), "findings": findings}


def _below(name: Any) -> bool:
    """Whether a shard's name, as a manifest tells it, stays below the corpus."""
    path = Path(str(name))
    return not path.is_absolute() and ".." not in path.parts
