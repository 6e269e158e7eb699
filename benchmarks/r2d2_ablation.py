"""R2D2's Table 3 on the demo corpus in Chinese: R2D2, w/o ET, w/o TwD, R2D2-CLIP; equal steps, several seeds.

`python -m benchmarks.r2d2_ablation --folder DIR [--seeds 1 2 3] [--rows r2d2 wo_et wo_twd r2d2_clip]`

Runs recipes/r2d2_demo.yaml from its data stages on, then pre-trains and evaluates each row and seed with one
process, two at a time, and prints R@M of the unseen vendor's drawings as mean ± standard deviation, by cosine
and re-ranked. `--shuffled 0.3` gives that share of the training samples the texts of another one first (what
TgD is for; the rows are then r2d2 and wo_tgd). DIR keeps what is done: run again, it goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_tools.shards import ShardIndex, ShardWriter
from demo.corpus import HERE
from pipeline.recipe import load

RECIPES = HERE.parent / "recipes"
PLAIN = {"gcpr": 1.0, "gcpr_tgd": None}
ROWS: dict[str, dict[str, Any]] = {
    "r2d2": {},
    "wo_et": {"model": {"enhanced_training": False}},
    "wo_twd": {"losses": {**PLAIN, "fgd": None}},
    "wo_tgd": {"losses": PLAIN},
    "wo_fgd": {"losses": {"fgd": None}},
    "r2d2_clip": {
        "model": {"cross_layers": 0},
        "losses": {**PLAIN, "fgd": None, "fgr": None, "mlm": None},
    },
}
TABLE = ["r2d2", "wo_et", "wo_twd", "r2d2_clip"]
SHOWN = ["r@m", "cosine_r@m", "i2t_r@1", "t2i_r@1"]
TEXTS = ("title", "content", "queries", "captions", "other_titles", "other_contents")


def tandem(folder: Path, recipe: Path) -> None:
    """Run a recipe to its end; its words go to a log beside it."""
    words = [sys.executable, "-m", "pipeline.cli", "run", str(recipe), "--root", str(folder / "runs")]
    with (folder / f"{recipe.stem}.log").open("w") as log:
        subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT, cwd=HERE.parent)


def out_of(folder: Path, recipe: str, stage: str) -> Path:
    """The newest out/ of a stage."""
    done = (folder / "runs" / recipe / stage).glob("*/DONE.json")
    return max(done, key=lambda path: path.stat().st_mtime).parent / "out"


def shuffled(corpus: Path, target: Path, share: float) -> Path:
    """A copy of a corpus; `share` of the training samples have the texts of another one, by a seed."""
    if (target / "manifest.json").exists():
        return target
    manifest = json.loads((corpus / "manifest.json").read_text())
    writer = ShardWriter(target, 2**28, list(manifest["splits"]), manifest["labels"])
    rng = np.random.default_rng(0)
    for split in manifest["splits"]:
        index = ShardIndex.open(corpus, split)
        records = [index.record(i) for i in range(len(index))]
        if split == "train":
            chosen = rng.permutation(len(records))[: round(share * len(records))]
            texts = [{name: records[i][name] for name in TEXTS if name in records[i]} for i in chosen]
            for own, other in zip(np.roll(chosen, 1), texts, strict=True):
                records[own] |= other
        for i, record in enumerate(records):
            writer.write(index.image_bytes(i), "webp", record)
    writer.close()
    return target


def recipe_of(folder: Path, row: str, seed: int, corpus: Path, epochs: int | None) -> Path:
    """r2d2_demo's pre-training and evaluation of one row, on a corpus that is there."""
    change = ROWS[row]
    base = yaml.safe_load((RECIPES / "r2d2_demo.yaml").read_text(encoding="utf-8"))
    model = base["model"] | change.get("model", {})
    model["vision"]["weights"] = str(HERE / "pretrained" / Path(model["vision"]["weights"]).name)
    stages = {name: base["stages"][name] for name in ("pretrain", "evaluate")}
    pretrain, evaluate = stages["pretrain"], stages["evaluate"]
    pretrain["epochs"] = epochs or pretrain["epochs"]
    pretrain["losses"] = pretrain["losses"] | change.get("losses", {})
    pretrain["deepspeed"] = str(RECIPES / pretrain["deepspeed"])
    pretrain.pop("inputs")
    pretrain.pop("validate")  # the last weights count, so that no row is picked by its luck
    pretrain["data"]["corpus"] = str(corpus)
    evaluate["inputs"] = {"weights": "pretrain"}  # no fine-tuning: equal steps
    evaluate["data"] = {"corpus": str(corpus)}
    evaluate["unchecked"] = "the demo's own splits, checked where they were made"
    evaluate["galleries"] = [each for each in evaluate["galleries"] if each["name"] == "unseen_vendor"]
    evaluate.pop("attention_maps", None)
    evaluate["examples"] = 0
    if row == "r2d2_clip":
        evaluate["galleries"][0].pop("rerank")
    name = f"{row}_{seed}"
    whole = {"name": name, "seed": seed, "launch": {"processes": 1, "threads_per_process": 1}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(whole | {"model": model, "stages": stages}, sort_keys=False))
    load(path)  # a mistake is told before hours are spent
    return path


