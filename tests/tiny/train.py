"""A distributed stage: adds its input up step by step, with checkpoints, and fails as it is told to."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped


class Schedule(Frozen):
    name: Literal["step", "cosine"] = "step"
    warmup: float = Field(default=0.0, ge=0, le=1)


class Config(StageConfig):
    roles: ClassVar[tuple[str, ...]] = ("numbers",)
    optional_roles: ClassVar[tuple[str, ...]] = ("weights",)
    distributed: ClassVar[bool] = True

    kind: str = "tests.tiny.train"
    epochs: int = Field(2, ge=1)
    step_s: float = 0.0
    schedule: Schedule = Schedule()
    losses: dict[str, float] = Field(default_factory=dict)
    fail: Literal["crash", "kill", "user", "disk", "exit", "value", "stall"] | None = None
    fail_rank: int = 0
    fail_step: int = 1
    fail_times: int = 1
    ranks: int | None = None

    def ranks_wanted(self) -> int | None:
        return self.ranks


def run(config: Config, job: Job) -> Report:
    rank = int(os.environ.get("RANK", "0"))
    numbers = [int(line) for line in (job.inputs["numbers"] / "out" / "numbers.txt").read_text().split()]
    saved = job.checkpoints / f"rank{rank}.txt"
    step, total = map(int, saved.read_text().split()) if saved.exists() else (0, 0)
    print(f"rank {rank} starts at step {step}")
    job.tracker.params({"tiny": {"world": os.environ.get("WORLD_SIZE", "1")}})
    job.tracker.rewind(step)
    steps = config.epochs * len(numbers)
    failures = job.checkpoints / "failed"  # a character a failure
    failed = failures.exists() and len(failures.read_text()) >= config.fail_times
    with job.progress.task("train", steps) as task:
        task.advance(step)
        while step < steps:
            if job.should_stop():
                raise Stopped(f"at step {step}")
            total += numbers[step % len(numbers)]
            step += 1
            time.sleep(config.step_s)
            if config.fail and step == config.fail_step and not failed:
                if rank == config.fail_rank:
                    with failures.open("a") as stream:
                        stream.write("x")
                    _fail(config.fail, job)
                time.sleep(60)  # as a rank in a collective waits for the one that failed
            _save(saved, f"{step} {total}")
            job.tracker.metrics(
                {"loss/total": 1.0 / step, "train/samples_per_s": 10.0, "val/i2t_r@1": 1.0}, step
            )
            task.advance(1, loss=1.0 / step)
    if rank == 0:
        _wait_for_all(job, steps)
        (job.out / "total.txt").write_text(str(total))
    return Report({"steps": step}, {"eval/tiny/i2t_r@1": float(total), "eval/tiny/chance_i2t_r@1": 0.1})


def _wait_for_all(job: Job, steps: int) -> None:
    """As a last collective does."""
    waiting = set(range(int(os.environ.get("WORLD_SIZE", "1"))))
    while waiting:
        if job.should_stop():
            raise Stopped("at the end")
        for rank in list(waiting):
            saved = job.checkpoints / f"rank{rank}.txt"
            if saved.exists() and saved.read_text().split()[0] == str(steps):
                waiting.remove(rank)
        time.sleep(0.01)


def _save(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def _fail(how: str, job: Job) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "user":
        raise StageError("stages.train.data: shard.tar is damaged; make it again")
    if how == "value":
        raise ValueError("queue: 7 is not a multiple of 4")
    if how == "disk":
        try:
            Path("/dev/full").write_bytes(b"x")  # a real ENOSPC
        except OSError as error:
            assert error.errno == errno.ENOSPC
            raise RuntimeError("writer failed") from error
    if how == "stall":
        job.stalled(0, "on host here stands still in phase 'load' of step 1")
    if how == "exit":
        os._exit(9)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (job.checkpoints / "child.pid").write_text(str(child.pid))
    raise RuntimeError("the loss is not finite")
