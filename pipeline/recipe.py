"""The recipe: what to train, as frozen models. `load` reads, validates and explains what is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from pipeline import recipe_errors, recipe_source
from pipeline.recipe_source import Source, nearest
from stages.base import KINDS, Frozen, StageConfig, StageError, iter_kinds, stage_module

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # a name becomes a directory


class Tracking(Frozen):
    """Where MLflow is. `metrics.jsonl` is written in any case."""

    uri: str | None = Field(
        default=None, description="MLflow tracking URI; null: sqlite:///<root>/mlflow.db; 'off': no MLflow"
    )
    experiment: str = Field(default="tandem", min_length=1, description="MLflow experiment")

    @field_validator("uri", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false


class Launch(Frozen):
    """How a stage is started on this machine. It shapes no result, so no fingerprint knows it."""

    processes: int = Field(
        default=1, ge=1, description="processes of a distributed stage: one a GPU, or one a core"
    )
    threads_per_process: int = Field(
        default=1, ge=1, description="OMP_NUM_THREADS of each; threads ≤ free cores"
    )


class Head(Frozen):
    """A recipe without its stages."""

    name: str = Field(pattern=NAME, description="names the run directory: <root>/<name>")
    description: str = ""
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of everything random; part of every fingerprint"
    )
    tracking: Tracking = Tracking()
    launch: Launch = Launch()
    reuse: tuple[Annotated[str, Field(pattern=NAME)], ...] = Field(
        default=(),
        description="names of other recipes, of which this one has stages by `extends`: what they have done "
        "under the same root is taken from there, where nothing that shapes it differs",
    )
    model: dict[str, Any] = Field(
        default_factory=dict,
        description='for stages to refer to: `model: "${model}"`; checked where it is used',
    )
    samples: dict[str, int] = Field(
        default_factory=dict,
        description="stage: samples of its training split, for a plan's steps before that corpus is there",
    )
    truth: Path | None = Field(
        default=None, description="a file of right answers that the report alone reads"
    )
    stages: dict[str, dict[str, Any] | None] = Field(
        min_length=1,
        description="in order: a stage's inputs stand before it; null leaves a stage of `extends` out",
    )


@dataclass(frozen=True)
class Recipe:
    """A valid recipe: the head, the stages' configs in order, and where it was read."""

    head: Head
    stages: Mapping[str, StageConfig]
    source: Source

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def directory(self) -> Path:
        """Relative paths in the recipe are relative to this."""
        return self.source.path.resolve().parent

    @property
    def truth(self) -> Path | None:
        return None if self.head.truth is None else self.directory / self.head.truth

    def descendants(self, stage: str) -> list[str]:
        """The stages that read `stage`, directly or through others, in order."""
        reached = {stage}
        for name, config in self.stages.items():
            if reached & set(config.inputs.values()):
                reached.add(name)
        return [name for name in self.stages if name in reached - {stage}]

    def need(self, stage: str, option: str) -> str:
        """`stage` if there is such a stage; else a StageError that lists them."""
        if stage not in self.stages:
            names = list(self.stages)
            raise StageError(
                f"{option}: there is no stage '{stage}'{nearest(stage, names)}; stages: {', '.join(names)}"
            )
        return stage


def load_head(path: Path, overrides: Sequence[str] = ()) -> tuple[Head, Source]:
    """Read the recipe and check all but the stages' own fields: quick, no stage module is imported."""
    source = recipe_source.read(path, overrides)
    try:
        head = Head.model_validate(source.values)
    except ValidationError as error:
        raise recipe_errors.explain(error, Head, (), source) from error
    for name, values in head.stages.items():
        if not recipe_errors.is_name(name):
            raise StageError(
                f"{source.where(['stages', name])}: stages.{name}: a stage's name is made of letters, "
                "digits, '.', '_' and '-', and begins with a letter or digit"
            )
        if values is not None and not isinstance(values.get("kind"), str):
            raise StageError(
                f"{source.where(['stages', name])}: stages.{name}.kind: "
                f"{'missing' if 'kind' not in values else repr(values['kind'])}; allowed: {', '.join(KINDS)}"
            )
    present = {name: values for name, values in head.stages.items() if values is not None}
    _check_order(source, present)
    _check_regions(source, present)
    return head, source


def load(path: Path, overrides: Sequence[str] = (), until: str | None = None) -> Recipe:
    """Read and validate a recipe. Raises StageError with one line a mistake.

    With `until`, only that stage and what it reads are validated (and their modules imported).
    """
    head, source = load_head(path, overrides)
    present = {name: values for name, values in head.stages.items() if values is not None}
    wanted = set(present) if until is None else _ancestors(until, present)
    stages = {name: _stage(name, values, source) for name, values in present.items() if name in wanted}
    return Recipe(head, stages, source)


