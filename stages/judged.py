"""How a split that is not trained on is judged, in validation and as a gallery: the fields, and the act."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from data_tools.regions.store import RegionStore
from data_tools.shards import ShardIndex
from learning.evaluation.gallery import TextField
from learning.evaluation.label_metrics import Gain
from learning.evaluation.label_retrieval import EVERY_LABEL, LabelOutcome, evaluate_labels
from learning.evaluation.label_sets import LabelSetConfig
from learning.evaluation.matching import LABEL, MatchBy, Matched, evaluate_matching
from learning.evaluation.metrics import DIRECTIONS, Direction
from learning.evaluation.rerank import RerankConfig
from learning.evaluation.validate import Outcome, evaluate_gallery
from learning.methods.base import Method
from learning.tokenizer import Tokenizer
from learning.training.augment import ImageTransform
from learning.training.sample_labels import CLASSES
from learning.training.split_regions import check_method
from stages.base import Frozen

OF_TASKS = {  # fields that say something in these tasks alone
    "relevance": ("retrieval",),
    "directions": ("retrieval", "labels"),
    "rerank": ("retrieval",),
    "folds": ("retrieval", "labels"),
    "label": ("matching",),
    "match_by": ("matching",),
    "label_set": ("labels",),
    "gain": ("labels",),
    "cut": ("labels",),
}
_LABEL_METRIC = re.compile(r"(?:chance_)?(?:(?:i2t|t2i)_)?(?:ndcg|map)(?:@(\d+))?")
_LABEL_COUNT = re.compile(r"(?:i2t|t2i)_left_out|labels|unlabelled")


class Judged(Frozen):
    """A split, and what is asked of it: retrieval, by samples or by labels, or matching as in ICM and IQM."""

    task: Literal["retrieval", "matching", "labels"] = Field(
        default="retrieval",
        description="recalls; the AUC of match and no match; or NDCG, MAP and recalls where answers that "
        "share a label with the query are right",
    )
    split: str = Field(description="a split of the corpus")
    texts: tuple[TextField, ...] = Field(
        default=("title",),
        min_length=1,
        description="all of them are asked; matching: the first that there is",
    )
    relevance: str | None = Field(
        default=None, description="the label by which image and text match; null: an image and its own texts"
    )
    directions: tuple[Direction, ...] = Field(
        default=DIRECTIONS,
        min_length=1,
        description="i2t: images ask for texts; t2i: texts for images; MUGE has t2i alone: R@M of 3 recalls",
    )
    rerank: RerankConfig | None = Field(
        default=None, description="judge the first answers by cosine as pairs; null: the cosine decides"
    )
    label: str | None = Field(
        default=None, description=f"matching: the label that is 1 (match) or 0; null: {LABEL}"
    )
    match_by: MatchBy | None = Field(
        default=None,
        description="matching: pairs, by the match probability, or cosine; null: pairs where the method can",
    )
    label_set: LabelSetConfig | None = Field(
        default=None, description=f"labels: those of a sample; null: all of its {CLASSES}"
    )
    gain: Gain = Field(
        default="linear",
        description="labels: what an answer that shares c labels is worth in NDCG: c, or 2^c - 1",
    )
    cut: int | None = Field(
        default=None,
        ge=1,
        description="labels: the first so many answers count: ndcg@k, map@k; null: the whole gallery",
    )

    @model_validator(mode="after")
    def _of_its_task(self) -> "Judged":
        if len(set(self.directions)) < len(self.directions):
            raise ValueError(f"directions: {self.directions[0]} stands twice; name it once")
        for name, tasks in OF_TASKS.items():
            field = type(self).model_fields.get(name)
            if field is not None and self.task not in tasks and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name}: says nothing in task {self.task}; leave it out, or set task: "
                    f"{' or '.join(tasks)}"
                )
        return self

    def judges_pairs(self) -> str | None:
        """The field that asks for a method that judges pairs; None: any method will do."""
        if self.rerank is not None:
            return "rerank"
        return "match_by" if self.match_by == "pairs" else None

    def best_metric(self) -> str:
        """What to pick the best weights by."""
        if self.task == "labels":
            return "ndcg" if self.cut is None else f"ndcg@{self.cut}"
        return "auc" if self.task == "matching" else "r@m"

    def reads_pictures(self) -> str | None:
        """The field that asks for what is done with pictures alone, not with regions; None: there is none."""
        return "task" if self.task == "matching" else self.judges_pairs()

    def has_metric(self, name: str) -> bool:
        """Whether a metric can come of it, as far as the fields tell."""
        if self.task == "matching":
            return name in ("auc", "positives", "negatives")
        of_labels = _LABEL_METRIC.fullmatch(name)
        if of_labels is not None and of_labels[1] != (None if self.cut is None else str(self.cut)):
            return False
        if (of_labels or _LABEL_COUNT.fullmatch(name)) and self.task != "labels":
            return False
        if name == "auc" or (name.endswith("rsum") and len(self.directions) == 1):
            return False
        if name.startswith(("cosine_", "ceiling_")) and self.rerank is None:
            return False
        return not any(way in name for way in DIRECTIONS if way not in self.directions)


def judge(
    asked: Judged,
    method: Method,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    index: ShardIndex,
    *,
    batch: int,
    device: str | torch.device,
    max_length: int,
    max_pixels: int,
    folds: int = 1,
    regions: RegionStore | None = None,
    advance: Callable[[int], None] | None = None,
) -> Outcome | Matched | LabelOutcome:
    """Do what `asked` says, on all ranks together; errors as evaluate_gallery, evaluate_matching and
    evaluate_labels have.

    regions: of the split's pictures, read in their place; only where `asked.reads_pictures()` is None.
    """
    if asked.task == "matching":
        return evaluate_matching(
            method,
            tokenizer,
            transform,
            index,
            asked.texts,
            asked.label or LABEL,
            by=asked.match_by,
            batch=batch,
            device=device,
            max_length=max_length,
            max_pixels=max_pixels,
            advance=advance,
        )
    if asked.task == "labels":
        return evaluate_labels(
            method,
            tokenizer,
            transform,
            index,
            asked.texts,
            asked.label_set or EVERY_LABEL,
            gain=asked.gain,
            cut=asked.cut,
            batch=batch,
            device=device,
            max_length=max_length,
            max_pixels=max_pixels,
            folds=folds,
            directions=asked.directions,
            regions=regions,
            advance=advance,
        )
    return evaluate_gallery(
        method,
        tokenizer,
        transform,
        index,
        asked.texts,
        asked.relevance,
        batch=batch,
        device=device,
        max_length=max_length,
        max_pixels=max_pixels,
        folds=folds,
        directions=asked.directions,
        rerank_by=asked.rerank,
        regions=regions,
        advance=advance,
    )


def open_regions(inputs: Mapping[str, Path], method: Method) -> RegionStore | None:
    """The regions that a method reads, of the input `regions`; None for a method of pictures.

    Raises ValueError where the method and the input do not go together (check_method), and for a store that
    is damaged.
    """
    store = RegionStore.open(inputs["regions"] / "out") if "regions" in inputs else None
    check_method(method, store)
    return store
