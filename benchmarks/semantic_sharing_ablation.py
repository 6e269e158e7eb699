"""Semantic Sharing's Table 1 on the demo corpus: equal steps, several seeds, NDCG in percent.

`python -m benchmarks.semantic_sharing_ablation --folder DIR [--seeds 1 2 3] [--rows full wo_c wo_l con imc]`

The mean of both ways, on the unseen vendor's drawings and on the unseen concepts. Further rows: st, wo_r,
wo_t; z_st, ST's embeddings compared as they are; literal, Eq. 4 as it is printed.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.ablation import Ablation, main

WITHOUT_MASKS = {"words": None, "objects": None}


def row(losses: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"stages": {"pretrain": {"losses": losses, "model": model or {}}}}


TABLE_1 = Ablation(
    "semantic_sharing_demo",
    {
        "full": row({}),
        "wo_c": row(WITHOUT_MASKS),
        "wo_l": row({"labels": None}),
        "con": row({"triplet": 10.0}),  # as large as Eq. 4, a sum over 109 labels
        "imc": row({**WITHOUT_MASKS, "labels": None, "consistency": 1.0}),
        "st": row(WITHOUT_MASKS, {"sharing": "separate", "retrieval": "predictions"}),
        "z_st": row(WITHOUT_MASKS, {"sharing": "separate"}),
        "wo_r": row(WITHOUT_MASKS, {"segments": "global", "encoder": "fc"}),
        "wo_t": row({}, {"encoder": "fc"}),
        "literal": row({}, {"label_loss": "literal"}),
    },
    ("full", "wo_c", "wo_l", "con", "imc"),
    [f"{gallery}/ndcg" for gallery in ("unseen_vendor", "unseen_concept")],
)


if __name__ == "__main__":
    main(TABLE_1, "benchmarks.semantic_sharing_ablation", __doc__)
