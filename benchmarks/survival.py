"""What a run survives, with real processes: a frozen rank, a hung loader, a sample of no numbers, the clock.

python -m benchmarks.survival --limit 10
"""

import argparse
import json
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from learning.training.deadline import LEAVE_S
from learning.training.watchdog import read_heartbeat
from tests.survival_case import clip_values, end, start, wait_for_step
from tests.training_case import logs, write_corpus

Row = tuple[str, str, str]


def frozen_rank(place: Path, corpus: Path, limit_s: float) -> Row:
    """SIGSTOP to rank 1 in step 3 or later: the others name it, and end."""
    values = clip_values(epochs=10_000, stall_limit_s=limit_s, checkpoint={"every_steps": 100_000})
    processes = start(place, corpus, values, step_s=0.2)
    try:
        wait_for_step(place, rank=1, step=3)
        processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = processes[0].wait(10 * limit_s + 60)
        took_s = time.monotonic() - began
    finally:
        end(processes, timeout_s=0)
    return "rank 1 frozen (SIGSTOP)", f"{_named(place)}, exit {code}", f"{took_s:.1f} s (limit {limit_s:g} s)"


def hung_loader(place: Path, corpus: Path, limit_s: float) -> Row:
    """Rank 1 reads the batch of step 5 for ever."""
    values = clip_values(epochs=10_000, stall_limit_s=limit_s, checkpoint={"every_steps": 100_000})
    processes = start(place, corpus, values, step_s=0.2, hang_step=5)
    while all(process.poll() is None for process in processes):
        beat = read_heartbeat(place / "log", 1)
        if beat is not None and (beat.place.phase, beat.place.step) == ("load", 5):
            break
        time.sleep(0.05)
    began = time.monotonic()
    while all(process.poll() is None for process in processes):
        time.sleep(0.05)
    took_s = time.monotonic() - began
    codes = [code for code in end(processes) if code == 76]
    return (
        "rank 1 reads for ever",
        f"{_named(place)}, exit {codes[0]}",
        f"{took_s:.1f} s (limit {limit_s:g} s)",
    )


def sample_of_no_numbers(place: Path, corpus: Path, limit_s: float) -> Row:
    """One sample's pixels are NaN: found, left out, and the run comes to its end."""
    began = time.monotonic()
    processes = start(place, corpus, clip_values(epochs=4, log_every_steps=100), nan_key="train0003")
    codes = end(processes)
    took_s = time.monotonic() - began
    counts = json.loads((place / "told.json").read_text())["counts"]
    newest = max((place / "checkpoints").glob("step_*"))
    left_out = json.loads((newest / "position.json").read_text())["left_out"]
    told = f"left out {', '.join(left_out)} after {counts['rewinds']} rewind, exit {codes[0]}"
    return "train0003 is NaN", told, f"{counts['steps']} steps, {took_s:.1f} s"


def stop_by_the_clock(place: Path, corpus: Path, limit_s: float) -> Row:
    """Rank 1 alone knows when to stop: both save the same step, and end before that time."""
    budget_s = limit_s + LEAVE_S
    values = clip_values(epochs=10_000, checkpoint={"every_steps": 100_000})
    processes = start(place, corpus, values, step_s=0.2, stop_in=budget_s)
    wait_for_step(place, rank=1, step=1)
    began = time.monotonic()
    codes = end(processes)
    took_s = time.monotonic() - began
    return "stop by the clock", f"{_stopped(place)}, exit {codes}", f"{took_s:.1f} s of {budget_s:g} s"


def stop_by_a_signal(place: Path, corpus: Path, limit_s: float) -> Row:
    """USR2 to rank 1 alone."""
    values = clip_values(epochs=10_000, checkpoint={"every_steps": 100_000})
    processes = start(place, corpus, values, step_s=0.2)
    wait_for_step(place, rank=1, step=3)
    processes[1].send_signal(signal.SIGUSR2)
    began = time.monotonic()
    codes = end(processes)
    return "USR2 to rank 1 alone", f"{_stopped(place)}, exit {codes}", f"{time.monotonic() - began:.1f} s"


def _named(place: Path) -> str:
    found = re.search(r"error: (rank \d+): on host \S+ .*?phase '(.*?)' of step (\d+)", logs(place))
    return "nobody was named" if found is None else f"{found[1]} named in '{found[2]}' of step {found[3]}"


def _stopped(place: Path) -> str:
    texts = [(place / f"test_rank{rank}.log").read_text() for rank in range(2)]
    steps = [text.rpartition("stopped after step ")[2].split(";")[0] for text in texts]
    return f"ranks stopped after steps {' and '.join(steps)}"


CASES: tuple[Callable[[Path, Path, float], Row], ...] = (
    frozen_rank,
    hung_loader,
    sample_of_no_numbers,
    stop_by_the_clock,
    stop_by_a_signal,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=10.0, help="stall_limit_s, and the clock's budget")
    parser.add_argument("--only", choices=[case.__name__ for case in CASES])
    options = parser.parse_args()
    print(f"{'what happens (2 ranks)':<26}{'what the run does':<62}time")
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "shard/out", {"train": 19})
        for case in CASES:
            if options.only in (None, case.__name__):
                happens, does, took = case(Path(folder) / case.__name__, corpus, options.limit)
                print(f"{happens:<26}{does:<62}{took}", flush=True)


if __name__ == "__main__":
    main()
