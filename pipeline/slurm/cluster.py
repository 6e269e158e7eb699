"""The cluster file: where jobs run and what they are given, as frozen models validated like recipes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from pipeline import recipe_errors, recipe_source
from pipeline.recipe_source import nearest
from stages.base import Frozen, StageError


@dataclass(frozen=True)
class Spelling:
    """Of a string: the pattern that the whole of it matches, and what that means in words, for errors."""

    pattern: str
    words: str
    most: int = 4096

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$", "maxLength": self.most}

    def _check(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:
            raise ValueError(f"{value!r}: write {self.words}")
        if len(value) > self.most:
            raise ValueError(f"{value[:40]!r}…: {len(value)} characters; at most {self.most}")
        return value


# Names that SLURM itself gives meaning to: no quote, space or `$` is part of one.
_IN_NAME = "letters, digits and _ . @ + : -"
Name = Annotated[str, Spelling(r"[A-Za-z0-9][A-Za-z0-9_.@+:-]*", f"one name: {_IN_NAME}", 128)]
Names = Annotated[
    str, Spelling(r"[A-Za-z0-9][A-Za-z0-9_.@+:,\[\]-]*", f"names with commas: {_IN_NAME} [ ]", 1024)
]
Constraint = Annotated[
    str,
    Spelling(
        r"[A-Za-z0-9_\[(][A-Za-z0-9_&|*()\[\].-]*",
        "features joined by & or |, no spaces: a100&ib",
        256,
    ),
]
Memory = Annotated[str, Spelling("[1-9][0-9]*[KMGT]", "a whole number and K, M, G or T: 480G")]
_TIME_WORDS = "[days-]hours:minutes:seconds in quotes: '2-00:00:00', '01:30:00'"


def _no_number(value: Any) -> Any:
    if isinstance(value, int | float):  # YAML takes 24:00:00 for a number of base 60
        raise ValueError(f"{value!r} is a number: write {_TIME_WORDS}")
    return value


TimeLimit = Annotated[
    str, BeforeValidator(_no_number), Spelling(r"(\d{1,3}-)?\d{1,3}:[0-5]\d:[0-5]\d", _TIME_WORDS)
]
_ONE_LINE = r"[^\x00-\x1f\x7f]"
Line = Annotated[str, Spelling(f"{_ONE_LINE}+", "text of one line, without control characters")]
# Jobs run in the run root: a relative path would mean another place than beside this file.
Absolute = Annotated[
    str, Spelling(f"/{_ONE_LINE}*", "a path from the root, on one line; ~ and $NAME are not expanded")
]
Mount = Annotated[
    str,
    Spelling(r"/[^\x00-\x1f\x7f,]*", "a path from the root without a comma, or two: /outside:/inside"),
]
# bash refuses to set these, and the job would end there
_READ_ONLY = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID")
Variable = Annotated[
    str,
    Spelling(
        f"(?!(?:{'|'.join(_READ_ONLY)})$)[A-Za-z_][A-Za-z0-9_]*",
        f"a variable's name: letters, digits and _, and none of {', '.join(_READ_ONLY)}",
    ),
]
Value = Annotated[
    str,
    Field(coerce_numbers_to_str=True),
    Spelling(f"{_ONE_LINE}*", "text of one line, without control characters"),
]

# What submit itself says of a job: an option again would contradict it, or break the chain of stages.
_SAID = (
    "account array begin chdir clusters comment constraint cpus-per-gpu cpus-per-task dependency error "
    "exclude export export-file gpus gpus-per-node gpus-per-socket gpus-per-task gres help job-name "
    "kill-on-invalid-dep mem nodefile nodes no-kill no-requeue ntasks ntasks-per-core ntasks-per-gpu "
    "ntasks-per-node ntasks-per-socket open-mode output parsable partition qos requeue reservation "
    "signal test-only time usage version wait wrap"
)
_OWN_OPTIONS = frozenset(_SAID.split())


def _own_option(option: str) -> str:
    name = option.removeprefix("--").partition("=")[0]
    own = [known for known in sorted(_OWN_OPTIONS) if known.startswith(name)]  # sbatch takes a beginning too
    if own:
        raise ValueError(
            f"{option!r}: --{name if name in own else own[0]} is said by `train`, `data` or submit itself; "
            "leave it out here"
        )
    return option


Option = Annotated[
    str,
    AfterValidator(_own_option),
    Spelling(f"--[a-z][a-z-]+(={_ONE_LINE}+)?", "a long option of sbatch: --name or --name=value"),
]


def seconds_of(limit: str) -> int:
    """A SLURM time limit ('2-00:00:00', '01:30:00') in seconds."""
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class Placement(Frozen):
    """What data jobs and training jobs have in common."""

    partition: Name | None = Field(default=None, description="null: the cluster's default")
    qos: Name | None = Field(default=None, description="null: the account's default")
    constraint: Constraint | None = Field(default=None, description="features that nodes must have")
    exclude: Names | None = Field(default=None, description="nodes never to use: node[3-4],node9")
    reservation: Name | None = None
    time_limit: TimeLimit = Field(description="[days-]hours:minutes:seconds; a stage that needs more goes on "
                                              "in the next run of its job")  # fmt: skip


class TrainPlacement(Placement):
    """Jobs of training and evaluation: one task a GPU."""

    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1, description="and as many tasks: one a GPU")
    gpu_type: Name | None = Field(default=None, description="as in gres.conf: --gres=gpu:TYPE:COUNT")
    cpus_per_gpu: int = Field(default=8, ge=1, description="for the loader's workers and threads")
    memory_per_node: Memory | None = Field(default=None, description="480G; null: the partition's default")


class DataPlacement(Placement):
    """Jobs of the data stages: one task, no GPU."""

    cpus: int = Field(default=8, ge=1, description="and as many worker processes")
    memory: Memory | None = Field(default=None, description="64G; null: the partition's default")
    tasks: int = Field(
        default=1, ge=1, le=1_000_000, description="parts of a stage that can be split (crawl): an array"
    )
    tasks_at_once: int | None = Field(default=None, ge=1, description="of an array; null: no limit")


class StagePlacement(Frozen):
    """What is different for one stage: any field of `train` or `data`."""

    partition: Name | None = None
    qos: Name | None = None
    constraint: Constraint | None = None
    exclude: Names | None = None
    reservation: Name | None = None
    time_limit: TimeLimit | None = None
    nodes: int | None = Field(default=None, ge=1)
    gpus_per_node: int | None = Field(default=None, ge=1)
    gpu_type: Name | None = None
    cpus_per_gpu: int | None = Field(default=None, ge=1)
    memory_per_node: Memory | None = None
    cpus: int | None = Field(default=None, ge=1)
    memory: Memory | None = None
    tasks: int | None = Field(default=None, ge=1, le=1_000_000)
    tasks_at_once: int | None = Field(default=None, ge=1)


class Container(Frozen):
    """The image that Tandem runs in."""

    kind: Literal["apptainer", "pyxis"]
    image: Line = Field(description="a .sif file (apptainer), a .sqsh file or registry#image (pyxis)")
    mounts: tuple[Mount, ...] = Field(default=(), description="folders that the image sees too: /scratch")
    python: Line = Field(default="python", description="in the image")

    @model_validator(mode="after")
    def _image_is_found_from_anywhere(self) -> "Container":
        if self.kind == "apptainer" and not (self.image.startswith("/") or "://" in self.image):
            raise ValueError(
                f"image: {self.image!r}: write a path from the root or an address (docker://…): jobs do not "
                "run in this file's folder"
            )
        return self


class Conda(Frozen):
    root: Absolute = Field(description="where conda is installed: /opt/miniforge3")
    name: Line = Field(description="of the environment, or its folder")


class Environment(Frozen):
    """What a job sets up before Python starts, in this order."""

    modules: tuple[Line, ...] = Field(default=(), description="`module load` each")
    source: Absolute | None = Field(default=None, description="a bash file of your own, sourced by the job")
    venv: Absolute | None = Field(default=None, description="folder of a virtual environment")
    conda: Conda | None = None
    container: Container | None = None
    variables: dict[Variable, Value] = Field(
        default_factory=dict, description="exported as they are: NCCL_SOCKET_IFNAME …"
    )

    @model_validator(mode="after")
    def _one_python(self) -> "Environment":
        given = [name for name in ("venv", "conda", "container") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: {' and '.join(given)} both give the Python; leave one out")
        return self


class Restarts(Frozen):
    """When a job is put back into the queue, and when it is given up."""

    failures: int = Field(
        default=5, ge=0, description="crashes and stalls of a stage, in all; the same one twice at the same "
        "step ends it at once"
    )  # fmt: skip
    total: int = Field(
        default=1000, ge=1, description="starts of a job for any reason, preemption and time limit included"
    )


class Cluster(Frozen):
    """A cluster file."""

    name: Name
    description: str = ""
    account: Name | None = Field(default=None, description="null: your default account")
    train: TrainPlacement
    data: DataPlacement
    stages: dict[str, StagePlacement] = Field(
        default_factory=dict, description="by stage: what is different from `train` or `data`"
    )
    environment: Environment = Environment()
    scratch: Absolute | None = Field(
        default=None,
        description="fast disk of a node, for what may be lost: the job's TMPDIR",
    )
    save_s: int = Field(
        default=300,
        ge=30,
        le=65535,
        description="seconds before the time limit at which it is told to save",
    )
    restarts: Restarts = Restarts()
    sbatch_options: tuple[Option, ...] = Field(
        default=(), description="any other option of sbatch, for every job: --mail-type=FAIL"
    )

    @model_validator(mode="after")
    def _save_fits(self) -> "Cluster":
        for where, limit in self._limits():
            if seconds_of(limit) < 2 * self.save_s:
                raise ValueError(
                    f"{where}.time_limit: {limit} is under twice save_s ({self.save_s} s): a job could do "
                    "nothing but save; raise the limit or lower save_s"
                )
        return self

    def _limits(self) -> list[tuple[str, str]]:
        own = [(f"stages.{name}", stage.time_limit) for name, stage in self.stages.items()]
        return [("train", self.train.time_limit), ("data", self.data.time_limit)] + [
            (where, limit) for where, limit in own if limit is not None
        ]

    def train_placement(self, stage: str) -> TrainPlacement:
        """What a job of a training or evaluation stage is given."""
        return TrainPlacement.model_validate(self._merged(stage, self.train))

    def data_placement(self, stage: str) -> DataPlacement:
        """What a job of a data stage is given."""
        return DataPlacement.model_validate(self._merged(stage, self.data))

    def _merged(self, stage: str, base: Placement) -> dict[str, Any]:
        own = self.stages.get(stage)
        changed = {} if own is None else own.model_dump(exclude_none=True)
        return base.model_dump() | changed

    def check_stages(self, distributed: Mapping[str, bool], path: Path) -> None:
        """Raise StageError where `stages` names one that the recipe has not, or a field of another kind.

        `distributed`: of each stage of the recipe, whether it trains; `path`: what `load` was given.
        """
        for name, own in self.stages.items():
            if name not in distributed:
                raise StageError(
                    f"{_place(path, name)}: the recipe has no such stage{nearest(name, list(distributed))}; "
                    f"its stages: {', '.join(distributed)}"
                )
            kind = TrainPlacement if distributed[name] else DataPlacement
            wrong = [field for field in own.model_dump(exclude_none=True) if field not in kind.model_fields]
            if wrong:
                raise StageError(
                    f"{_place(path, name, wrong[0])}: not a field of a "
                    f"{'training' if distributed[name] else 'data'} stage; allowed: "
                    f"{', '.join(kind.model_fields)}"
                )


FOLDER = Path(__file__).resolve().parents[2] / "slurm" / "clusters"
_WHAT = "cluster file"


def load(path: Path) -> Cluster:
    """Read a cluster file (YAML; `extends:` works as in recipes). Raises StageError, one line a mistake.

    A name alone ("a100_8x8") means the file of that name in slurm/clusters.
    """
    source = recipe_source.read(_find(path), what=_WHAT)
    try:
        return Cluster.model_validate(source.values)
    except ValidationError as error:
        raise recipe_errors.explain(error, Cluster, (), source) from error


def schema() -> dict[str, Any]:
    """The JSON schema of a cluster file, for editors."""
    whole = Cluster.model_json_schema()
    whole["properties"]["extends"] = {
        "type": "string",
        "description": "a cluster file that this one changes",
    }
    whole["required"] = []  # with `extends`, any part may come from the other file
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "Tandem cluster file",
    }


def _find(path: Path) -> Path:
    if path.is_file() or path != Path(path.name) or path.suffix:
        return path
    shipped = FOLDER / f"{path}.yaml"
    if not shipped.is_file():
        names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        raise StageError(
            f"--cluster {path}: no such file, and none of that name in {FOLDER}{nearest(str(path), names)}; "
            f"there: {', '.join(names)}"
        )
    return shipped


def _place(path: Path, *location: str) -> str:
    """'slurm/clusters/own.yaml:12: stages.crawl.nodes': where the file says it."""
    source = recipe_source.read(_find(path), what=_WHAT)
    full = ("stages", *location)
    return f"{source.where(full)}: {'.'.join(full)}"
