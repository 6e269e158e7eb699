"""DuckDB and Spark on the same logs: the same bytes, and how much longer Spark takes on one machine.

`python -m benchmarks.engines_parity [--rows 5000000] [--folder DIR]` filters the demo's log, a hostile one of
ties, nulls, emoji and odd texts (tests.hostile_log), and a made one of --rows rows, each by both engines,
compares the SHA-256 of pairs, dropped rows and measures, and prints the ratio of the times. It ends with 1
when any differs.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.made_log import write_log
from demo import corpus
from stages.filter import Config, run
from tests.data_helpers import make_job
from tests.hostile_log import write_hostile_log


def filtered(engine: str, place: Path, config: dict[str, Any]) -> tuple[float, dict[str, str], int]:
    """Seconds, the SHA-256 of each file, and how many rows were kept."""
    job = make_job(place / engine)
    began = time.perf_counter()
    report = run(Config(engine=engine, memory_limit="3GB", **config), job)
    seconds = time.perf_counter() - began
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(job.out.glob("*.parquet"))}
    return seconds, hashes, report.counts["kept"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines_parity", description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder)
        corpus.build(place / "demo", seed=7, limit=None)
        write_hostile_log(place / "hostile", 50_000, seed=8)
        write_log(place / "made", options.rows)
        listed = corpus.HERE / "corpus" / "listed_words.txt"
        hostile = {"listed_words": place / "words.txt", "ctr_bound": "wilson", "min_ctr": 0.07, "min_show": 1}
        logs: dict[str, dict[str, Any]] = {
            "demo": {
                "click_log": place / "demo" / "click_log.csv",
                "listed_words": listed,
                "best_per_query": 6,
            },
            "hostile": {"click_log": place / "hostile", "subset": {"share": 0.5}, "min_words": 1, **hostile},
            "made": {"click_log": place / "made", "subset": {"share": 0.1}},
        }
        print(
            f"{'log':>8} {'kept':>10} {'same':>5} {'Spark / DuckDB':>14}  SHA-256 of pairs, dropped, measures"
        )
        same = True
        for name, config in logs.items():
            ours, hashes, kept = filtered("duckdb", place / f"{name}-out", config)
            theirs, others, _ = filtered("spark", place / f"{name}-out", config)
            same = same and hashes == others
            short = " ".join(hashes[f"{file}.parquet"][:12] for file in ("pairs", "dropped", "measures"))
            print(
                f"{name:>8} {kept:>10,} {hashes == others!s:>5} {theirs / ours:>14.1f}  {short}", flush=True
            )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
