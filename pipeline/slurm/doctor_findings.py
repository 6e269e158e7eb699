"""What the report of `tandem doctor`'s job (doctor_rank.py) means, and what to do about it. Without torch."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.slurm.doctor_checks import FAILURE, OK, WARNING, Finding, State

CLOCK_WARNING_S = 1.0
CLOCK_FAILURE_S = 10.0  # the save before a time limit goes by the clock
SLOW_FILES_S = 2.0
SLOW_PAIR = 0.5  # of the median
GIB = 2**30
FREE_WARNING_BYTES, FREE_FAILURE_BYTES = 20 * GIB, GIB

Report = Mapping[str, Any]


def job_findings(report: Report) -> list[Finding]:
    """The findings of doctor.json's content; where the job ended early, of the steps that were done."""
    findings = list(_course(report))
    if "ranks" in report:
        findings += [*_gpus(report), _versions(report), *_disks(report)]
    sections = (
        ("clocks", _clocks),
        ("files", _files),
        ("locks", _locks),
        ("all_reduce", _all_reduce),
        ("pairs", _pairs),
    )
    return findings + [judge(report) for name, judge in sections if report.get(name)]


def _course(report: Report) -> Iterator[Finding]:
    """Whether all ranks came through all steps."""
    for missing in report["missing"]:
        who = _who(missing["rank"], missing["host"])
        remedy = (
            f"it died or hangs: read the log of task {missing['rank']} (srun tells which node a task ran on)"
        )
        yield Finding("ranks", FAILURE, f"{who} did not answer in step '{missing['step']}'", remedy)
    for error in report["errors"]:
        seen = f"{_who(error['rank'], error['host'])}: {error['message']}"
        yield Finding(
            f"step '{error['step']}'", FAILURE, seen, "mend this first; the steps after it may not have run"
        )
    if report["complete"]:
        yield Finding("ranks", OK, f"all {report['world_size']} came through all steps")
    elif not report["missing"] and not report["errors"]:
        remedy = "rank 0 was ended there: see the job's log, and whether its time limit was reached"
        yield Finding("ranks", FAILURE, f"the report ends in step '{report['step']}'", remedy)


def _who(rank: int, host: str | None) -> str:
    return f"rank {rank}" if host is None else f"rank {rank} on {host}"


def _gpus(report: Report) -> Iterator[Finding]:
    ranks = report["ranks"]
    if any(rank["cpu_asked_for"] for rank in ranks):
        yield Finding("GPUs", OK, "DS_ACCELERATOR=cpu: the CPU is asked for")
        return
    blind = [rank for rank in ranks if not rank["gpus"]]
    if blind:
        given = f"SLURM gives {blind[0]['slurm_gpus'] or 'none'}, CUDA_VISIBLE_DEVICES is "
        seen = (
            f"torch sees no GPU on {_hosts(blind)} ({given}{blind[0]['cuda_visible_devices'] or 'not set'})"
        )
        remedy = "ask for GPUs in the cluster file; see that nvidia-smi works there and torch is a CUDA build"
        yield Finding("GPUs", FAILURE, seen, remedy)
        return
    tasks = Counter(rank["host"] for rank in ranks)
    short = [rank for rank in ranks if 1 < len(rank["gpus"]) < tasks[rank["host"]]]
    if short:
        seen = f"{_hosts(short)}: {len(short[0]['gpus'])} GPUs for {tasks[short[0]['host']]} tasks"
        yield Finding("GPUs", FAILURE, seen, "start one task a GPU: --ntasks-per-node as in --gres")
        return
    kinds = _by_value((rank["host"], _counted(rank["gpus"])) for rank in ranks)
    if len(kinds) > 1:
        yield Finding(
            "GPUs", WARNING, _told(kinds), "the slowest sets the pace: ask for nodes that are alike"
        )
        return
    yield Finding("GPUs", OK, f"each rank sees {next(iter(kinds))}")


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _versions(report: Report) -> Finding:
    names = dict.fromkeys(name for rank in report["ranks"] for name in rank["versions"])
    unlike = []
    for name in names:
        values = _by_value((rank["host"], rank["versions"].get(name, "none")) for rank in report["ranks"])
        if len(values) > 1:
            unlike.append(f"{name}: {_told(values)}")
    if unlike:
        remedy = (
            "let the cluster file set up one environment, on a folder that all nodes share, or one container"
        )
        return Finding("versions", FAILURE, "; ".join(unlike), remedy)
    alike = report["ranks"][0]["versions"]
    return Finding("versions", OK, "alike: " + ", ".join(f"{name} {alike[name]}" for name in names))


def _disks(report: Report) -> Iterator[Finding]:
    """The least free space of each folder that was looked at."""
    free: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for rank in report["ranks"]:
        for folder, size in rank["free_bytes"].items():
            free[folder].append((size, rank["host"]))
    for folder, sizes in free.items():
        size, host = min(sizes)
        seen = f"{size / GIB:,.1f} GiB free in {folder} on {host}"
        if size >= FREE_WARNING_BYTES:
            yield Finding("disk", OK, seen)
            continue
        remedy = "make room: checkpoints, shards and caches are written there"
        yield Finding("disk", FAILURE if size < FREE_FAILURE_BYTES else WARNING, seen, remedy)


