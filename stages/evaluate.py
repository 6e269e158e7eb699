"""The evaluate stage: recalls, AUC, or NDCG and MAP of a trained model on named galleries, and examples.

Nothing here goes back into training: a test split never picks the model.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from data_tools.corpus_source import CorpusSource
from data_tools.shards import CorpusError, ShardIndex
from learning import model_files
from learning.evaluation.cls_attention import ClsAttention, cls_attention
from learning.evaluation.label_retrieval import EVERY_LABEL, LabelOutcome
from learning.evaluation.matching import Matched
from learning.evaluation.pairs import check_ranks_pairs
from learning.evaluation.validate import Outcome
from learning.model_files import RetrievalModel
from learning.training import distributed
from learning.training.split_regions import SplitRegions
from stages.attention import AttentionMapsConfig, write_attention_maps
from stages.base import Job, Report, StageConfig, StageError, Stopped
from stages.evaluation_examples import Shown, label_examples, matching_examples, retrieval_examples
from stages.judged import Judged, judge, open_regions

CLS_ATTENTION = "cls_attention.json"
# counts of a gallery, not metrics
SIZES = ("images", "texts", "positives", "negatives", "labels", "unlabelled", "i2t_left_out", "t2i_left_out")


class GalleryConfig(Judged):
    """One split as one gallery: its metrics are `eval/<name>/…`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="in the metrics' names: eval/<name>/i2t_r@1")
    folds: int = Field(
        default=1, ge=1, description="metrics are means over parts; COCO 1K: 5 folds of 5,000 images"
    )
    cls_attention: bool = Field(
        default=False,
        description="measure how tokens attend to the other side's [CLS] in the heads of a pre-training "
        "stage's weights (ConLIP, Table 2)",
    )

    @model_validator(mode="after")
    def _attends_in_pairs(self) -> "GalleryConfig":
        if self.cls_attention and self.task == "matching":
            raise ValueError(
                "cls_attention: is of images and their own texts; leave it out, or task: matching"
            )
        return self


class Config(StageConfig):
    """What to evaluate, and how much of it to show."""

    roles: ClassVar[tuple[str, ...]] = ("corpus", "weights")
    optional_roles: ClassVar[tuple[str, ...]] = ("regions",)
    distributed: ClassVar[bool] = True

    kind: Literal["evaluate"] = "evaluate"
    data: CorpusSource = CorpusSource()
    galleries: list[GalleryConfig] = Field(min_length=1)
    batch: int = Field(default=256, ge=1, description="images, texts or matching pairs a forward call")
    examples: int = Field(default=12, ge=0, description="queries shown in the report, each way and gallery")
    top_k: int = Field(default=8, ge=1, description="answers shown of each")
    thumbnail_px: int = Field(default=96, ge=16, le=512, description="longer side of a shown picture")
    max_pixels: int = Field(default=50_000_000, ge=1, description="a stored picture with more is refused")
    attention_maps: AttentionMapsConfig | None = Field(
        default=None, description="pictures of where a model with cross encoders looks; null: none"
    )
    unchecked: str | None = Field(
        default=None,
        min_length=1,
        description="why the training corpora are not checked against these galleries; null: they must be",
    )

    cosmetic: ClassVar[frozenset[str]] = frozenset({"data"})

    def files(self) -> dict[str, Path]:
        return self.data.files()

    def addresses(self) -> dict[str, str]:
        return self.data.addresses()

    def named_elsewhere(self) -> frozenset[str]:
        return self.data.named_elsewhere()

    @model_validator(mode="after")
    def _names_differ(self) -> "Config":
        names = [gallery.name for gallery in self.galleries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"galleries: name '{twice[0]}' stands twice; give each gallery its own name")
        self._pictures_or_regions()
        asked = self.attention_maps
        if asked is not None and asked.gallery not in names:
            raise ValueError(f"attention_maps.gallery: '{asked.gallery}'; allowed: {', '.join(names)}")
        return self

    def _pictures_or_regions(self) -> None:
        if "regions" not in self.inputs:
            return
        asked = {
            f"galleries.{one.name}.{field}": field
            for one in self.galleries
            if (field := one.reads_pictures())
        }
        asked |= {"attention_maps": "attention_maps"} if self.attention_maps is not None else {}
        if asked:
            raise ValueError(
                f"{next(iter(asked))}: reads pictures, and inputs.regions is given; leave it out"
            )


def run(config: Config, job: Job) -> Report:
    """Evaluate each gallery on all processes; rank 0 writes metrics.json, examples.json and pictures/."""
    joined_here = not distributed.is_initialized()
    device = distributed.init()
    try:
        return _run(config, job, str(device))
    except (CorpusError, ValueError) as error:
        raise StageError(f"evaluate: {error}") from error
    finally:
        if joined_here:
            distributed.shutdown()


