"""Starts the ranks of a small training as processes to be killed, out of one that has imported everything.

A start costs what a fork does in place of ten seconds of imports, so that hundreds of kills can be tried.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.training_case import CONFIGS, config_values, free_port, main

SAMPLES, BATCH, EPOCHS = 40, 8, 4
STEPS = SAMPLES // BATCH * EPOCHS


def recipe(deepspeed: str, **changed: Any) -> dict[str, Any]:
    """The config of a training of `STEPS` steps; `deepspeed`: a name in ds_configs/."""
    values = {"deepspeed": str(CONFIGS / f"{deepspeed}.json"), "contrastive_batch": BATCH, "epochs": EPOCHS}
    return config_values(**values | changed)


def start(directory: Path, corpus: Path, values: Mapping[str, Any], ranks: int, **options: Any) -> list[int]:
    """Train to the end, or until a rank dies: the others are killed then. Exit codes by rank.

    `options`: those of tests.training_case, say kill_step=3.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "stages.pretrain", "tests.training_case"])
    arguments = [str(directory), str(corpus), json.dumps(dict(values))]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, directory, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                deadline = time.monotonic() + 3  # all may be on their way out together
                for process in processes:
                    process.join(max(0.0, deadline - time.monotonic()))
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]


def _rank(rank: int, ranks: int, port: int, directory: Path, arguments: list[str]) -> None:
    with (directory / f"test_rank{rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.argv = ["training_case", *arguments]
    main()


def prepare_environment() -> None:
    """Before the first `start`: the process that forks the ranks inherits it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
