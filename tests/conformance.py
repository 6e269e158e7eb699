"""A walk through the training stages of every method's demo recipe, made small: what each stage then does.

It knows no method. What a batch holds is asked of `views()`, and the corpus, the tokenizer, the model and the
batches are made as the training stage itself makes them.
"""

import copy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.regions.store import Layout
from data_tools.regions.writer import RegionWriter, commit, prepare
from data_tools.shards import ShardIndex, ShardWriter
from learning import methods, model_files
from learning.evaluation.embed import embed_images, embed_texts, evaluation_mode
from learning.methods.base import Batch, EmbedsRegions, LabelSet, Method, Views
from learning.tokenizer import Tokenizer
from learning.training.augment import ImageTransform
from learning.training.checkpoint_files import Writer
from learning.training.deepspeed_setup import read_deepspeed_config
from learning.training.engine import Engine, Objective
from learning.training.randomness import stable_hash
from pipeline.recipe import load
from stages.base import StageConfig
from stages.training import TrainingConfig
from stages.training_run import _Training
from tests import tiny_model
from tests.plain_engine import PlainEngine
from tests.region_case import regions_of
from tests.training_case import CONFIGS, make_job

HERE = Path(__file__).parent
USER = HERE / "user_method"
USERS_OWN = "sigmoid"  # the method of a user, which has its file and its recipe in USER
# Recipes of a size that a laptop trains; the two that came first have other names
RECIPES = sorted(
    path
    for folder in (HERE.parent / "recipes", USER)
    for path in folder.glob("*.yaml")
    if path.stem.endswith("_demo") or path.stem in ("demo", "clip")
)
SAMPLES, COUNT, STEPS, RATE = 24, 8, 2, 0.01
SMALL: dict[str, Any] = {  # fields of a model, by the end of their names (cross_heads are heads)
    "heads": 2,
    "intermediate": 32,
    "width": 16,
    "dimension": 16,
    "layers": 1,
    "dropout": 0.0,  # drawn by rank
}
CHANGED: dict[str, Any] = {
    "queue": 12,
    "image_px": 64,
    "weights": None,
    "batch_norm": "global",
    "count": 6,  # regions of a picture
    "classes": 5,  # of regions
}
TEXTS = ("a red thing", "two blue things", "one green thing on a table", "no thing at all", "things, again")


@dataclass(frozen=True)
class Stage:
    """A training stage of a recipe, as it is walked through."""

    recipe: Path
    name: str
    config: TrainingConfig
    upstream: str | None  # the stage whose weights it starts from

    @property
    def method(self) -> str:
        return str(self.config.model["method"])

    @property
    def reads_regions(self) -> bool:
        return "regions" in self.config.inputs

    @property
    def id(self) -> str:
        return f"{self.recipe.stem}.{self.name}"


def plug_in() -> None:
    """Make the user's method known in this process; `plug_out` takes it back."""
    if str(USER) not in methods.__path__:
        methods.__path__.append(str(USER))


def plug_out() -> None:
    methods.__path__.remove(str(USER))


def small(values: Mapping[str, Any]) -> dict[str, Any]:
    """A model section of the same kind with SMALL's sizes; towers are timm's smallest of their family."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            made[key] = small(value)
        elif key == "name" and "image_px" in values:
            made[key] = "test_vit" if "vit" in str(value) else "test_efficientnet"
        elif value:  # none, or no layers, stays
            made[key] = {**SMALL, **CHANGED}.get(key, SMALL.get(key.rpartition("_")[2], value))
        else:
            made[key] = value
    return made


def stages() -> list[Stage]:
    """Those of all demo recipes, in the order of each recipe."""
    found = []
    for path in RECIPES:
        recipe = load(path)
        for name, config in recipe.stages.items():
            if isinstance(config, TrainingConfig):
                weights = config.inputs.get("weights")
                found.append(Stage(path, name, _small_stage(config), weights))
    return found


def _small_stage(config: StageConfig) -> TrainingConfig:
    values = config.model_dump(by_alias=True)
    # spelt out first: a field that a recipe leaves at its default has a size too
    values["model"] = small(methods.parse_config(values["model"]).model_dump(mode="json"))
    values |= {"contrastive_batch": COUNT, "batch_per_gpu": None, "micro_batch": None}
    values |= {"validate": None, "pick_best": None, "deepspeed": CONFIGS / Path(values["deepspeed"]).name}
    values["data"] = values["data"] | {"corpus": None, "cache": "none", "workers": 0}
    values["vocabulary"] = values["vocabulary"] | {"size": 100}
    made = type(config).model_validate(values)
    assert isinstance(made, TrainingConfig)
    return made


# -------------------------------------------------------------------------------------------- the corpus


def views_of(stage: Stage) -> Views:
    config = methods.parse_config(dict(stage.config.model))
    return methods.build(config, tuple(stage.config.losses), 50).views()


def write_inputs(directory: Path, stage: Stage) -> None:
    """What the stage reads, beside weights: corpus/out, and regions/out where it reads them."""
    corpus = directory / "corpus" / "out"
    _write_corpus(corpus, stage)
    if stage.reads_regions:
        write_regions(directory / "regions" / "out", corpus, stage)


def _write_corpus(out: Path, stage: Stage) -> None:
    """Texts in all fields, the labels and sets of labels that the stage's views name."""
    views = views_of(stage)
    positives = stage.config.data.positives
    names = {*views.labels, *([positives] if positives else [])}
    names |= {field for one in views.label_sets.values() for field in one.fields if field != "classes"}
    split = stage.config.data.split
    writer = ShardWriter(out, shard_bytes=20_000, splits=[split], labels=sorted(names))
    for number in range(SAMPLES):
        image = tiny_model.picture_bytes(number)
        own = {field: _names_of(number, one) for one in views.label_sets.values() for field in one.fields}
        labels = {name: str(number % 3) for name in views.labels}
        labels |= {field: "|".join(values) for field, values in own.items() if field != "classes"}
        labels |= {positives: f"p{number // 2}"} if positives else {}
        texts = [f"{text} number {number}" for text in TEXTS]
        record = tiny_model.record(number, split, image, title=texts[0], content=texts[1])
        record |= {"captions": [{"text": text, "lang": "en"} for text in texts[2:]]}
        record |= {"labels": labels, "classes": own.get("classes", [])}
        writer.write(image, "png", record)
    writer.close()


