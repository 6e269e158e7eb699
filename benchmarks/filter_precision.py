"""How well the demo's filter finds the right pairs without the truth, over seeds of the click model.

`python -m benchmarks.filter_precision [--seeds 1 2 3 4 5]` builds the click log of each seed, judges
it by the rules of the demo, and prints the share of right pairs before and after,
and the recall. The demo itself uses seed 7, which is none of these.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.log.click_log import read_click_log
from data_tools.log.engines import EngineOptions, open_engine
from data_tools.log.listed_words import WordLists, read_listed_words
from data_tools.log.rules import FilterRules, judge
from demo.click_model import ClickModel
from demo.corpus import COLUMNS, HERE, make_pages, make_rows, read_concepts, read_drawings


def measure(seed: int, rules: FilterRules) -> dict[str, float]:
    """Rows, kept rows, the share of right ones before and among the kept (precision), and their recall."""
    concepts, drawings = read_concepts(None)
    rng = np.random.default_rng(seed)
    pages = make_pages(concepts, drawings, read_drawings(), rng)
    rows, truth = make_rows(pages, concepts, ClickModel(), rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "click_log.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        with open_engine("duckdb", Path(folder) / "scratch", EngineOptions(threads=2)) as engine:
            judged = engine.connection.to_pyarrow(judge(read_click_log(path, engine).table, rules))
    kept: set[tuple[str, str]] = set()
    for query, url, reason in zip(judged["query"], judged["url"], judged["reason"], strict=True):
        if reason.as_py() is None:
            kept.add((query.as_py(), url.as_py()))
    return scores(
        pa.array([row[2] for row in truth]).to_pylist(), [(row[0], row[1]) in kept for row in truth]
    )


def scores(right: list[bool], kept: list[bool]) -> dict[str, float]:
    both = sum(r and k for r, k in zip(right, kept, strict=True))
    return {
        "rows": len(right),
        "kept": sum(kept),
        "right before": sum(right) / len(right),
        "precision": both / sum(kept),
        "recall": both / sum(right),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filter_precision", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    rules = FilterRules(
        best_per_query=6,
        listed_words=WordLists.of_all(read_listed_words(HERE / "corpus" / "listed_words.txt")),
    )
    print(f"{'seed':>4}  {'rows':>7}  {'kept':>7}  {'right before':>12}  {'precision':>9}  {'recall':>6}")
    for seed in parser.parse_args().seeds:
        found = measure(seed, rules)
        print(
            f"{seed:>4}  {found['rows']:>7,}  {found['kept']:>7,}  {found['right before']:>12.4f}"
            f"  {found['precision']:>9.4f}  {found['recall']:>6.4f}"
        )


if __name__ == "__main__":
    main()
