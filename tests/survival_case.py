"""Training ranks that freeze, hang, or read samples that make no number: `python -m tests.survival_case …`.

The faults are put where they happen in life: into what the loader returns, into the update, or by a signal.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from learning.training.loader import Batches, Failed, Loaded, Rows
from learning.training.watchdog import Heartbeat, read_heartbeat
from tests.training_case import config_values, free_port, make_job

CLIP: dict[str, Any] = {
    "method": "clip",
    "vision": {"name": "resnet10t", "image_px": 32},
    "text": {"layers": 1, "width": 32, "heads": 2, "intermediate": 64, "max_length": 12},
    "dimension": 16,
}


def clip_values(**changed: Any) -> dict[str, Any]:
    """A short training's config: two steps an epoch of 19 samples, a checkpoint every two steps."""
    return config_values(**{"model": CLIP, "losses": {"ccl": 1.0}} | changed)


def break_pixels(keys: Sequence[str]) -> None:
    """From now on these samples' pixels are no numbers, in every batch that has them."""
    joined = Batches.joined

    def joined_with_nan(self: Batches, parts: Sequence[Rows | Failed]) -> Loaded | Failed:
        loaded = joined(self, parts)
        if isinstance(loaded, Loaded):
            rows = [row for row, key in enumerate(loaded.batch.keys) if key in keys]
            for images in loaded.batch.images.values():
                images[rows] = float("nan")
        return loaded

    Batches.joined = joined_with_nan  # type: ignore[method-assign]


def slow_down(step_s: float, hang_step: int | None = None) -> None:
    """Each batch takes `step_s` seconds to read, and that of `hang_step` for ever."""
    rows = Batches.rows

    def slowly(self: Batches, step: int, part: int, parts: int) -> Rows | Failed:
        time.sleep(3600.0 if step + 1 == hang_step else step_s)
        return rows(self, step, part, parts)

    Batches.rows = slowly  # type: ignore[method-assign]


def start(
    directory: Path, corpus: Path, values: Mapping[str, Any], ranks: int = 2, **options: Any
) -> list[subprocess.Popen[bytes]]:
    """Start `ranks` processes that train; their output is in test_rank<r>.log."""
    directory.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    command = [sys.executable, "-m", "tests.survival_case", str(directory), str(corpus), json.dumps(values)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    processes = []
    for rank in map(str, range(ranks)):
        environment = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with (directory / f"test_rank{rank}.log").open("a") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=Path(__file__).parents[1],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def end(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float = 800.0) -> list[int | None]:
    """Wait; what still runs after one failed (or after the timeout) is killed. The exit codes before that."""
    deadline, codes = time.monotonic() + timeout_s, [process.poll() for process in processes]
    while any(code is None for code in codes) and time.monotonic() < deadline:
        if any(code not in (None, 0) for code in codes):
            deadline = min(deadline, time.monotonic() + 10.0)  # all may be on their way out together
        time.sleep(0.1)
        codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes


def wait_for_step(directory: Path, rank: int, step: int, timeout_s: float = 600.0) -> Heartbeat:
    """The heartbeat of a rank once it is in that step or later."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        beat = read_heartbeat(directory / "log", rank)
        if beat is not None and beat.place.step >= step:
            return beat
        time.sleep(0.05)
    raise TimeoutError(f"{directory}: rank {rank} was not in step {step} after {timeout_s} s")


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("config")
    parser.add_argument("--nan-key", action="append", default=[], help="its pixels are no numbers")
    parser.add_argument("--step-s", type=float, help="seconds that a batch takes to read")
    parser.add_argument("--hang-step", type=int, help="rank 1 reads its batch for ever")
    parser.add_argument("--stop-in", type=float, help="seconds from the first step; rank 1 alone is told")
    parser.add_argument("--kill-step", type=int, help="SIGKILL rank 0 before its batch of this step is used")
    options = parser.parse_args()
    import logging

    from pipeline.worker import StopFlag
    from stages import training_run
    from stages.base import StageError, Stopped
    from stages.pretrain import Config, run

    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if options.nan_key:
        break_pixels(options.nan_key)
    if options.step_s is not None:
        slow_down(options.step_s, options.hang_step if rank == 1 else None)
    if options.stop_in is not None and rank == 1:
        fit = training_run.fit

        def fit_until(engine: Any, batches: Any, plan: Any, *rest: Any) -> Any:
            return fit(engine, batches, replace(plan, stop_at=time.time() + options.stop_in), *rest)

        training_run.fit = fit_until
    if options.kill_step is not None and rank == 0:
        _kill_at(options.kill_step)
    job = make_job(options.directory, options.corpus)
    job.should_stop = StopFlag().install()
    try:
        report = run(Config(**json.loads(options.config)), job)
    except Stopped as stopped:
        print("stopped", stopped, flush=True)
        sys.exit(75)
    except StageError as error:
        print("error:", error, flush=True)
        sys.exit(2)
    if rank == 0:
        told = {"metrics": report.metrics, "counts": report.counts, "rows": job.tracker.rows}  # type: ignore[attr-defined]
        (options.directory / "told.json").write_text(json.dumps(told))


def _kill_at(step: int) -> None:
    from learning.training.engine import Engine

    taken, stepped = [0], Engine.step

    def step_or_die(self: Engine, *args: Any, **kwargs: Any) -> Any:
        taken[0] += 1
        if taken[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return stepped(self, *args, **kwargs)

    Engine.step = step_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
