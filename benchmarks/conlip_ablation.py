"""ConLIP's Tables 1 to 3 on the demo corpus: contrast alone, vanilla and conditioned masking; DCL, InfoNCE.

`python -m benchmarks.conlip_ablation --folder DIR [--seeds 1 2 3] [--rows cl vanilla conlip cl_info_nce …]`

R@M of drawings of an unseen vendor and of unseen concepts, and the mean and deviation of the attention to the
other side's [CLS] in the heads. All start from one warm-up of the towers. `conlip_mlm` and `conlip_mim` are
Table 3's rows with one token loss; `conlip_info_nce` is ConLIP by Eq. 9; `cl_online` has the positive of
the encoder that learns, as Eq. 10 is printed.
"""

from typing import Any

from benchmarks.ablation import Ablation, main

CL = {"mlm": None, "mim": None}
INFO_NCE = {"dcl": None, "info_nce": 1.0}
CONCEPT, VENDOR = (
    {"name": name, "split": name, "texts": ["title"], "relevance": "concept"}
    for name in ("unseen_concept", "unseen_vendor")
)


def row(
    losses: dict[str, Any], conditioned: bool = True, heads: bool = True, positive: str = "momentum"
) -> dict[str, Any]:
    pretrain = {"losses": losses, "model": {"conditioned": conditioned, "positive": positive}}
    return {
        "stages": {
            "pretrain": pretrain,
            "evaluate": {"galleries": [CONCEPT, {**VENDOR, "cls_attention": heads}]},
        }
    }


TABLES = Ablation(
    "conlip_demo",
    {
        "cl": row(CL, heads=False),
        "vanilla": row({}, conditioned=False),
        "conlip": row({}),
        "cl_info_nce": row({**CL, **INFO_NCE}, heads=False),
        "conlip_info_nce": row(INFO_NCE),
        "cl_online": row(CL, heads=False, positive="online"),
        "conlip_mlm": row({"mim": None}),
        "conlip_mim": row({"mlm": None}),
    },
    ("cl", "vanilla", "conlip", "cl_info_nce"),
    [
        "unseen_vendor/r@m",
        "unseen_concept/r@m",
        *(
            f"unseen_vendor/attention_{way}_cls{kind}"
            for way in ("text_to_image", "image_to_text")
            for kind in ("", "_std")
        ),
    ],
    upstream=("warm_up",),
)

if __name__ == "__main__":
    main(TABLES, "benchmarks.conlip_ablation", __doc__)
