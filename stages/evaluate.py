"""The evaluate stage: recalls of a trained model on named galleries, and examples for the report.

Nothing here goes back into training: a test split never picks the model.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from data_tools.corpus_source import CorpusSource
from data_tools.pictures import open_picture
from data_tools.shards import CorpusError, ShardIndex
from learning import model_files
from learning.evaluation.retrieval import RightAnswers, top_answers
from learning.evaluation.validate import Outcome, evaluate_gallery
from learning.training import distributed
from stages.attention import AttentionMapsConfig, write_attention_maps
from stages.base import Frozen, Job, Report, StageConfig, StageError, Stopped


class GalleryConfig(Frozen):
    """One split as one gallery: its metrics are `eval/<name>/…`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="in the metrics' names: eval/<name>/i2t_r@1")
    split: str = Field(description="a split of the corpus")
    texts: list[Literal["title", "content", "queries", "captions"]] = Field(default=["title"], min_length=1)
    relevance: str | None = Field(
        default=None, description="the label by which image and text match; null: an image and its own texts"
    )
    folds: int = Field(
        default=1, ge=1, description="metrics are means over parts; COCO 1K: 5 folds of 5,000 images"
    )


class Config(StageConfig):
    """What to evaluate, and how much of it to show."""

    roles: ClassVar[tuple[str, ...]] = ("corpus", "weights")
    distributed: ClassVar[bool] = True

    kind: Literal["evaluate"] = "evaluate"
    data: CorpusSource = CorpusSource()
    galleries: list[GalleryConfig] = Field(min_length=1)
    batch: int = Field(default=256, ge=1, description="images or texts a forward call")
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
        asked = self.attention_maps
        if asked is not None and asked.gallery not in names:
            raise ValueError(f"attention_maps.gallery: '{asked.gallery}'; allowed: {', '.join(names)}")
        return self


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
    model = model_files.load(job.inputs["weights"], device)
    made_here = job.inputs["corpus"] / "out" if "corpus" in job.inputs else None
    corpus = config.data.place(made_here, job.recipe_directory)
    indices = {
        g.name: config.data.open(corpus, g.split, job.recipe_directory) for g in config.galleries
    }  # a misspelt split fails at once
    shown = config.attention_maps
    if shown is not None:  # first: so does what this model cannot show
        gallery = next(g for g in config.galleries if g.name == shown.gallery)
        write_attention_maps(shown, gallery.texts, model, indices[gallery.name], job, config.max_pixels)
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    examples: dict[str, Any] = {}
    for gallery in config.galleries:
        if distributed.all_reduce_max(job.should_stop()):
            raise Stopped("evaluate: stopped between galleries")
        index = indices[gallery.name]
        with job.progress.task(f"evaluate {gallery.name}", None) as task:
            try:
                outcome = evaluate_gallery(
                    model.method,
                    model.tokenizer,
                    model.transform,
                    index,
                    gallery.texts,
                    gallery.relevance,
                    batch=config.batch,
                    device=device,
                    max_length=model.max_length,
                    max_pixels=config.max_pixels,
                    folds=gallery.folds,
                    advance=task.advance,
                )
            except ValueError as error:
                raise StageError(f"galleries.{gallery.name}: {error}") from error
        found = dict(outcome.metrics)
        counts |= {f"{gallery.name}_{side}": int(found.pop(side)) for side in ("images", "texts")}
        metrics |= {f"eval/{gallery.name}/{name}": value for name, value in found.items()}
        if distributed.rank() == 0:
            examples[gallery.name] = _examples(config, job, gallery, index, outcome)
    if distributed.rank() == 0:
        _write(job.out / "metrics.json", {"metrics": metrics, "counts": counts})
        _write(job.out / "examples.json", examples)
    distributed.barrier()
    return Report(counts, metrics)


def _examples(
    config: Config, job: Job, gallery: GalleryConfig, index: ShardIndex, outcome: Outcome
) -> dict[str, Any]:
    """A seeded choice of queries both ways with their first answers; what is shown becomes thumbnails.

    The choice knows nothing of the ranks: it shows what the model is like, not its best.
    """
    show = _Thumbnails(job.out / "pictures", index, config)

    def image(i: int) -> dict[str, Any]:
        return {"key": index.keys[i], "picture": show(i), "title": index.record(i).get("title") or ""}

    def text(t: int) -> dict[str, Any]:
        return {"text": outcome.gallery.texts[t]}

    generator = random.Random(f"{job.seed} {gallery.name}")
    sides = {}
    for direction, asked, answers, right, ranks, query_of, answer_of in (
        ("t2i", outcome.texts, outcome.images, outcome.right_images, outcome.t2i_ranks, text, image),
        ("i2t", outcome.images, outcome.texts, outcome.right_texts, outcome.i2t_ranks, image, text),
    ):
        chosen = sorted(generator.sample(range(len(asked)), min(config.examples, len(asked))))
        rows = RightAnswers.of([right.of_query(q).tolist() for q in chosen])
        positions, cosines = top_answers(asked[chosen], answers, rows, config.top_k)
        sides[direction] = [
            {
                "query": query_of(query),
                "rank": int(ranks[query]),
                "right_answers": int(right.counts[query]),
                "best_right": answer_of(_best_right(asked[query], answers, right.of_query(query))),
                "answers": [
                    {
                        **answer_of(int(a)),
                        "right": bool(a in right.of_query(query)),
                        "cosine": round(float(c), 4),
                    }
                    for a, c in zip(positions[row], cosines[row], strict=True)
                ],
            }
            for row, query in enumerate(chosen)
        ]
    return {
        "split": gallery.split,
        "texts": list(gallery.texts),
        "relevance": gallery.relevance,
        "folds": gallery.folds,
        "images": len(outcome.images),
        "distinct_texts": len(outcome.texts),
        **sides,
    }


def _best_right(query: np.ndarray, answers: np.ndarray, right: np.ndarray) -> int:
    """The right answer that the model puts first."""
    return int(right[np.argmax(answers[right].astype(np.float64) @ query.astype(np.float64))])


class _Thumbnails:
    """Writes a sample's picture once, small, and gives its path relative to `out/`."""

    def __init__(self, directory: Path, index: ShardIndex, config: Config):
        self.directory, self.index, self.config = directory, index, config
        self.directory.mkdir(parents=True, exist_ok=True)
        self.written: set[Path] = set()  # not path.exists(): a killed run may have left half a file

    def __call__(self, i: int) -> str:
        key = self.index.keys[i]
        # a key comes from the corpus: its hash is a safe file name
        path = self.directory / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.webp"
        if path not in self.written:
            picture = open_picture(
                self.index.image_bytes(i), max_pixels=self.config.max_pixels, name=f"key {key}"
            )
            picture.thumbnail((self.config.thumbnail_px, self.config.thumbnail_px), Image.Resampling.LANCZOS)
            picture.save(path, "WEBP", quality=80)
            self.written.add(path)
        return f"{self.directory.name}/{path.name}"


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