def _clocks(report: Report) -> Finding:
    """Only what is surely an offset counts: less the bound of its measurement."""
    first = report["ranks"][0]["host"]
    clocks = {host: clock for host, clock in report["clocks"].items() if host != first}
    if not clocks:
        return Finding("clocks", OK, "one node, one clock")
    sure = {host: abs(clock["offset_s"]) - clock["bound_s"] for host, clock in clocks.items()}
    late = {host: clocks[host]["offset_s"] for host in clocks if sure[host] > CLOCK_WARNING_S}
    if not late:
        worst = max(clocks, key=lambda host: abs(clocks[host]["offset_s"]))
        offset_s, bound_s = clocks[worst]["offset_s"], clocks[worst]["bound_s"]
        return Finding("clocks", OK, f"{worst} is off by {offset_s:+.6f} s (± {bound_s:.6f} s) to {first}")
    seen = ", ".join(f"{host} {offset_s:+.3f} s" for host, offset_s in late.items())
    remedy = "have these nodes' clocks set (chrony, ntpd): saving before a time limit goes by the clock"
    state: State = FAILURE if max(sure.values()) > CLOCK_FAILURE_S else WARNING
    return Finding("clocks", state, f"off to {first}: {seen}", remedy)


def _files(report: Report) -> Finding:
    reads = [(reader, writer, s) for reader, seen in report["files"].items() for writer, s in seen.items()]
    unseen = [f"{reader} does not see what {writer} wrote" for reader, writer, s in reads if s is None]
    if unseen:
        remedy = "put the runs (--root) on a folder that every node mounts at the same path"
        return Finding("shared files", FAILURE, "; ".join(unseen), remedy)
    slowest_s, reader, writer = max((s, reader, writer) for reader, writer, s in reads)
    nodes = len(report["files"])
    seen = f"{nodes} node(s) read what each node wrote, the last after {slowest_s:.3f} s"
    if slowest_s > SLOW_FILES_S:
        remedy = "mount the folder with shorter caches (NFS: actimeo, lookupcache=positive), or bear the wait"
        return Finding("shared files", WARNING, f"{seen} ({reader}, of {writer})", remedy)
    return Finding("shared files", OK, seen)


def _locks(report: Report) -> Finding:
    unseen = [
        f"{host} does not see that {lock['holder']} holds one"
        for lock in report["locks"]
        for host, held in lock["seen"].items()
        if not held
    ]
    if unseen:
        remedy = (
            "two jobs could write one run directory: mount the folder with locks over all nodes (Lustre: -o "
            "flock, not localflock; NFS: version 4, without local_lock), or put the runs elsewhere"
        )
        return Finding("locks", FAILURE, "; ".join(unseen), remedy)
    return Finding("locks", OK, "a lock (flock) that one node holds is seen by the others")


def _all_reduce(report: Report) -> Finding:
    result = report["all_reduce"]
    seen = (
        f"{report['world_size']} ranks over {report['backend']}, {result['bytes'] / 1e6:,.1f} MB: "
        f"{result['gb_per_s']:.2f} GB/s, {result['bus_gb_per_s']:.2f} GB/s on the bus"
    )
    if result["wrong_ranks"]:
        who = ", ".join(map(str, result["wrong_ranks"]))
        remedy = "do not train there: a link or a GPU garbles data; try without the nodes of these ranks"
        return Finding("all-reduce", FAILURE, f"a wrong sum on rank {who}; {seen}", remedy)
    return Finding("all-reduce", OK, seen)


def _pairs(report: Report) -> Finding:
    pairs = sorted(report["pairs"], key=lambda pair: float(pair["gb_per_s"]))
    median = statistics.median(pair["gb_per_s"] for pair in pairs)
    slow = [pair for pair in pairs if pair["gb_per_s"] < SLOW_PAIR * median]
    seen = f"{len(pairs)} pair(s), median {median:.2f} GB/s"
    named = ", ".join(f"{pair['a']} - {pair['b']} {pair['gb_per_s']:.2f} GB/s" for pair in slow or pairs[:1])
    if not slow:
        return Finding("pairs", OK, f"{seen}, slowest {named}")
    (suspect, times), *_ = Counter(pair[end] for pair in slow for end in "ab").most_common(1)
    remedy = f"look at the links of {suspect} first: it is in {times} of these {len(slow)}"
    return Finding("pairs", WARNING, f"{seen}, slow: {named}", remedy)


def _by_value(values: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Who has each value, of (name, value) a rank; the most common value first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, value in values:
        groups[value].append(name)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _told(groups: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{value} on {', '.join(dict.fromkeys(names))}" for value, names in groups.items())


def _hosts(ranks: Sequence[Report]) -> str:
    return ", ".join(dict.fromkeys(rank["host"] for rank in ranks))
