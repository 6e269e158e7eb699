"""Rows of a paper's ablation on the demo corpus: equal steps, several seeds, mean ± standard deviation.

A program names a recipe and what each row changes of it (`Ablation`). Its data stages run once; then each row
and seed is pre-trained and evaluated with one process of one thread, two at a time. Metrics are of the last
weights, so that no row is picked by its luck. The folder keeps what is done: run again, it goes on.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from demo.corpus import HERE
from pipeline.recipe import load
from pipeline.recipe_source import read

ROOT = HERE.parent
TRAINING = ("pretrain", "finetune", "evaluate")  # kinds; all other stages make the data
SHARED = ("demo", "ds_configs")  # that a recipe names by paths beside its own folder


@dataclass(frozen=True)
class Ablation:
    """`rows`: what each changes of the recipe's values, level by level; a null leaves a loss or stage out."""

    recipe: str  # in recipes/, with the stages `pretrain` and `evaluate`
    rows: Mapping[str, Mapping[str, Any]]
    table: Sequence[str]  # rows that run when none is named
    shown: Sequence[str]  # metrics, without eval/
    always: Mapping[str, Any] = field(default_factory=dict)  # for every row
    upstream: Sequence[str] = ()  # training stages before `pretrain` that run once, for all rows and seeds

    def values(self, row: str, seed: int, epochs: int | None) -> dict[str, Any]:
        """The recipe of a row and a seed, as one file's values."""
        values = copy.deepcopy(read(ROOT / "recipes" / f"{self.recipe}.yaml").values)
        values["stages"] = {
            name: stage
            for name, stage in values["stages"].items()
            if stage["kind"] not in TRAINING or name in (*self.upstream, "pretrain", "evaluate")
        }
        pretrain, evaluate = values["stages"]["pretrain"], values["stages"]["evaluate"]
        pretrain.pop("validate", None)
        pretrain.pop("pick_best", None)
        evaluate["inputs"]["weights"] = "pretrain"  # no fine-tuning: equal steps
        evaluate["examples"] = 0
        pretrain["model"] = values.pop("model")
        for change in (self.always, self.rows[row]):
            _merge(values, change)
        pretrain["epochs"] = epochs or pretrain["epochs"]
        pretrain["seed"] = seed
        launch = {"processes": 1, "threads_per_process": 1}
        return values | {"name": f"{row}_{seed}", "reuse": [data_name(self.recipe)], "launch": launch}


def data_name(recipe: str) -> str:
    return f"{recipe}_data"


class Folder:
    """Where an ablation's recipes, runs and logs stand."""

    def __init__(self, path: Path, root: Path | None = None):
        """`root`: the run directory, where it is another folder's."""
        self.path, self.root = path, root or path / "runs"
        (path / "recipes").mkdir(parents=True, exist_ok=True)
        for name in SHARED:
            if not (path / name).exists():
                (path / name).symlink_to(ROOT / name)

    def write(self, values: Mapping[str, Any]) -> Path:
        """A recipe, checked: a mistake is told before hours are spent."""
        path = self.path / "recipes" / f"{values['name']}.yaml"
        path.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
        load(path)
        return path

    def run(self, recipe: Path) -> None:
        """`tandem run` to its end; its words go to a log."""
        words = [sys.executable, "-m", "pipeline.cli", "run", str(recipe), "--root", str(self.root)]
        with (self.path / f"{recipe.stem}.log").open("w", encoding="utf-8") as log:
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    def out_of(self, recipe: str, stage: str) -> Path:
        """The newest out/ of a stage."""
        done = (self.root / recipe / stage).glob("*/DONE.json")
        return max(done, key=lambda path: path.stat().st_mtime).parent / "out"