def _ancestors(stage: str, present: Mapping[str, Mapping[str, Any]]) -> set[str]:
    if stage not in present:
        raise StageError(
            f"there is no stage '{stage}'{nearest(stage, list(present))}; stages: {', '.join(present)}"
        )
    reached: set[str] = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [str(other) for other in _inputs(present[name]).values()]
    return reached


def _inputs(values: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = values.get("inputs")
    return inputs if isinstance(inputs, Mapping) else {}


def _check_order(source: Source, present: Mapping[str, Mapping[str, Any]]) -> None:
    """Each input is an earlier stage. Told apart: no such stage, itself, a circle, a later one."""
    order = list(present)
    for name, values in present.items():
        for role, other in _inputs(values).items():
            place = f"{source.where(['stages', name, 'inputs', role])}: stages.{name}.inputs.{role}: "
            if other not in present:
                left_out = " (it is set to null)" if other in source.values["stages"] else ""
                raise StageError(
                    f"{place}'{other}' is not a stage of this recipe{left_out}{nearest(str(other), order)}; "
                    f"earlier stages: {', '.join(order[: order.index(name)]) or 'none'}"
                )
            if other == name:
                raise StageError(f"{place}stage '{name}' reads itself; name an earlier stage")
            if name in _ancestors(other, present):
                raise StageError(
                    f"{place}'{other}' and '{name}' read each other in a circle; a stage reads earlier ones"
                )
            if order.index(other) > order.index(name):
                raise StageError(f"{place}stage '{other}' stands after '{name}'; move '{other}' before it")


def _check_regions(source: Source, present: Mapping[str, Mapping[str, Any]]) -> None:
    """What is read as regions is made by a regions stage, or by a stage of one's own."""
    for name, values in present.items():
        other = _inputs(values).get("regions")
        kind = present[other].get("kind") if other is not None else None
        if kind in KINDS and kind != "regions":
            raise StageError(
                f"{source.where(['stages', name, 'inputs', 'regions'])}: stages.{name}.inputs.regions: "
                f"'{other}' is a {kind} stage; name one of kind regions"
            )


def _stage(name: str, values: dict[str, Any], source: Source) -> StageConfig:
    """One stage's config, with its roles checked."""
    location = ("stages", name)
    try:
        config_class: type[StageConfig] = stage_module(values["kind"]).Config
    except StageError as error:
        hint = nearest(values["kind"], KINDS)
        raise StageError(f"{source.where([*location, 'kind'])}: stages.{name}.kind: {error}{hint}") from error
    try:
        config = config_class.model_validate(values)
    except ValidationError as error:
        raise recipe_errors.explain(error, config_class, location, source) from error
    allowed = tuple(dict.fromkeys((*config.roles, *config.optional_roles, *sorted(config.roles_named()))))
    for role in config.inputs:
        if role not in allowed:
            raise StageError(
                f"{source.where([*location, 'inputs', role])}: stages.{name}.inputs.{role}: unknown input of "
                f"a {config.kind} stage{nearest(role, allowed)}; allowed: {', '.join(allowed) or 'none'}"
            )
    for role in sorted(config.named_elsewhere() & config.inputs.keys()):
        raise StageError(
            f"{source.where([*location, 'inputs', role])}: stages.{name}.inputs.{role}: another field names "
            "it too; leave one of them out"
        )
    for role in config.roles:
        if role not in config.inputs and role not in config.named_elsewhere():
            raise StageError(
                f"{source.where([*location, 'inputs'])}: stages.{name}.inputs.{role}: missing; "
                f"a {config.kind} stage needs `inputs: {{{role}: <an earlier stage>}}`"
            )
    return config


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    definitions: dict[str, Any] = {}
    kinds = []
    for kind, config_class in iter_kinds():
        part = config_class.model_json_schema(ref_template=f"#/$defs/{kind}.{{model}}")
        definitions |= {f"{kind}.{key}": value for key, value in part.pop("$defs", {}).items()}
        part["required"] = sorted({*part.get("required", []), "kind"})
        part["properties"]["kind"] = {"const": kind}
        definitions[kind] = part
        kinds.append({"$ref": f"#/$defs/{kind}"})
    whole = Head.model_json_schema()
    whole["$defs"] = {**whole.get("$defs", {}), **definitions}
    own = {
        "type": "object",
        "properties": {"kind": {"type": "string", "pattern": r"\."}},
        "required": ["kind"],
    }
    whole["properties"]["stages"]["additionalProperties"] = {"anyOf": [*kinds, own, {"type": "null"}]}
    whole["properties"]["extends"] = {"type": "string", "description": "a recipe file that this one changes"}
    whole["required"] = []  # with `extends`, any part may come from the other file
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Tandem recipe", **whole}
