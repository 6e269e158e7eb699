"""The cluster file: where jobs run and what they are given, as frozen models validated like recipes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from pipeline import recipe_errors, recipe_source
from pipeline.recipe_source import nearest
from stages.base import Frozen, StageError

# Names that SLURM itself gives meaning to: no quote, space or `$` is part of one.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+:-]*$", max_length=128)]
Names = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+:,\[\]-]*$", max_length=1024)]
Constraint = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_\[(][A-Za-z0-9_&|*()\[\].-]*$", max_length=256)
]
Memory = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*[KMGT]$")]
TimeLimit = Annotated[str, StringConstraints(pattern=r"^(\d+-)?\d{1,3}:\d{2}:\d{2}$")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$")]  # anything that fits on one line
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

_OPTION = re.compile(r"^--([a-z][a-z-]+)(=[^\x00-\x1f\x7f]+)?$")
# What submit itself says of a job: an option again would contradict it, or break the chain of stages.
_OWN_OPTIONS = frozenset(
    "account array begin chdir comment constraint cpus-per-task dependency error exclude export gres "
    "gpus gpus-per-node gpus-per-task job-name kill-on-invalid-dep mem nodes no-requeue ntasks "
    "ntasks-per-node open-mode output parsable partition qos requeue reservation signal time wait wrap".split()
)


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
    mounts: tuple[Line, ...] = Field(default=(), description="folders that the image sees too: /scratch")
    python: Line = Field(default="python", description="in the image")

    @field_validator("mounts")
    @classmethod
    def _no_commas(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            if "," in mount:
                raise ValueError(f"'{mount}': a comma separates mounts and cannot be part of one")
        return mounts


class Conda(Frozen):
    root: Line = Field(description="where conda is installed: /opt/miniforge3")
    name: Line = Field(description="of the environment, or its folder")


class Environment(Frozen):
    """What a job sets up before Python starts, in this order."""

    modules: tuple[Line, ...] = Field(default=(), description="`module load` each")
    source: Line | None = Field(default=None, description="a bash file of your own, sourced by the job")
    venv: Line | None = Field(default=None, description="folder of a virtual environment")
    conda: Conda | None = None
    container: Container | None = None
    variables: dict[Variable, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        default_factory=dict, description="exported: NCCL_SOCKET_IFNAME …"
    )

    @model_validator(mode="after")
    def _one_python(self) -> "Environment":
        given = [name for name in ("venv", "conda", "container") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: {' and '.join(given)} both give the Python; leave one out")
        for name, value in self.variables.items():
            if any(ord(character) < 32 for character in value):
                raise ValueError(f"variables.{name}: a control character in {value!r}; one line each")
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
    scratch: Line | None = Field(
        default=None, description="fast disk of a node, for what may be lost: TMPDIR of the job"
    )
    save_s: int = Field(
        default=300,
        ge=30,
        le=65535,
        description="seconds before the time limit at which a job is told to save",
    )
    restarts: Restarts = Restarts()
    sbatch_options: tuple[Line, ...] = Field(
        default=(), description="any other option of sbatch, for every job: --mail-type=FAIL"
    )

    @field_validator("sbatch_options")
    @classmethod
    def _are_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            found = _OPTION.match(option)
            if found is None:
                raise ValueError(f"'{option}' is no long option of sbatch; write --name or --name=value")
            if found[1] in _OWN_OPTIONS:
                raise ValueError(f"'{option}': --{found[1]} is said by `train`, `data` or submit itself")
        return options

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
        """Raise StageError where `stages` names one that the recipe has not, or a field of another kind."""
        for name, own in self.stages.items():
            if name not in distributed:
                raise StageError(
                    f"{path}: stages.{name}: the recipe has no such stage{nearest(name, list(distributed))}; "
                    f"its stages: {', '.join(distributed)}"
                )
            kind = TrainPlacement if distributed[name] else DataPlacement
            wrong = sorted(set(own.model_dump(exclude_none=True)) - set(kind.model_fields))
            if wrong:
                raise StageError(
                    f"{path}: stages.{name}.{wrong[0]}: not a field of a "
                    f"{'training' if distributed[name] else 'data'} stage; allowed: "
                    f"{', '.join(kind.model_fields)}"
                )


FOLDER = Path(__file__).resolve().parents[2] / "slurm" / "clusters"


def load(path: Path) -> Cluster:
    """Read a cluster file (YAML; `extends:` works as in recipes). Raises StageError, one line a mistake.

    A name alone ("a100_8x8") means the file of that name in slurm/clusters.
    """
    if not path.is_file() and path == Path(path.name) and (FOLDER / f"{path}.yaml").is_file():
        path = FOLDER / f"{path}.yaml"
    source = recipe_source.read(path, what="cluster file")
    try:
        return Cluster.model_validate(source.values)
    except ValidationError as error:
        raise recipe_errors.explain(error, Cluster, (), source) from error
