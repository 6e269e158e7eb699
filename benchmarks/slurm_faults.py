"""The demo's pipeline on a real SLURM, with a fault in each run: the model must be that of `tandem run`.

    python -m benchmarks.slurm_faults                     # the demo's recipe, made short; every fault
    python -m benchmarks.slurm_faults --only power
    python -m benchmarks.slurm_faults --whole-demo        # no fault, the recipe as it is

A private cluster on this machine (tests/slurm_cluster.py: slurmctld, slurmd, munge; GPUs are simulated, gloo
and the CPU compute). Training runs as 2 ranks on 2 nodes. Each row is one `tandem submit`, brought to its end
through one fault; it survives when every stage is done, none was done twice, and the fine-tuned model's file
has the sha256 of that of `tandem run` with 2 processes. Exits with 1 when one does not.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.slurm_cluster import SlurmCluster
from tests.slurm_desk import rank_pid

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "recipes" / "demo.yaml"
STAGES = ("filter", "crawl", "clean", "shard", "pretrain_1", "pretrain_2", "finetune", "evaluate")
SHORT = (
    "model.vision.image_px=96",
    "stages.shard.splits=[{name: unseen_concept, by: concept, share: 0.7}, "
    "{name: unseen_vendor, by: vendor, values: [noto]}, {name: val, share: 0.04}, {name: train}]",
    "stages.evaluate.galleries=[{name: val, split: val, texts: [title], relevance: concept}]",
    "stages.evaluate.unchecked=a small gallery, to be quick: its figures are nobody's",
    "stages.pretrain_1.epochs=8",
    "stages.pretrain_1.checkpoint.every_steps=5",
    "stages.pretrain_1.log_every_steps=1",
    "stages.pretrain_1.stall_limit_s=10",
    "stages.finetune.epochs=1",
)
CLUSTER = """
name: faults
train: {partition: gpu, nodes: 2, gpus_per_node: 1, cpus_per_gpu: 1, time_limit: "01:00:00"}
data: {partition: cpu, cpus: 2, time_limit: "01:00:00"}
environment: {variables: {DS_ACCELERATOR: cpu}}
save_s: 30
"""
NODES = 3


class Run:
    """One run of the pipeline on the cluster, in a root of its own."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, overrides: tuple[str, ...], tracking: str = "off"
    ):
        self.cluster, self.root = cluster, folder / "runs"
        self.overrides = (*overrides, f"tracking.uri={tracking}")
        self.cluster_file = folder / "cluster.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster_file.write_text(CLUSTER)
        self.done: dict[str, tuple[int, int]] = {}  # inode and time of each DONE.json when it was first seen
        self.twice: list[str] = []

    def tandem(self, command: str, *options: str | Path) -> str:
        arguments = [sys.executable, "-P", "-m", "pipeline.cli", command, RECIPE, "--root", self.root]
        for override in self.overrides:
            arguments += ["--set", override]
        return self.cluster.run(*arguments, *options, timeout_s=1800, environment={"OMP_NUM_THREADS": "1"})

    def submit(self) -> None:
        self.tandem("submit", "--cluster", self.cluster_file)

    def status(self) -> dict[str, dict[str, Any]]:
        return {row["stage"]: row for row in json.loads(self.tandem("status", "--json"))["stages"]}

    def directory(self, stage: str) -> Path | None:
        found = list((self.root / "demo" / stage).glob("*/"))
        return found[0] if found else None

    def job(self, stage: str = "pretrain_1") -> str:
        """The last one sent for the stage."""
        lines = (self.root / "demo/slurm/jobs.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line]
        return str([row["job"] for row in rows if row["stage"] == stage][-1])

    def node(self, stage: str = "pretrain_1", which: int = 0) -> str:
        names = self.cluster.job(self.job(stage))["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", names).split()[which]

    def step(self) -> int:
        """The last step of pretrain_1."""
        directory = self.directory("pretrain_1")
        try:
            lines = (directory / "log/metrics.jsonl").read_text().splitlines() if directory else []
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (OSError, ValueError, KeyError):
            return 0

    def wait_step(self, step: int) -> None:
        self._wait(lambda: self.step() >= step, 300, f"step {step} of pretrain_1")

    def wait_done(self, stage: str) -> None:
        self._wait(lambda: stage in self.done, 600, f"the end of {stage}")

    def finish(self, timeout_s: float = 900) -> None:
        """Until no job of the pipeline is left."""

        def none_left() -> bool:
            return "demo." not in self.cluster.run("squeue", "--noheader", "--format=%j")

        self._wait(none_left, timeout_s, "the end of all jobs")

    def _wait(self, there: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            self._look()
            if there():
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come\n{self.tandem('status')}")
            time.sleep(0.1)

    def _look(self) -> None:
        for stage in STAGES:
            directory = self.directory(stage)
            try:
                status = (directory / "DONE.json").stat() if directory else None
            except FileNotFoundError:
                continue
            if status is not None:
                mark = (status.st_ino, status.st_mtime_ns)
                if self.done.setdefault(stage, mark) != mark:
                    self.twice.append(stage)
                    self.done[stage] = mark

    def take(self, other: "Run", until: str) -> None:
        """The finished stages of another run, up to `until` (excluded), as hard links."""
        for stage in STAGES[: STAGES.index(until)]:
            shutil.copytree(other.root / "demo" / stage, self.root / "demo" / stage, copy_function=os.link)

    def model(self) -> str:
        directory = self.directory("finetune")
        path = directory / "out/model.safetensors" if directory else Path("none")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no model"


def preempted(run: Run) -> None:
    run.wait_step(7)
    options = ("--partition=urgent", f"--nodes={NODES}", "--gres=gpu:2")
    urgent = run.cluster.submit("sleep 3", *options)
    run.cluster.wait(urgent, timeout_s=120)


def elapsed_s(cluster: SlurmCluster, job: str) -> int:
    """For how long the job has run, as SLURM counts it against the limit."""
    clock = cluster.run("squeue", "--noheader", "--job", job, "--format=%M").strip().split(":")
    return sum(int(part) * 60**place for place, part in enumerate(reversed(clock)))


def time_limit(run: Run) -> None:
    """By the clock: the limit becomes the end of this minute; SLURM sends the signal before it."""
    run.wait_step(3)
    job = run.job()
    run._wait(lambda: elapsed_s(run.cluster, job) % 60 <= 25, 60, "a minute with enough left of it")
    minutes = elapsed_s(run.cluster, job) // 60 + 1
    run.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    run._wait(lambda: int(run.cluster.job(job)["Restarts"]) > 0, 120, "the requeue")
    run.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")


def power(run: Run) -> None:
    run.wait_step(7)
    node = run.node(which=1)
    run.cluster.cut_power(node)
    time.sleep(2)
    run.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")
    time.sleep(3)
    run.cluster.start_node(node)


def cancelled(run: Run) -> None:
    run.wait_step(7)
    run.tandem("cancel")
    run.finish()
    run.submit()


def controller(run: Run) -> None:
    run.wait_step(7)
    run.cluster.wait_saved()
    run.cluster.kill_controller()
    time.sleep(8)
    run.cluster.start_controller()


def killed(run: Run) -> None:
    run.wait_step(7)
    os.kill(rank_pid(run.job(), 1), signal.SIGKILL)


def frozen(run: Run) -> None:
    run.wait_step(7)
    os.kill(rank_pid(run.job(), 1), signal.SIGSTOP)


def read_only(run: Run) -> None:
    run.wait_step(7)
    directory = run.directory("pretrain_1")
    assert directory is not None
    checkpoints = str(directory / "checkpoints")
    subprocess.run(["chattr", "+i", checkpoints], check=True)  # root may write where modes forbid it
    try:
        run.wait_step(run.step() + 8)
    finally:
        subprocess.run(["chattr", "-i", checkpoints], check=True)


class MlflowServer:
    """A real MLflow server on 127.0.0.1, to be killed and started."""

    def __init__(self, folder: Path):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.folder, self.process = folder, self.start(folder)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, folder: Path) -> "subprocess.Popen[bytes]":
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
        with (folder / "server.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
                return process
            except OSError:
                time.sleep(0.3)
        raise TimeoutError("the MLflow server did not come up")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def tracker_down(server: MlflowServer) -> Callable[[Run], None]:
    def fault(run: Run) -> None:
        run.wait_step(7)
        server.kill()
        run.finish()
        server.process = server.start(server.folder)
        run.tandem("results")  # catches up
        _check_mlflow(server.uri, run)

    return fault


def _check_mlflow(uri: str, run: Run) -> None:
    """One MLflow run a training stage, every logged step once."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tandem")
    assert experiment is not None
    directory = run.directory("pretrain_1")
    assert directory is not None
    wanted = [json.loads(line) for line in (directory / "log/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in wanted if "loss/total" in row]
    found = []
    for one in client.search_runs([experiment.experiment_id]):
        history = client.get_metric_history(one.info.run_id, "loss/total")
        found.append(sorted(point.step for point in history))
    if found.count(sorted(steps)) != 1:
        raise AssertionError(
            f"MLflow has {[len(one) for one in found]} steps of loss/total, not {len(steps)}"
        )


def at_the_end_of(stage: str) -> Callable[[Run], None]:
    """The node of a stage loses power as the stage is done, before its job is."""

    def fault(run: Run) -> None:
        run.wait_done(stage)
        node = run.node(stage)
        run.cluster.fail_node(node)
        time.sleep(2)
        run.cluster.start_node(node)

    return fault


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="cases whose name this regular expression finds")
    parser.add_argument("--whole-demo", action="store_true")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    for module in ("demo.corpus", "demo.weights"):
        subprocess.run([sys.executable, "-m", module], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    overrides = () if options.whole_demo else SHORT
    with (
        tempfile.TemporaryDirectory() as folder,
        SlurmCluster(Path(folder) / "slurm", nodes=NODES, gpus_per_node=2) as cluster,
    ):
        sys.exit(_try_all(cluster, Path(folder), overrides, options))


def _try_all(
    cluster: SlurmCluster, folder: Path, overrides: tuple[str, ...], options: argparse.Namespace
) -> int:
    straight = Run(cluster, folder / "straight", overrides)
    began = time.monotonic()
    straight.tandem("run", "--set", "launch.processes=2", "--until", "finetune")
    expected = straight.model()
    print(f"`tandem run`, 2 processes: {time.monotonic() - began:.0f} s, model {expected[:12]}", flush=True)
    cases: dict[str, tuple[str, Callable[[Run], None]]] = {"no fault": ("filter", lambda run: None)}
    if not options.whole_demo:
        cases |= {
            "preempted by a higher partition": ("pretrain_1", preempted),
            "time limit, by the clock": ("pretrain_1", time_limit),
            "power cut of a node": ("pretrain_1", power),
            "scancel, submit again": ("pretrain_1", cancelled),
            "slurmctld killed, started": ("pretrain_1", controller),
            "a rank killed (SIGKILL)": ("pretrain_1", killed),
            "a rank frozen (SIGSTOP)": ("pretrain_1", frozen),
            "checkpoints read-only, back": ("pretrain_1", read_only),
            "MLflow server down": ("pretrain_1", tracker_down),  # type: ignore[dict-item]
        }
        cases |= {f"power cut as {stage} ends": (stage, at_the_end_of(stage)) for stage in STAGES[:-1]}
    chosen = {name: case for name, case in cases.items() if re.search(options.only or "", name)}
    survived = 0
    print(f"{'case':34} {'starts':>6} {'done once':>10} {'same model':>11} {'s':>5}")
    for number, (name, (first, fault)) in enumerate(chosen.items()):
        survived += _try(cluster, folder / f"case{number}", overrides, straight, expected, name, first, fault)
        cluster.reset()
    print(f"{survived} of {len(chosen)}")
    return int(survived != len(chosen))


def _try(
    cluster: SlurmCluster,
    folder: Path,
    overrides: tuple[str, ...],
    straight: Run,
    expected: str,
    name: str,
    first: str,
    fault: Callable[..., Any],
) -> bool:
    """One row."""
    began = time.monotonic()
    server = MlflowServer(folder / "mlflow") if fault is tracker_down else None
    run = Run(cluster, folder, overrides, "off" if server is None else server.uri)
    try:
        run.take(straight, first)
        run.submit()
        (fault if server is None else fault(server))(run)
        run.finish()
        run._look()
        rows = run.status()
        once = not run.twice and all(row["state"] == "done" for row in rows.values())
        same = run.model() == expected
        starts = rows[first]["starts"]
        print(f"{name:34} {starts:6} {once!s:>10} {same!s:>11} {time.monotonic() - began:5.0f}", flush=True)
        if not (once and same):
            print(run.tandem("status"), run.twice, file=sys.stderr)
        return once and same
    except (TimeoutError, RuntimeError, AssertionError) as error:
        print(f"{name:34} {error}", flush=True)
        return False
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(run.root, ignore_errors=True)


if __name__ == "__main__":
    main()
