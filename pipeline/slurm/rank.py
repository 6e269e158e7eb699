"""One task of srun: a rank of a stage. `python -m pipeline.slurm.rank <arguments of pipeline.worker>`.

Rank and place come from SLURM's variables, the rendezvous from slurm/stage.sbatch. A rank that stopped as
it was asked to ends with 0, so that srun lets the others save too; log/stopped.json says what it was.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import logs, worker
from pipeline.launch import environment
from pipeline.mlflow_follow import Follower, tracking_uri
from pipeline.recipe import load_head
from pipeline.runner import refresh_report
from pipeline.slurm.attempt import Start, note_stopped

DIRECTORY = "TANDEM_STAGE_DIRECTORY"


def ranks(slurm: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed and the worker read, from what srun gives each task."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": slurm.get("SLURM_NTASKS_PER_NODE", slurm["SLURM_NTASKS"]).partition("(")[0],
    }


def main(arguments: Sequence[str]) -> int:
    """Run the worker as this rank; its output goes to the rank's log. Returns the exit code."""
    options = worker.arguments(arguments)
    own = ranks(os.environ)
    rank, directory = int(own["RANK"]), Path(os.environ[DIRECTORY])
    head, _ = load_head(options.recipe, options.overrides)
    os.environ.update(own | environment(head.launch.threads_per_process, int(own["WORLD_SIZE"]) > 1))
    _log_to(directory, rank, options.task)
    if rank != 0 or options.task is not None:
        return _as_srun_sees_it(worker.main(arguments))
    follower = Follower(
        tracking_uri(head.tracking, options.root),
        head.tracking.experiment,
        options.root / head.name,
        lambda text: print(text, flush=True),
    )
    follower.follow(directory)
    try:
        code = worker.main(arguments)
        if code == worker.STOPPED:
            note_stopped(directory, Start.of(os.environ), "stopped as it was asked to, and saved")
        elif code == worker.DONE and (head.stages[options.stage] or {}).get("kind") == "evaluate":
            print(f"report: {refresh_report(options.recipe, options.root, options.overrides)}", flush=True)
    finally:
        follower.finish()
    return _as_srun_sees_it(code)


def _as_srun_sees_it(code: int) -> int:
    return worker.DONE if code == worker.STOPPED else code


def _log_to(directory: Path, rank: int, task: int | None) -> None:
    """From here on all output of this process and of those that it starts goes to the log."""
    path = logs.log_path(directory, rank) if task is None else directory / "log" / f"task{task}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = Start.of(os.environ)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"-- job {start.job}, start {start.restart}, rank {rank}\n")
        stream.flush()
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


if __name__ == "__main__":
    worker.leave(main(sys.argv[1:]))
