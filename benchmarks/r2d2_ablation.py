"""R2D2's Table 3 on the demo corpus in Chinese: R2D2, w/o ET, w/o TwD, R2D2-CLIP; equal steps, several seeds.

`python -m benchmarks.r2d2_ablation --folder DIR [--seeds 1 2 3] [--rows r2d2 wo_et wo_twd r2d2_clip]`

R@M of the unseen vendor's drawings, re-ranked and by cosine. `--shuffled 0.3` gives that share of the
training samples the texts of another one first: what TgD is for; the rows are then r2d2 and wo_tgd.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation import Ablation, Folder, data_name, make_data, parser_of, print_table, run_rows
from data_tools.shards import ShardIndex, ShardWriter

PLAIN = {"gcpr": 1.0, "gcpr_tgd": None}
VENDOR = {"name": "unseen_vendor", "split": "unseen_vendor", "texts": ["title"], "relevance": "concept"}
RERANKED = [{**VENDOR, "rerank": {"top_k": 16}}]
TEXTS = ("title", "content", "queries", "captions", "other_titles", "other_contents")


def row(
    losses: Mapping[str, Any], model: Mapping[str, Any], galleries: list[dict[str, Any]] = RERANKED
) -> dict[str, Any]:
    return {
        "stages": {"pretrain": {"losses": losses, "model": model}, "evaluate": {"galleries": galleries}},
    }


TABLE_3 = Ablation(
    "r2d2_demo",
    {
        "r2d2": row({}, {}),
        "wo_et": row({}, {"enhanced_training": False}),
        "wo_twd": row({**PLAIN, "fgd": None}, {}),
        "wo_tgd": row(PLAIN, {}),
        "wo_fgd": row({"fgd": None}, {}),
        "r2d2_clip": row({**PLAIN, "fgd": None, "fgr": None, "mlm": None}, {"cross_layers": 0}, [VENDOR]),
    },
    ("r2d2", "wo_et", "wo_twd", "r2d2_clip"),
    [f"unseen_vendor/{name}" for name in ("r@m", "cosine_r@m", "i2t_r@1", "t2i_r@1")],
    {"stages": {"evaluate": {"attention_maps": None}}},
)


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


@dataclass(frozen=True)
class Placed(Ablation):
    """Rows on a corpus that is in a directory; no stage makes it."""

    corpus: Path = Path()

    def values(self, row: str, seed: int, epochs: int | None) -> dict[str, Any]:
        values = super().values(row, seed, epochs)
        stages = values["stages"]
        for stage in (stages["pretrain"], stages["evaluate"]):
            stage["inputs"].pop("corpus")
            stage["data"] = {**stage.get("data", {}), "corpus": str(self.corpus)}
        stages["evaluate"]["unchecked"] = "the demo's own splits, checked where they were made"
        return {**values, "reuse": [], "stages": {name: stages[name] for name in ("pretrain", "evaluate")}}


def main() -> None:
    parser = parser_of(TABLE_3, "benchmarks.r2d2_ablation", __doc__)
    parser.add_argument("--shuffled", type=float, default=0.0, help="share (0-1) of the training texts")
    parser.set_defaults(rows=None)
    options = parser.parse_args()
    begun = time.monotonic()
    folder, ablation = Folder(options.folder.resolve()), TABLE_3
    make_data(folder, ablation)
    if options.shuffled:
        corpus = folder.out_of(data_name(TABLE_3.recipe), "shard")
        folder = Folder(folder.path / f"shuffled_{options.shuffled}")
        corpus = shuffled(corpus, folder.path / "corpus", options.shuffled)
        ablation = Placed(
            TABLE_3.recipe,
            TABLE_3.rows,
            ("r2d2", "wo_tgd"),
            TABLE_3.shown,
            TABLE_3.always,
            corpus=corpus,
        )
    rows = options.rows or ablation.table
    found = run_rows(folder, ablation, rows, options.seeds, options.epochs)
    print_table(found, rows, options.seeds, ablation.shown)
    print(f"\n{len(found)} runs, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
