"""Runs a function on several gloo ranks of this machine, within a bounded time; returns what each gave.

The ranks are forks of a server that has imported the libraries once: seconds a rank are saved. It is started
without any of the test's own state, so a rank is as a new process, with the test's environment and directory.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIBRARIES = ["torch", "deepspeed", "timm", "transformers", "transformers.models.bert", "accelerate"]


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` new processes joined by gloo.

    `fn` is a module-level function, and `args` can be pickled. What it returns (tensors, numbers, strings,
    lists, dicts) comes back in rank order. Raises AssertionError with the traceback of the first rank that
    failed, and TimeoutError after `timeout_s`; no process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    here = (dict(os.environ), str(Path.cwd()))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ranks = [
            context.Process(
                target=_rank, args=(fn, rank, world_size, place, timeout_s, here, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, place, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(place / f"{rank}.result", weights_only=True) for rank in range(world_size)]


def _wait(ranks: list[Any], place: Path, deadline: float, timeout_s: float) -> None:
    while True:
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed:
            codes = [process.exitcode for process in ranks]
            told = sorted(place.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)  # the cause first
            text = told[0].read_text(encoding="utf-8") if told else "(no traceback)"
            rank = told[0].stem if told else failed[0]
            raise AssertionError(f"rank {rank} of {len(ranks)} failed, exit codes {codes}\n{text}")
        if all(process.exitcode == 0 for process in ranks):
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
            raise TimeoutError(f"ranks {alive} of {len(ranks)} still ran after {timeout_s} s")
        time.sleep(0.02)


def _rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    place: Path,
    timeout_s: float,
    here: tuple[dict[str, str], str],
    args: tuple[Any, ...],
) -> None:
    environment, directory = here
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        result = fn(rank, world_size, *args)
        torch.save(result, place / f"{rank}.result")
        dist.barrier()
    except BaseException:
        (place / f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()