def _names_of(number: int, one: LabelSet) -> list[str]:
    """One or two of a set's names."""
    return sorted({one.names[number % len(one.names)], one.names[(3 * number) % len(one.names)]})


def write_regions(out: Path, corpus: Path, stage: Stage) -> None:
    """Regions of every picture, as many and as wide as the stage's model reads."""
    vision: Any = methods.parse_config(dict(stage.config.model)).vision  # type: ignore[attr-defined]
    index = ShardIndex.open(corpus)
    layout = Layout(len(index), vision.count, vision.width, "float32")
    prepare(out, layout)
    with RegionWriter(out, layout) as writer:
        for row, key in enumerate(index.keys):
            writer.write(row, regions_of(key, vision.count, vision.width))
        writer.sync()
    samples = pa.table({"key": index.keys, "picture": index.pictures})
    commit(out, layout, samples, [], vision.classes, None, {"from": "test"})


# ---------------------------------------------------------------------------------------------- the walk


def walk(rank: int, world_size: int, folder: str, wanted: list[str]) -> dict[str, dict[str, Any]]:
    """What each stage named gives on this rank; of one that fails, the traceback.

    One process writes each stage's model for the stages after it; two start from the same.
    """
    plug_in()
    told = {}
    for stage in stages():
        if stage.id in wanted:
            try:
                told[stage.id] = _walk_stage(stage, Path(folder), world_size)
            except Exception:
                told[stage.id] = {"error": traceback.format_exc()}
    return told


def _walk_stage(stage: Stage, folder: Path, world_size: int) -> dict[str, Any]:
    made = training(stage, folder, world_size)
    told = plain_steps(copy.deepcopy(made.method), made)
    if world_size == 1:
        return told | gradients_in_fp32(copy.deepcopy(made.method), made) | exported(made, folder, stage)
    return told | resumed(stage, folder, world_size)


def training(stage: Stage, folder: Path, world_size: int) -> Any:
    """The stage's method, batches and tokenizer, as the stage makes them."""
    place = folder / stage.id
    weights = None if stage.upstream is None else folder / f"{stage.recipe.stem}.{stage.upstream}"
    job = make_job(place / f"{world_size}_ranks", place / "corpus" / "out", weights=weights)
    regions = {"regions": place / "regions"} if stage.reads_regions else {}
    return _Training(stage.config, replace(job, inputs={**job.inputs, **regions}, seed=7))


def begun(method: Method, seed: int = 0) -> Method:
    """Ready to train, no weight as it was initialised: what begins at 0 would hide what lies behind it."""
    torch.manual_seed(seed)
    method.begin()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    return method.train()


def wide(batch: Batch) -> Batch:
    """In float64."""
    return batch._each(lambda x: x.double() if x.is_floating_point() else x, lambda text: text)


def plain_steps(method: Method, made: Any) -> dict[str, Any]:
    """Losses of two steps in float64, their terms' names, and the last gradients, averaged over ranks."""
    method = begun(method).double()
    engine = PlainEngine(Objective(method, made.config.losses))
    losses: list[dict[str, Tensor]] = []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        method.zero_grad()
        losses.append(engine.backward_of(wide(made.batches.load(step).batch), None)[1])
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if dist.is_initialized():
                    dist.all_reduce(gradient)
                    gradient /= dist.get_world_size()
                gradients[name] = gradient.clone()
                parameter.data -= RATE * gradient
        method.after_step()
    return {"losses": losses, "gradients": gradients, "kept": kept(method)}