def run(folder: Path, recipe: Path, tokens: Path) -> dict[str, float]:
    """The metrics of one run; the frozen tower's tokens are those of `tokens`."""
    linked = folder / "runs" / recipe.stem / "pretrain" / "of_the_first_run" / "tower_tokens"
    linked.mkdir(parents=True, exist_ok=True)
    for path in tokens.iterdir():
        if not (linked / path.name).exists():
            os.link(path, linked / path.name)
    begun = time.monotonic()
    tandem(folder, recipe)
    found = json.loads((out_of(folder, recipe.stem, "evaluate") / "metrics.json").read_text())["metrics"]
    values = {name.removeprefix("eval/unseen_vendor/"): value for name, value in found.items()}
    print(f"{recipe.stem:14} {time.monotonic() - begun:5.0f} s  R@M {values['r@m']:.2f}", flush=True)
    return {"cosine_r@m": values["r@m"], **values}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.r2d2_ablation", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--epochs", type=int, help="of pre-training; the recipe's if not given")
    parser.add_argument("--shuffled", type=float, default=0.0, help="share (0-1) of the training texts")
    options = parser.parse_args()
    rows = options.rows or (["r2d2", "wo_tgd"] if options.shuffled else TABLE)
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "demo.corpus"], check=True, cwd=HERE.parent)
    subprocess.run(
        [sys.executable, "-m", "demo.weights"], check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL
    )
    tandem(folder, RECIPES / "demo_data_zh.yaml")
    corpus = out_of(folder, "demo_data_zh", "shard")
    if options.shuffled:
        folder = folder / f"shuffled_{options.shuffled}"
        corpus = shuffled(corpus, folder / "corpus", options.shuffled)
    recipes = {
        (row, seed): recipe_of(folder, row, seed, corpus, options.epochs)
        for seed in options.seeds
        for row in rows
    }
    first = folder / "tokens"
    if not first.exists():  # the tower runs once, on two processes, for a run that is not looked at
        fill = recipe_of(folder, "r2d2_clip", 0, corpus, 1)
        values = yaml.safe_load(fill.read_text())
        values["stages"] = {"pretrain": values["stages"]["pretrain"]}
        values["launch"]["processes"] = 2
        fill.write_text(yaml.safe_dump(values, sort_keys=False))
        tandem(folder, fill)
        (out_of(folder, fill.stem, "pretrain").parent / "tower_tokens").rename(first)
    with ThreadPoolExecutor(2) as pool:
        futures = {key: pool.submit(run, folder, recipe, first) for key, recipe in recipes.items()}
        found = {key: future.result() for key, future in futures.items()}
    print(f"\n{'':10}" + "".join(f"{name:>18}" for name in SHOWN))
    for row in rows:
        cells = []
        for name in SHOWN:
            values = [found[row, seed][name] for seed in options.seeds]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):10.2f} ± {spread:5.2f}")
        print(f"{row:10}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"\n{len(found)} runs, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
