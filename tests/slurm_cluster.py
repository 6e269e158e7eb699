"""A private, real SLURM cluster on this machine, for tests: its own munge, ports and state; root or not.

Each node is a slurmd in UTS, mount and PID namespaces of its own: `hostname` says node3, node3 resolves on
all nodes, /dev/shm is its own, and one SIGKILL is a power cut: slurmd, steps and tasks are gone at once. All
other folders are those of this machine: a "shared file system". GPUs are simulated: SLURM counts them and
sets CUDA_VISIBLE_DEVICES; nothing computes on them.

    with SlurmCluster(folder, nodes=2) as cluster:
        job = cluster.run("sbatch", "--parsable", "--wrap", "srun hostname").strip()
        assert cluster.wait(job) == ["COMPLETED"]

Without slurmdbd there is no sacct; scontrol and squeue remember ended jobs for a day.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.slurm_conf import Settings, write_files

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "setpriv", "unshare")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
SYSTEM_PATH = "/usr/sbin:/sbin:"  # where the daemons are, also for users without it in PATH

# How a job ends that nothing will requeue.
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
)


class SlurmError(RuntimeError):
    """A command failed, or a daemon ended by itself; the message has what it printed."""


def _namespace_command() -> list[str]:
    """Starts a command as process 1 of new namespaces that end with it."""
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return ["unshare", *as_user, "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]


def missing() -> list[str]:
    """What a cluster needs and this machine lacks, in words; nothing where tests can run."""
    path = SYSTEM_PATH + os.environ.get("PATH", "")
    programs = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if programs:
        return [f"{name} is not installed ({INSTALL})" for name in programs]
    tried = subprocess.run(
        [*_namespace_command(), "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, text=True
    )
    if tried.returncode != 0:
        return [f"this user may not make namespaces, which a node needs ({tried.stderr.strip()})"]
    return []


class SlurmCluster:
    """See the head of this file. Nodes are named node1, node2, …; job ids may be int or str ("17", "17_3").

    `root` is an empty folder for all that the cluster writes (`log/` has the daemons' logs). `settings` are
    the fields of `slurm_conf.Settings`: nodes, gpus_per_node, gpu_type, cpus, memory_mb, partitions, …
    """

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root.resolve()
        self.settings = Settings(**settings)
        self.node_names = self.settings.node_names
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}  # those that should be alive
        self._port_guard: socket.socket | None = None

    # ---- up and down

    def up(self, timeout_s: float = 30.0) -> Self:
        """Start everything and wait until all nodes are idle. Raises SlurmError, TimeoutError."""
        for name in ("state", "log", "spool", "munge"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        try:
            write_files(self.root, self.settings, self._reserve_ports(1 + self.settings.nodes))
            self._start_munge(timeout_s)
            self.start_controller(timeout_s)
            for node in self.node_names:
                self._start_slurmd(node)
            self.wait_until(self._is_idle, timeout_s, "all nodes to be idle")
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """End everything at once, as by a power cut."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        if self._port_guard is not None:
            self._port_guard.close()
            self._port_guard = None

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    def reset(self, timeout_s: float = 40.0) -> None:
        """Between tests: cancel all jobs, mend what was broken, wait until all nodes are idle."""
        if "slurmctld" not in self._daemons:
            self.start_controller()
        for node in self.node_names:
            if node not in self._daemons:
                self._start_slurmd(node)
        self.run("scancel", "--quiet", f"--user={os.geteuid()}")
        self.wait_until(self._is_idle, timeout_s, "all jobs to end and all nodes to be idle")

    def _is_idle(self) -> bool:
        states = self.node_states()
        for node, state in states.items():
            if "DRAIN" in state:  # SLURM's, for tasks that were slow to die
                self.run("scontrol", "update", f"nodename={node}", "state=resume")
        return set(states.values()) == {"IDLE"} and not self.run("squeue", "--noheader").strip()

    # ---- faults

    def cut_power(self, node: str) -> None:
        """Kill the node with all that runs on it. slurmctld notices within twice slurmd_timeout_s."""
        daemon = self._daemons.pop(node)
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def fail_node(self, node: str) -> None:
        """Cut the node's power and tell slurmctld, which requeues or ends its jobs at once."""
        self.cut_power(node)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=failed_by_a_test")

    def start_node(self, node: str, timeout_s: float = 30.0) -> None:
        """Start a node that was cut, and wait until slurmctld may place jobs on it."""
        if node in self._daemons:
            raise ValueError(f"{node} is up")
        self._start_slurmd(node)
        self.wait_until(
            lambda: not re.search(r"\*|DOWN|NOT_RESPONDING|UNKNOWN", self.node_states()[node]),
            timeout_s,
            f"{node} to be up",
        )

    def kill_controller(self) -> None:
        """SIGKILL slurmctld. It forgets what it had not saved yet (up to 5 s): see `wait_saved`."""
        daemon = self._daemons.pop("slurmctld")
        daemon.kill()
        daemon.wait()

    def start_controller(self, timeout_s: float = 30.0) -> None:
        """Start slurmctld from its saved state, and wait until it answers."""
        if "slurmctld" in self._daemons:
            raise ValueError("slurmctld is up")
        self._spawn(
            "slurmctld", ["slurmctld", "-D", "-i"]
        )  # -i: there is no state to read yet, or half of one
        self.wait_until(lambda: self._succeeds("scontrol", "show", "node"), timeout_s, "slurmctld to answer")

    def wait_saved(self, timeout_s: float = 20.0) -> None:
        """Wait until slurmctld has saved all that it knows of jobs now, so that a kill forgets none of it."""
        saved, now_ns = self.root / "state" / "job_state", time.time_ns()
        probe = self.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true").strip()
        self.run("scancel", probe)  # a change, so that there is something to save
        self.wait_until(
            lambda: saved.exists() and saved.stat().st_mtime_ns > now_ns, timeout_s, "jobs to be saved"
        )

    # ---- use

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """What a client of this cluster needs: this process's environment, SLURM_CONF, and PATH."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_"))
        }
        return {
            **inherited,
            "SLURM_CONF": str(self.root / "etc" / "slurm.conf"),
            "PATH": SYSTEM_PATH + inherited.get("PATH", ""),
        }

    def run(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60.0,
    ) -> str:
        """Run a command, without a shell, as a user of the cluster; returns its standard output.

        `environment` is added to the cluster's. Raises SlurmError when it fails, TimeoutExpired.
        """
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            shown = " ".join(map(str, command))
            raise SlurmError(f"{shown}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """`sbatch OPTIONS --wrap SCRIPT`, the job's id. Its output is lost unless an option says where to."""
        arguments = ("--parsable", "--output=/dev/null", *options, "--wrap", script)
        return self.run("sbatch", *arguments, cwd=cwd).strip()

    def records(self, *ids: int | str) -> list[dict[str, str]]:
        """What `scontrol show job` says of the jobs, one record a job or a task of an array; no ids: all."""
        if not ids:
            text = self.run("scontrol", "--oneliner", "show", "job")
        else:
            text = "".join(self.run("scontrol", "--oneliner", "show", "job", str(id_)) for id_ in ids)
        return [_fields(line) for line in text.splitlines() if line.startswith("JobId=")]

    def job(self, id_: int | str) -> dict[str, str]:
        """One job's record: JobState, ExitCode ("7:0"), Restarts, NodeList, Reason, … Raises SlurmError."""
        records = self.records(id_)
        if len(records) != 1:
            raise SlurmError(
                f"job {id_} has {len(records)} records, not 1: name one task of an array, as 17_3"
            )
        return records[0]

    def jobs(self) -> list[dict[str, str]]:
        """All jobs since the cluster began, those that ended too."""
        return self.records()

    def node_states(self) -> dict[str, str]:
        """Each node's state: IDLE, MIXED, ALLOCATED, DOWN*, …"""
        text = self.run("scontrol", "--oneliner", "show", "node")
        nodes = [_fields(line) for line in text.splitlines() if line.startswith("NodeName=")]
        return {node["NodeName"]: node["State"] for node in nodes}

    def wait(self, *ids: int | str, states: Sequence[str] = ENDED, timeout_s: float = 60.0) -> list[str]:
        """Wait until every job, and every task of an array, is in one of `states`; returns them in order."""
        seen: list[str] = []

        def there() -> bool:
            seen[:] = [record["JobState"] for record in self.records(*ids)]
            return all(state in states for state in seen)

        self.wait_until(there, timeout_s, lambda: f"jobs {', '.join(map(str, ids))} ({', '.join(seen)})")
        return seen

    def wait_until(
        self, condition: Callable[[], object], timeout_s: float, what: str | Callable[[], str]
    ) -> None:
        """Wait until `condition()` is true. Raises TimeoutError; SlurmError when a daemon ends by itself."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    printed = (self.root / "log" / f"{name}.out").read_text(errors="replace")[-2000:]
                    raise SlurmError(f"{name} ended with code {daemon.returncode}: {printed}")
            if time.monotonic() > deadline:
                waited_for = what if isinstance(what, str) else what()
                raise TimeoutError(f"waited {timeout_s} s for {waited_for}; logs: {self.root / 'log'}")
            time.sleep(0.05)

    # ---- how it is made

    def _reserve_ports(self, count: int) -> int:
        """The first of `count` free ports. The one before stays bound, as a sign to other clusters."""
        for guard_port in range(21000, 32000, 100):  # below the ports that the kernel gives out
            with contextlib.ExitStack() as stack:
                try:
                    guard = stack.enter_context(socket.socket())
                    guard.bind(("127.0.0.1", guard_port))
                    for port in range(guard_port + 1, guard_port + 1 + count):
                        stack.enter_context(socket.socket()).bind(("0.0.0.0", port))
                except OSError:
                    continue
                self._port_guard = guard.dup()
                return guard_port + 1
        raise SlurmError("no free ports between 21000 and 32000")

    def _start_munge(self, timeout_s: float) -> None:
        munge = self.root / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        options = {
            "key-file": key,
            "socket": munge / "socket",
            "pid-file": munge / "pid",
            "seed-file": munge / "seed",
            "log-file": self.root / "log" / "munged.log",
        }
        # --force: temporary folders stand under one that others may write to
        self._spawn(
            "munged",
            ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in options.items())],
        )
        probe = ("munge", "--no-input", f"--socket={munge / 'socket'}")
        self.wait_until(lambda: self._succeeds(*probe), timeout_s, "munged to answer")

    def _start_slurmd(self, node: str) -> None:
        self._spawn(node, [*_namespace_command(), "bash", str(self.root / "etc" / "node.sh"), node])

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon that the kernel kills when this process dies, however it dies."""
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _succeeds(self, *command: str) -> bool:
        try:
            self.run(*command, timeout_s=10)
        except (SlurmError, subprocess.TimeoutExpired):
            return False
        return True


def _fields(line: str) -> dict[str, str]:
    """`A=1 B=two words C:D=3` as a dict: a field goes to the next ` NAME=`."""
    return dict(re.findall(r"([\w:/]+)=(.*?)(?=\s+[\w:/]+=|\s*$)", line))