def make_data(folder: Folder, ablation: Ablation) -> None:
    """The demo's inputs and the recipe's data stages."""
    for module in ("demo.corpus", "demo.weights"):
        subprocess.run([sys.executable, "-m", module], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    values = ablation.values(ablation.table[0], 0, None)
    for name in ("pretrain", "evaluate"):
        values["stages"].pop(name)
    folder.run(folder.write({**values, "name": data_name(ablation.recipe), "reuse": []}))


def tower_tokens(folder: Folder, values: dict[str, Any]) -> Path | None:
    """What a frozen tower gives, where the recipe keeps it: made once, by two processes, for all runs."""
    if values["stages"]["pretrain"].get("data", {}).get("cache") != "tokens":
        return None
    made = folder.path / "tokens"
    if not made.exists():
        fill = {**values, "name": "tokens_alone", "launch": {"processes": 2, "threads_per_process": 1}}
        fill["stages"] = {name: stage for name, stage in fill["stages"].items() if name != "evaluate"}
        fill["stages"]["pretrain"] = {**fill["stages"]["pretrain"], "epochs": 1}
        folder.run(folder.write(fill))
        (folder.out_of("tokens_alone", "pretrain").parent / "tower_tokens").rename(made)
    return made


def run_row(folder: Folder, recipe: Path, tokens: Path | None) -> dict[str, float]:
    """The metrics of one run."""
    if tokens is not None:
        linked = folder.root / recipe.stem / "pretrain" / "of_the_first_run" / "tower_tokens"
        linked.mkdir(parents=True, exist_ok=True)
        for path in tokens.iterdir():
            if not (linked / path.name).exists():
                os.link(path, linked / path.name)
    begun = time.monotonic()
    folder.run(recipe)
    found = json.loads((folder.out_of(recipe.stem, "evaluate") / "metrics.json").read_text())["metrics"]
    print(f"{recipe.stem:20} {time.monotonic() - begun:5.0f} s", flush=True)
    return {name.removeprefix("eval/"): value for name, value in found.items()}


def run_rows(
    folder: Folder, ablation: Ablation, rows: Sequence[str], seeds: Sequence[int], epochs: int | None
) -> dict[tuple[str, int], dict[str, float]]:
    """All rows and seeds, two at a time; a seed's rows one after the other."""
    wanted = [(row, seed) for seed in seeds for row in rows]
    recipes = {key: folder.write(ablation.values(*key, epochs)) for key in wanted}
    tokens = tower_tokens(folder, ablation.values(rows[0], 0, None))
    with ThreadPoolExecutor(2) as pool:
        futures = {key: pool.submit(run_row, folder, recipe, tokens) for key, recipe in recipes.items()}
        return {key: future.result() for key, future in futures.items()}


def print_table(
    found: Mapping[tuple[str, int], Mapping[str, float]],
    rows: Sequence[str],
    seeds: Sequence[int],
    shown: Sequence[str],
) -> None:
    """A line a row: mean ± standard deviation over the seeds; a metric that a row has not is left blank."""
    width = max(18, *(len(name) + 2 for name in shown))
    print(f"\n{'':18}" + "".join(f"{name:>{width}}" for name in shown))
    for row in rows:
        cells = []
        for name in shown:
            values = [found[row, seed][name] for seed in seeds if name in found[row, seed]]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}" if values else "")
        print(f"{row:18}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)


def parser_of(ablation: Ablation, program: str, about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="keeps what is done")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=list(ablation.rows), default=list(ablation.table))
    parser.add_argument("--epochs", type=int, help="of pre-training; the recipe's if not given")
    return parser


def main(
    ablation: Ablation,
    program: str,
    about: str | None,
    report: Callable[[Mapping[tuple[str, int], Mapping[str, float]]], None] | None = None,
) -> None:
    """The command line of an ablation; `report` may print more of what was found."""
    options = parser_of(ablation, program, about).parse_args()
    begun = time.monotonic()
    folder = Folder(options.folder.resolve())
    make_data(folder, ablation)
    found = run_rows(folder, ablation, options.rows, options.seeds, options.epochs)
    print_table(found, options.rows, options.seeds, ablation.shown)
    if report is not None:
        report(found)
    print(f"\n{len(found)} runs, {time.monotonic() - begun:.0f} s")


def _merge(values: dict[str, Any], change: Mapping[str, Any]) -> None:
    """Level by level; a null takes a key out, a list replaces a list."""
    for key, value in change.items():
        if value is None:
            values.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = copy.deepcopy(value)
