"""SIGKILL of one rank at each step and in each file of a checkpoint: the last weights are the same bits.

    python -m benchmarks.kill_everywhere                  # 20 steps; 3 writes of each file
    python -m benchmarks.kill_everywhere --short          # some of them
    python -m benchmarks.kill_everywhere --every-write    # each of some thousand writes: hours

Two CPU ranks train a small COOKIE for 20 steps with a checkpoint every 3. In each case one rank is killed, at
a step or at the first, the middle or the last write of a file, and the other with it; then the run is started
again to its end. model.safetensors must be that of a run without a kill; exits with 1 when one is not.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.training_ranks import STEPS, prepare_environment, recipe, start
from tests.training_case import logs, write_corpus

EVERY_STEPS = 3
RANKS = 2


@dataclass(frozen=True)
class Case:
    """Where which rank is killed."""

    kind: str  # of the table's row
    rank: int
    option: str  # of tests.training_case
    number: int


def weights_hash(directory: Path) -> str:
    return hashlib.sha256((directory / "out/model.safetensors").read_bytes()).hexdigest()


def writes_of_a_checkpoint(directory: Path, corpus: Path, values: dict[str, Any]) -> list[list[range]]:
    """By rank, for each file of the second checkpoint: the numbers of its writes, in a run without a kill."""
    codes = start(directory, corpus, values, RANKS, count_writes=1)
    assert codes == [0] * RANKS, logs(directory)
    found = []
    for rank in range(RANKS):
        written: dict[str, list[int]] = {}
        for number, name in enumerate((directory / f"writes_{rank}.txt").read_text().splitlines(), start=1):
            written.setdefault(name, []).append(number)
        wanted = [n for n in written if f"step_{2 * EVERY_STEPS:08d}" in n]
        found.append([range(written[name][0], written[name][-1] + 1) for name in wanted])
    return found


def cases(files: list[list[range]], options: argparse.Namespace) -> list[Case]:
    steps = range(1, STEPS + 1, 7 if options.short else 1)
    made = [Case("a step", step % RANKS, "kill_step", step) for step in steps]
    for rank, ranges in enumerate(files):
        for numbers in ranges[:: max(1, len(ranges) // 3) if options.short else 1]:
            middle = numbers[len(numbers) // 2]
            chosen = {middle} if options.short else {numbers[0], middle, numbers[-1]}
            for number in sorted(numbers if options.every_write else chosen):
                made.append(Case(f"a write of rank {rank}", rank, "kill_write", number))
    return made


def try_case(case: Case, directory: Path, corpus: Path, values: dict[str, Any]) -> tuple[bool, str | None]:
    """Whether the rank was killed, and the hash of the weights at the end; None when the run did not end."""
    codes = start(directory, corpus, values, RANKS, kill_rank=case.rank, **{case.option: case.number})
    killed = codes[case.rank] == -9
    if start(directory, corpus, values, RANKS) != [0] * RANKS:
        print(logs(directory)[-3000:], file=sys.stderr)
        return killed, None
    return killed, weights_hash(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="zero2_fp32", help="of ds_configs/")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--every-write", action="store_true")
    parser.add_argument("--foreground", action="store_true", help="checkpoint.background: false")
    options = parser.parse_args()
    prepare_environment()
    checkpoint = {"every_steps": EVERY_STEPS, "background": not options.foreground}
    values = recipe(options.config, checkpoint=checkpoint)
    rows: dict[str, list[int]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "shard/out", {"train": 40})
        straight = Path(folder) / "straight"
        writes = writes_of_a_checkpoint(straight, corpus, values)
        expected = weights_hash(straight)
        chosen = cases(writes, options)
        for number, case in enumerate(track(chosen, "kills", console=Console(stderr=True))):
            killed, found = try_case(case, Path(folder) / f"case{number}", corpus, values)
            row = rows.setdefault(case.kind, [0, 0])
            row[0] += killed
            row[1] += killed and found == expected
            if not killed or found != expected:
                print(f"{case}: killed {killed}, weights {found}, expected {expected}", file=sys.stderr)
    print(
        f"{options.config}, {RANKS} ranks, checkpoints {'awaited' if options.foreground else 'in background'}"
    )
    print(f"{'killed at':24} {'tried':>6} {'survived, same bits':>20}")
    for kind, (tried, survived) in rows.items():
        print(f"{kind:24} {tried:6} {survived:20}")
    tried, survived = (sum(row[i] for row in rows.values()) for i in (0, 1))
    print(f"{'all':24} {tried:6} {survived:20}   in {time.monotonic() - began:.0f} s")
    sys.exit(0 if tried == survived > 0 else 1)


if __name__ == "__main__":
    main()