def _run(config: Config, job: Job, device: str) -> Report:
    attends = any(gallery.cls_attention for gallery in config.galleries)
    model = model_files.load(job.inputs["weights"], device, heads=attends)
    made_here = job.inputs["corpus"] / "out" if "corpus" in job.inputs else None
    corpus = config.data.place(made_here, job.recipe_directory)
    indices = {
        g.name: config.data.open(corpus, g.split, job.recipe_directory) for g in config.galleries
    }  # a misspelt split fails at once
    _check_method(config, type(model.method))
    regions = open_regions(job.inputs, model.method)
    for name, index in indices.items():
        if regions is not None:
            _check_regions(name, SplitRegions(regions, index))
    shown = config.attention_maps
    if shown is not None:  # first: so does what this model cannot show
        gallery = next(g for g in config.galleries if g.name == shown.gallery)
        write_attention_maps(shown, gallery.texts, model, indices[gallery.name], job, config.max_pixels)
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    examples: dict[str, Any] = {}
    attention: dict[str, dict[str, ClsAttention]] = {}
    for gallery in config.galleries:
        if distributed.all_reduce_max(job.should_stop()):
            raise Stopped("evaluate: stopped between galleries")
        index = indices[gallery.name]
        with job.progress.task(f"evaluate {gallery.name}", None) as task:
            try:
                outcome = judge(
                    gallery,
                    model.method,
                    model.tokenizer,
                    model.transform,
                    index,
                    batch=config.batch,
                    device=device,
                    max_length=model.max_length,
                    max_pixels=config.max_pixels,
                    folds=gallery.folds,
                    regions=regions,
                    advance=task.advance,
                )
            except ValueError as error:
                raise StageError(f"galleries.{gallery.name}: {error}") from error
        found = dict(outcome.metrics)
        sizes = [name for name in SIZES if name in found]
        counts |= {f"{gallery.name}_{name}": int(found.pop(name)) for name in sizes}
        if gallery.cls_attention:
            attention[gallery.name] = _cls_attention(config, job, gallery, model, index)
            for way, each in attention[gallery.name].items():
                found |= {f"attention_{way}_cls": each.mean, f"attention_{way}_cls_std": each.std}
        metrics |= {f"eval/{gallery.name}/{name}": value for name, value in found.items()}
        if distributed.rank() == 0:
            examples[gallery.name] = _examples(config, job, gallery, index, outcome)
    if distributed.rank() == 0:
        _write(job.out / "metrics.json", {"metrics": metrics, "counts": counts})
        _write(job.out / "examples.json", examples)
        if attention:
            _write(
                job.out / CLS_ATTENTION,
                {g: {w: asdict(a) for w, a in found.items()} for g, found in attention.items()},
            )
    distributed.barrier()
    return Report(counts, metrics)


def _check_regions(gallery: str, regions: SplitRegions) -> None:
    try:
        regions.check(0)
    except ValueError as error:
        raise StageError(f"galleries.{gallery}: {error}") from error


def _cls_attention(
    config: Config, job: Job, gallery: GalleryConfig, model: RetrievalModel, index: ShardIndex
) -> dict[str, ClsAttention]:
    with job.progress.task(f"attention to [CLS] {gallery.name}", len(index)) as task:
        try:
            return cls_attention(
                model.method,
                model.tokenizer,
                model.transform,
                index,
                gallery.texts,
                seed=job.seed,
                batch=config.batch,
                device=model.device,
                max_length=model.max_length,
                max_pixels=config.max_pixels,
                advance=task.advance,
            )
        except ValueError as error:
            raise StageError(f"galleries.{gallery.name}.cls_attention: {error}") from error


def _check_method(config: Config, method: type) -> None:
    """Before any gallery is embedded. Raises StageError for one that asks for what the method cannot do."""
    for gallery in config.galleries:
        field = gallery.judges_pairs()
        if field is not None:
            try:
                check_ranks_pairs(method)
            except ValueError as error:
                raise StageError(f"galleries.{gallery.name}.{field}: {error}") from error


def _examples(
    config: Config,
    job: Job,
    gallery: GalleryConfig,
    index: ShardIndex,
    outcome: Outcome | Matched | LabelOutcome,
) -> dict[str, Any]:
    """A gallery's entry in examples.json; what is shown becomes thumbnails."""
    pictures = job.out / "pictures"
    shown = Shown(
        config.examples, config.top_k, config.thumbnail_px, config.max_pixels, f"{job.seed} {gallery.name}"
    )
    asked: dict[str, Any] = {"task": gallery.task, "split": gallery.split, "texts": list(gallery.texts)}
    if isinstance(outcome, Matched):
        return asked | matching_examples(outcome, shown, index, pictures)
    if isinstance(outcome, LabelOutcome):
        fields = list((gallery.label_set or EVERY_LABEL).fields)
        asked |= {"fields": fields, "gain": gallery.gain, "cut": gallery.cut, "folds": gallery.folds}
        return asked | label_examples(outcome, shown, index, pictures)
    asked |= {"relevance": gallery.relevance, "folds": gallery.folds}
    if gallery.rerank is not None:
        asked["rerank"] = {"top_k": gallery.rerank.top_k, "score": gallery.rerank.score}
    return asked | retrieval_examples(outcome, shown, index, pictures)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
