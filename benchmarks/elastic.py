"""2 → 1 → 4 → 2 ranks with kills between, ZeRO 2 → 3: the same samples, pixels, texts; losses to 1e-4.

    python -m benchmarks.elastic

A small COOKIE in fp32 without dropout, batch normalisation over all ranks, 20 steps of 8 samples in 4 epochs,
a checkpoint every 3. Each run is compared, step by step, with one on 2 ranks that nothing interrupted and
that has the ZeRO stage it begins with: without any interruption ZeRO-3's losses part from ZeRO-2's by up to
1.1e-4 here, as their rounding differs. Exits with 1 when a sample is not there once an epoch, a pixel or a
token differs, or a loss differs by more.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.training_ranks import BATCH, EPOCHS, SAMPLES, STEPS, prepare_environment, recipe, start
from tests.training_case import SAME_ON_ANY_RANKS, Row, logs, read_ledger, write_corpus

TOLERANCE = 1e-4  # of a loss
Part = tuple[
    int, str, int | None
]  # ranks, DeepSpeed config, step of this start before which rank 0 is killed

RUNS: dict[str, list[Part]] = {
    "2 → 1 → 4 → 2 ranks": [
        (2, "zero2_fp32", 8),
        (1, "zero2_fp32", 6),
        (4, "zero2_fp32", 7),
        (2, "zero2_fp32", None),
    ],
    "ZeRO 2 → 3": [(2, "zero2_fp32", 11), (2, "zero3_fp32", None)],
    "ZeRO 3, 2 → 4, ZeRO 0": [(2, "zero3_fp32", 9), (4, "zero0_fp32", None)],
}


def train(directory: Path, corpus: Path, parts: list[Part]) -> dict[int, Row]:
    """Run the parts one after another in one directory; the ledger. Raises RuntimeError when one does not."""
    for ranks, config, kill_step in parts:
        values = recipe(config, model=SAME_ON_ANY_RANKS, checkpoint={"every_steps": 3})
        kill = {} if kill_step is None else {"kill_step": kill_step}
        codes = start(directory, corpus, values, ranks, ledger=1, **kill)
        if (codes[0] != -9) if kill else any(codes):
            raise RuntimeError(f"{ranks} ranks, {config}: exit codes {codes}\n{logs(directory)[-3000:]}")
    return read_ledger(directory)


def once_an_epoch(ledger: dict[int, Row]) -> bool:
    """Whether every sample is there exactly once in each epoch."""
    per_epoch = SAMPLES // BATCH
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        seen = Counter(key for step in steps for key in ledger[step].keys)
        if len(seen) != SAMPLES or set(seen.values()) != {1}:
            return False
    return True


def main() -> None:
    prepare_environment()
    failed = False
    titles = f"{'starts':>6} {'steps':>6} {'once an epoch':>14} {'read the same':>14} {'largest Δloss':>14}"
    print(f"{'run':24} {titles}")
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "shard/out", {"train": SAMPLES})
        straight = {
            config: train(Path(folder) / config, corpus, [(2, config, None)])
            for config in dict.fromkeys(parts[0][1] for parts in RUNS.values())
        }
        for number, (name, parts) in enumerate(RUNS.items()):
            expected = straight[parts[0][1]]
            assert set(expected) == set(range(1, STEPS + 1))
            told = train(Path(folder) / f"run{number}", corpus, parts)
            whole = set(told) == set(expected) and once_an_epoch(told)
            same = whole and all(
                (told[s].keys, told[s].pixels, told[s].texts) == (row.keys, row.pixels, row.texts)
                for s, row in expected.items()
            )
            losses = ((told[s].loss, row.loss) for s, row in expected.items() if s in told)
            apart = max(abs(mine - theirs) for mine, theirs in losses)
            failed |= not (whole and same and apart <= TOLERANCE)
            print(f"{name:24} {len(parts):6} {len(told):6} {whole!s:>14} {same!s:>14} {apart:14.1e}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
