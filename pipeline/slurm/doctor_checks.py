"""What `tandem doctor` asks SLURM on the login node: programs, version, limits, partitions. Without torch."""

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

OK: Final = "ok"
WARNING: Final = "warning"
FAILURE: Final = "failure"
NEEDED_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
OLDEST_TESTED = (22, 5)
ANSWER_S = 30.0  # SLURM's own commands give up after MessageTimeout, 10 s by default, and retry
LITTLE_TIME_TO_SAVE_S = 60
SHORT_MEMORY_S = 3600

State = Literal["ok", "warning", "failure"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Finding:
    """One check's result: what was seen and, unless it is ok, what to do about it."""

    check: str
    state: State
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """What the jobs of a cluster file ask of one partition."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    time_limit_s: int


def login_checks(partitions: Mapping[str, Wanted], run: Run = subprocess.run) -> list[Finding]:
    """Ask SLURM's commands for all that a submission relies on; `partitions` by their names.

    `run` is subprocess.run, or a partial of it (with another environment). Nothing is raised: a command that
    is missing, fails, or does not answer in 30 s is a finding.
    """
    findings = [_program(name, run) for name in (*NEEDED_PROGRAMS, "sacct")]
    if any(finding.state == FAILURE for finding in findings):
        return findings
    try:
        config = _config(_answer(run, "scontrol", "show", "config"))
        known = _records(_answer(run, "scontrol", "--oneliner", "show", "partition"), "PartitionName")
        nodes = _records(_answer(run, "scontrol", "--oneliner", "show", "node"), "NodeName")
    except _NoAnswerError as error:
        remedy = (
            "see that slurmctld runs and that SLURM_CONF, where it is set, names this cluster's slurm.conf"
        )
        return [*findings, Finding("slurmctld", FAILURE, str(error), remedy)]
    findings += [
        _version(config),
        _array_size(config),
        _job_count(config),
        _part_limits(config),
        _accounting(config),
    ]
    for name, wanted in partitions.items():
        findings += _partition(name, wanted, config, known, nodes)
    return findings


class _NoAnswerError(Exception):
    """A command of SLURM failed; the text says how."""


def _answer(run: Run, *command: str) -> str:
    try:
        done = run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NoAnswerError(f"{' '.join(command)}: {error}") from None
    if done.returncode != 0:
        raise _NoAnswerError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _program(name: str, run: Run) -> Finding:
    check = f"program {name}"
    try:
        return Finding(check, OK, _answer(run, name, "--version").strip())
    except _NoAnswerError as error:
        if name == "sacct":
            remedy = (
                "ended jobs are known as long as slurmctld remembers them; install it if there is slurmdbd"
            )
            return Finding(check, WARNING, str(error), remedy)
        return Finding(
            check, FAILURE, str(error), f"log in to a node that has {name}, or load SLURM's module"
        )


def _version(config: Mapping[str, str]) -> Finding:
    seen = config.get("SLURM_VERSION", "")
    numbers = tuple(int(part) for part in re.findall(r"\d+", seen)[:2])
    if numbers >= OLDEST_TESTED:
        return Finding("SLURM version", OK, seen)
    oldest = ".".join(f"{number:02d}" for number in OLDEST_TESTED)
    remedy = f"Tandem is tested with {oldest} and newer: try with --dry-run and the demo first"
    return Finding("SLURM version", WARNING, seen or "not told", remedy)


def _array_size(config: Mapping[str, str]) -> Finding:
    size = _number(config.get("MaxArraySize"))
    if size is None or size < 2:
        seen = f"MaxArraySize={config.get('MaxArraySize', 'not told')}"
        return Finding("array size", FAILURE, seen, "arrays are switched off: ask for MaxArraySize=1001")
    return Finding("array size", OK, f"MaxArraySize={size}: {size - 1:,} tasks a chunk of an array at most")


def _job_count(config: Mapping[str, str]) -> Finding:
    count = _number(config.get("MaxJobCount"))
    seen = f"MaxJobCount={config.get('MaxJobCount', 'not told')}"
    if count is None or count >= 1000:
        return Finding("job count", OK, seen)
    remedy = "the cluster holds few jobs, all users' together: split the data stages into fewer tasks"
    return Finding("job count", WARNING, seen, remedy)


def _part_limits(config: Mapping[str, str]) -> Finding:
    value = config.get("EnforcePartLimits", "NO")
    seen = f"EnforcePartLimits={value}"
    if value != "NO":
        return Finding("partition limits", OK, seen)
    remedy = (
        "a job that asks for more than its partition has waits for ever: mind the partitions' lines below"
    )
    return Finding("partition limits", WARNING, seen, remedy)


def _accounting(config: Mapping[str, str]) -> Finding:
    value = config.get("AccountingStorageType", "not told")
    memory_s = _number(config.get("MinJobAge"))
    seen = f"AccountingStorageType={value}, MinJobAge={config.get('MinJobAge', 'not told')}"
    if "slurmdbd" in value or (memory_s is not None and memory_s >= SHORT_MEMORY_S):
        return Finding("ended jobs", OK, seen)
    remedy = (
        "SLURM forgets jobs soon after they end, and lets a job run whose failed predecessor it forgot: "
        f"ask for slurmdbd, or for MinJobAge of {SHORT_MEMORY_S} s or more"
    )
    return Finding("ended jobs", WARNING, seen, remedy)


def _partition(
    name: str,
    wanted: Wanted,
    config: Mapping[str, str],
    known: Mapping[str, Mapping[str, str]],
    nodes: Mapping[str, Mapping[str, str]],
) -> Iterator[Finding]:
    check = f"partition {name}"
    fields = known.get(name)
    if fields is None:
        remedy = f"name one of these in the cluster file: {', '.join(known) or 'there is none'}"
        yield Finding(check, FAILURE, "there is no partition of this name that you may see", remedy)
        return
    state = fields.get("State", "UP")
    if state != "UP":
        yield Finding(
            check, FAILURE, f"State={state}", "wait until it is up, or name another in the cluster file"
        )
    yield _time_limit(check, wanted, fields)
    yield _node_count(check, name, wanted, fields, nodes)
    yield _preemption(check, config, fields, known)


def _time_limit(check: str, wanted: Wanted, fields: Mapping[str, str]) -> Finding:
    limit_s = seconds_of(fields.get("MaxTime", "UNLIMITED"))
    seen = f"MaxTime={fields.get('MaxTime', 'UNLIMITED')}"
    if limit_s is None or limit_s >= wanted.time_limit_s:
        return Finding(f"{check}: time", OK, seen)
    remedy = (
        f"the cluster file asks for {wanted.time_limit_s:,} s: ask for {limit_s:,} s at most; runs resume"
    )
    return Finding(f"{check}: time", FAILURE, seen, remedy)


def _node_count(
    check: str, name: str, wanted: Wanted, fields: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]
) -> Finding:
    """Whether enough of the partition's nodes have the GPUs and CPUs that are wanted, and are up."""
    check = f"{check}: nodes"
    own = {key: node for key, node in nodes.items() if name in node.get("Partitions", "").split(",")}
    fit = {
        key: node
        for key, node in own.items()
        if gpus_of(node.get("Gres", "")) >= wanted.gpus_per_node
        and (_number(node.get("CPUTot")) or 0) >= wanted.cpus_per_node
    }
    up = [
        key for key, node in fit.items() if not re.search(r"DOWN|DRAIN|FAIL|MAINT|\*", node.get("State", ""))
    ]
    size = f"{wanted.gpus_per_node} GPUs and {wanted.cpus_per_node} CPUs or more"
    seen = f"{len(own)} nodes, {len(fit)} with {size}, {len(up)} of them up"
    most = _number(fields.get("MaxNodes"))
    if most is not None and most < wanted.nodes:
        remedy = f"the cluster file asks for {wanted.nodes} nodes: ask for {most} or fewer"
        return Finding(check, FAILURE, f"{seen}; MaxNodes={most}", remedy)
    if len(fit) < wanted.nodes:
        kinds = sorted({f"{n.get('Gres', '(null)')}, {n.get('CPUTot', '?')} CPUs" for n in own.values()})
        remedy = (
            f"the cluster file asks for {wanted.nodes} of them; its nodes are: {'; '.join(kinds) or 'none'}"
        )
        return Finding(check, FAILURE, seen, remedy)
    if len(up) < wanted.nodes:
        down = ", ".join(f"{key} {fit[key].get('State')}" for key in fit if key not in up)
        return Finding(
            check, WARNING, f"{seen} ({down})", f"jobs of {wanted.nodes} nodes wait until more are up"
        )
    return Finding(check, OK, seen)


def _preemption(
    check: str,
    config: Mapping[str, str],
    fields: Mapping[str, str],
    known: Mapping[str, Mapping[str, str]],
) -> Finding:
    """What a more urgent job does to ours, and how long ours has to save."""
    check = f"{check}: preemption"
    mode = fields.get("PreemptMode") or config.get("PreemptMode", "OFF")
    grace_s = _number(fields.get("GraceTime")) or 0
    kill_wait_s = _number(config.get("KillWait")) or 0
    seen = f"PreemptMode={mode}, GraceTime={grace_s} s, KillWait={kill_wait_s} s"
    kind = config.get("PreemptType", "preempt/none")
    tier = _number(fields.get("PriorityTier")) or 0
    highest = all(tier >= (_number(other.get("PriorityTier")) or 0) for other in known.values())
    if kind.endswith("none") or mode == "OFF" or (kind.endswith("partition_prio") and highest):
        return Finding(check, OK, f"{seen}: nothing preempts its jobs")
    if "REQUEUE" not in mode:
        remedy = "a preempted job does not come back by itself: run `tandem submit` again, it resumes"
        return Finding(check, WARNING, seen, remedy)
    if grace_s + kill_wait_s < LITTLE_TIME_TO_SAVE_S:
        remedy = (
            f"a preempted run has {grace_s + kill_wait_s} s to save: where that is too short it goes on from "
            "its last checkpoint, so save often, or ask for a longer GraceTime"
        )
        return Finding(check, WARNING, seen, remedy)
    return Finding(check, OK, seen)


def seconds_of(text: str) -> int | None:
    """SLURM's times in seconds: 'minutes', 'minutes:seconds', 'hours:minutes:seconds', 'days-hours[:…]'.

    None: there is no limit. Raises ValueError when it is no time.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE", "N/A"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise ValueError(f"{text!r} is no time of SLURM's, as 7-00:00:00 or UNLIMITED")
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1]:
        return ((days * 24 + first) * 60 + second) * 60 + third
    if found[4]:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def gpus_of(gres: str) -> int:
    """The GPUs in a node's Gres: 'gpu:h100:8(S:0-1),nvme:2' → 8."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def _number(text: str | None) -> int | None:
    """The number that a value begins with ('300 sec' → 300), or None."""
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None


def _config(text: str) -> dict[str, str]:
    """`Name   = value` lines of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _records(text: str, key: str) -> dict[str, dict[str, str]]:
    """`scontrol --oneliner show`: a line a record, by its name. A value lasts until the next ` NAME=`."""
    records: Sequence[dict[str, str]] = [
        dict(re.findall(r"([\w:/]+)=(.*?)(?=\s+[\w:/]+=|\s*$)", line)) for line in text.splitlines()
    ]
    return {record[key]: record for record in records if key in record}
