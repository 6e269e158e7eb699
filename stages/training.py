"""The config of a training stage, for pretrain and finetune alike; stages/training_run.py runs it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from data_tools.corpus_source import CORPUS_FIELDS
from learning import methods
from learning.evaluation.pairs import check_ranks_pairs
from learning.training.anomalies import AnomalyConfig
from learning.training.checkpoint import CheckpointConfig
from learning.training.contrast import ContrastConfig
from learning.training.ema import EmaConfig
from learning.training.loader import DataConfig
from learning.training.rates import OptimizerConfig
from learning.training.schedule import ScheduleConfig
from learning.training.split_regions import TOWER
from stages.base import Frozen, StageConfig
from stages.judged import Judged

# Of a DeepSpeed config: how the model is held and its gradients travel. The results are the same but for
# rounding, and one loads the other's checkpoints: a stage may go on with another ZeRO stage, or with offload.
HOLDING = ("zero_optimization", "communication_data_type")


class Vocabulary(Frozen):
    """Where the tokenizer comes from, when no upstream stage gives one."""

    kind: Literal["pieces", "words"] = Field(
        default="pieces", description="WordPiece, trained on the split's texts; or their most frequent words"
    )
    size: int = Field(default=8000, ge=1, description="of the vocabulary that the split's texts give")
    path: Path | None = Field(
        default=None, description="a vocab.txt, tokenizer.json, or a directory with one: not trained"
    )


class Validation(Judged):
    """What is asked of a split that is not trained on, between epochs."""

    split: str = "validation"
    every_epochs: int = Field(default=1, ge=1, description="the last epoch is always followed by one")
    batch: int = Field(default=256, ge=1, description="images, texts or matching pairs at a time, a rank")


class TrainingConfig(StageConfig):
    """What pretrain and finetune have in common."""

    cosmetic: ClassVar[frozenset[str]] = frozenset(
        {
            *(f"data.{name}" for name in CORPUS_FIELDS),
            "data.workers",
            "data.cache_mb",
            "checkpoint",
            "log_every_steps",
            "batch_per_gpu",
            "activation_checkpointing",
            "validation.batch",
            "validation.rerank.batch",
            "stall_limit_s",
            "anomalies.max_rewinds",  # it decides whether a run ends well, not what it makes then
            # as the number of ranks: how the batch is held, the same mathematics
            "contrast",
            "micro_batch",
        }
    )
    roles: ClassVar[tuple[str, ...]] = ("corpus",)
    optional_roles: ClassVar[tuple[str, ...]] = ("weights", "regions")
    distributed: ClassVar[bool] = True
    version: ClassVar[int] = 2  # dropout is drawn by step and rank

    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**32,
        description="of this stage alone, so that several runs have one corpus; null: the recipe's",
    )
    model: dict[str, Any] = Field(description="validated by the Config of the method that it names")
    losses: dict[str, float] = Field(
        min_length=1,
        description="weight of each loss in the sum; null: without it, where `extends` or --set gives one",
    )
    data: DataConfig = DataConfig()
    contrastive_batch: int = Field(
        ge=2, description="samples over all ranks that are contrasted with each other"
    )
    batch_per_gpu: int | None = Field(
        default=None, ge=1, description="checked: contrastive_batch = ranks × batch_per_gpu"
    )
    contrast: ContrastConfig = ContrastConfig()
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="samples that a rank embeds at a time (GradCache): the memory of so many, the gradients "
        "of the whole contrastive_batch, for one forward pass more; null: all at once",
    )
    epochs: int = Field(ge=1)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clip: float = Field(
        default=0.0, ge=0, description="largest norm of the whole gradient; 0: no limit"
    )
    ema: EmaConfig | None = Field(
        default=None, description="average the weights, for validation and for out/; null: off"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="compute each block again in backward: the same bits, less memory, more time",
    )
    compile: bool = Field(
        default=False, description="torch.compile the blocks of towers and fusion; not under ZeRO-3"
    )
    deepspeed: Path = Field(description="a DeepSpeed JSON of ds_configs/, relative to the recipe's file")
    checkpoint: CheckpointConfig = CheckpointConfig()
    anomalies: AnomalyConfig = AnomalyConfig()
    stall_limit_s: float | None = Field(
        default=600.0,
        ge=2,
        description="when no rank gets on for that long, the one behind is named and the run ends with exit "
        "code 76; three times as long until the first step is done; null: wait for ever",
    )
    log_every_steps: int = Field(default=10, ge=1)
    vocabulary: Vocabulary = Vocabulary()
    validation: Validation | None = Field(default=None, alias="validate")
    pick_best: str | None = Field(
        default=None,
        description="validation metric whose best weights out/ holds: val/rsum, val/r@m, val/auc, val/ndcg",
    )
    new_parts: tuple[str, ...] = Field(
        default=(),
        description="beginnings of names of parameters that upstream may lack: they start from scratch",
    )
    dropped_parts: tuple[str, ...] = Field(
        default=(),
        description="beginnings of names of parameters of the upstream weights that are left out here",
    )

    model_config = ConfigDict(populate_by_name=True)

    @field_validator("losses", mode="before")
    @classmethod
    def _without(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: weight for name, weight in values.items() if weight is not None}

    @field_validator("model")
    @classmethod
    def _model(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            methods.parse_config(values)
        except ValidationError as error:
            raise ValueError("; ".join(_explained(error))) from error
        return values

    @model_validator(mode="after")
    def _losses(self) -> "TrainingConfig":
        allowed = methods.module(str(self.model["method"])).METHOD.available_losses
        unknown = sorted(set(self.losses) - set(allowed))
        if unknown:
            raise ValueError(
                f"losses: {', '.join(unknown)} is not a loss of {self.model['method']}; "
                f"allowed: {', '.join(allowed)}"
            )
        wrong = [name for name, weight in self.losses.items() if not weight > 0]
        if wrong:
            raise ValueError(
                f"losses: the weight of {', '.join(wrong)} must be above 0; leave a loss out instead"
            )
        if self.pick_best is not None and self.validation is None:
            raise ValueError("pick_best: needs `validate` with a split that is not the test split")
        if self.pick_best is not None and not self.pick_best.startswith("val/"):
            raise ValueError(f"pick_best: '{self.pick_best}' is no validation metric; say val/rsum")
        return self

    @model_validator(mode="after")
    def _pictures_or_regions(self) -> "TrainingConfig":
        vision = getattr(methods.parse_config(self.model), "vision", None)
        if getattr(vision, "tower", None) == TOWER and "regions" not in self.inputs:
            raise ValueError(
                "inputs.regions: missing; model.vision.tower is regions: name a regions stage of the corpus"
            )
        return self

    @model_validator(mode="after")
    def _validated(self) -> "TrainingConfig":
        if self.validation is None:
            return self
        field = self.validation.judges_pairs()
        pictures = self.validation.reads_pictures()
        if "regions" in self.inputs and pictures is not None:
            raise ValueError(
                f"validate.{pictures}: reads pictures, and inputs.regions is given; leave it out"
            )
        if field is not None:
            try:
                check_ranks_pairs(methods.module(str(self.model["method"])).METHOD)
            except ValueError as error:
                raise ValueError(f"validate.{field}: {error}") from error
        name = (self.pick_best or "").removeprefix("val/")
        if self.pick_best is not None and not self.validation.has_metric(name):
            raise ValueError(
                f"pick_best: '{self.pick_best}' is no metric of `validate` as it is set; "
                f"say val/{self.validation.best_metric()}"
            )
        return self

    def files(self) -> dict[str, Path]:
        found = {"deepspeed": self.deepspeed}
        if self.vocabulary.path is not None:
            found["vocabulary.path"] = self.vocabulary.path
        found |= {f"model.{name}": Path(value) for name, value in _weights_in(self.model)}
        return found | self.data.files()

    def addresses(self) -> dict[str, str]:
        return self.data.addresses()

    def named_elsewhere(self) -> frozenset[str]:
        return self.data.named_elsewhere()

    def ranks_wanted(self) -> int | None:
        """As contrastive_batch and batch_per_gpu say."""
        return None if self.batch_per_gpu is None else self.contrastive_batch // self.batch_per_gpu

    def what_counts(self, field: str, path: Path) -> str | None:
        """Of the DeepSpeed config, all but HOLDING: precision above all."""
        if field != "deepspeed":
            return None
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # the stage tells what is wrong with it when it reads it
        if not isinstance(config, dict):
            return None
        return json.dumps({key: value for key, value in config.items() if key not in HOLDING}, sort_keys=True)


def _weights_in(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _weights_in(value, f"{before}{key}.")
        elif key == "weights" and value is not None:
            yield f"{before}{key}", str(value)


def _explained(error: ValidationError) -> Iterator[str]:
    for one in error.errors():
        place = ".".join(str(part) for part in one["loc"])
        yield f"{place or 'model'}: {one['msg']}, got {one['input']!r:.80}"