def kept(method: Method) -> dict[str, Tensor]:
    """What only training needs: teachers, queues, centres."""
    state = method.state_dict()
    return {name: value.clone() for name, value in state.items() if name.startswith(method.training_only)}


def gradients_in_fp32(method: Method, made: Any) -> dict[str, Any]:
    """The largest gradient of each trainable parameter; None: it has none."""
    method = begun(method)
    terms = method(made.batches.load(0).batch)
    total, losses, _ = Objective(method, made.config.losses)._weighed(terms)
    total.backward()
    return {
        "terms": sorted(terms.losses),
        "fp32_losses": {name: float(loss) for name, loss in losses.items()},
        "largest": {
            name: None if p.grad is None else float(p.grad.abs().max())
            for name, p in method.named_parameters()
            if p.requires_grad
        },
    }


def resumed(stage: Stage, folder: Path, world_size: int) -> dict[str, Any]:
    """A step, a checkpoint, another step; and that step once more by another engine from the checkpoint."""
    straight = engine_of(stage, folder, world_size, seed=0)
    first = step_of(straight, 0)
    place = folder / stage.id / "checkpoint"
    writer = Writer(place)
    straight[0].save(place, writer)
    assert writer.error is None
    if dist.is_initialized():
        dist.barrier()
    losses, state = step_of(straight, 1), held(straight[0])
    straight[0].close()
    other = engine_of(stage, folder, world_size, seed=1)  # other weights: nothing may be left of them
    other[0].load(place)
    again, state_again = step_of(other, 1), held(other[0])
    other[0].close()
    unequal = sorted(name for name in state if not torch.equal(state[name], state_again[name]))
    moved = len(state) == len(state_again) and first != losses
    return {"straight": losses, "again": again, "unequal": unequal, "moved": moved}


def engine_of(stage: Stage, folder: Path, world_size: int, seed: int) -> tuple[Engine, Any]:
    made = training(stage, folder, world_size)
    config = stage.config
    engine = Engine(
        begun(made.method, seed),
        config.losses,
        config.optimizer,
        read_deepspeed_config(config.deepspeed),
        batch_per_gpu=COUNT // world_size,
        gradient_clip=config.gradient_clip,
        contrast=config.contrast,
    )
    return engine, made.batches


def step_of(started: tuple[Engine, Any], step: int) -> dict[str, float]:
    engine, batches = started
    torch.manual_seed(stable_hash("conformance", step) % 2**31)
    result = engine.step(batches.load(step).batch, 1.0)
    assert result.applied
    return {name: float(loss) for name, loss in result.losses.items()}


def held(engine: Engine) -> dict[str, Tensor]:
    """All weights, whole, and what only training needs."""
    return engine.full_state() | kept(engine.method)


def exported(made: Any, folder: Path, stage: Stage) -> dict[str, Any]:
    """Embeddings of the model in evaluation mode, twice, and of the one that is written out and loaded."""
    method: Method = made.method
    method.begin()
    state = {n: v for n, v in method.state_dict().items() if not n.startswith(method.training_only)}
    out = folder / stage.id / "out"
    model_files.save(
        out,
        method,
        stage.config.model,
        tuple(stage.config.losses),
        made.tokenizer,
        transform=made.transform,
        max_length=made.max_length,
        state=state,
    )
    loaded = model_files.load(folder / stage.id)
    own = (method, made.transform, made.tokenizer, made.max_length)
    first, again = embeddings(*own, made), embeddings(*own, made)
    theirs = embeddings(loaded.method, loaded.transform, loaded.tokenizer, loaded.max_length, made)
    with evaluation_mode(method), torch.no_grad():
        batch = made.batches.load(0).batch
        raw = [embed_views(method, batch), method.embed_texts(made.tokenizer.encode(list(TEXTS), 20))]
    return {
        "lengths": torch.cat([rows.norm(dim=1) for rows in raw]),
        "different": min(len(np.unique(rows.round(6), axis=0)) for rows in first),
        "again": all(map(np.array_equal, first, again)),
        "loaded": all(map(np.array_equal, first, theirs)),
    }


def embed_views(method: Method, batch: Batch) -> Tensor:
    """Of a batch's pictures, as the method reads them."""
    if batch.regions is not None:
        assert isinstance(method, EmbedsRegions)
        return method.embed_regions(batch.regions)
    return method.embed_images(next(iter(batch.images.values())))


def embeddings(
    method: Method, transform: ImageTransform, tokenizer: Tokenizer, max_length: int, made: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Of the corpus's pictures and of TEXTS, as evaluation has them."""
    options: dict[str, Any] = {"batch": COUNT, "device": torch.device("cpu")}
    with evaluation_mode(method):
        images = embed_images(
            method, made.index, transform, max_pixels=10_000, regions=made.regions, **options
        )
        return images, embed_texts(method, tokenizer, TEXTS, max_length=max_length, **options)
