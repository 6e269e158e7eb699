"""SIGKILL of one rank at each step and at each write of a checkpoint: the last weights are the same bits.

    python -m benchmarks.kill_everywhere            # 20 steps, every write of a checkpoint of each rank
    python -m benchmarks.kill_everywhere --short    # some of them

Two CPU ranks train a small COOKIE for 20 steps with a checkpoint every 3. In each case one rank is killed,
the other with it, and the run is started again to its end; model.safetensors must be that of a run without a
kill.
Exits with 1 when one is not.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def writes_of_a_checkpoint(directory: Path, corpus: Path, values: dict[str, Any]) -> list[range]:
    """By rank: the numbers of the writes of the second checkpoint, counted in a run without a kill."""
    codes = start(directory, corpus, values, RANKS, count_writes=1)
    assert codes == [0] * RANKS, logs(directory)
    found = []
    for rank in range(RANKS):
        first, second = (int(n) for n in (directory / f"writes_{rank}.txt").read_text().split()[:2])
        found.append(range(first + 1, second + 1))
    return found


def cases(writes: list[range], short: bool) -> list[Case]:
    steps = range(1, STEPS + 1, 7 if short else 1)
    made = [Case("a step", step % RANKS, "kill_step", step) for step in steps]
    for rank, numbers in enumerate(writes):
        chosen = numbers[:: max(1, len(numbers) // 3)] if short else numbers
        made += [Case(f"a write of rank {rank}", rank, "kill_write", number) for number in chosen]
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
        for number, case in enumerate(cases(writes, options.short)):
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
