"""What is wrong with a recipe, said so that it can be mended: place, full field, value, what is allowed."""

import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.recipe_source import Source, nearest
from stages.base import StageError


def is_name(text: object) -> bool:
    """Whether a stage's name can be a directory's."""
    return isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


def explain(
    error: ValidationError, model: type[BaseModel], prefix: Sequence[str | int], source: Source
) -> StageError:
    """A StageError with one line a mistake. `prefix` is where the model's values stand in the recipe."""
    lines = []
    for item in _items(error):
        location, owner = _follow(model, item["loc"], _dig(source.values, prefix))
        lines.append(_line(item, location, owner, tuple(prefix), source))
    return StageError("\n".join(dict.fromkeys(lines)))


def _items(error: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's items; one that a validator raised from another ValidationError becomes the other's."""
    found = []
    for item in error.errors():
        inner = getattr(item.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(inner, ValidationError):
            found += [{**one, "loc": (*item["loc"], *one["loc"])} for one in _items(inner)]
        else:
            found.append(dict(item))
    return found


def _line(
    item: dict[str, Any],
    location: tuple[str | int, ...],
    owner: type[BaseModel] | None,
    prefix: tuple[str | int, ...],
    source: Source,
) -> str:
    problem = _problem(item, location, owner)
    field, colon, rest = problem.partition(": ")
    if colon and item["type"] == "value_error":  # a validator may name the field itself
        inner = field.split(".")
        if location and inner[0] == location[-1]:
            location, problem = (*location, *inner[1:]), rest
        elif _leads_to_field(field, item["input"]):
            location, problem = (*location, *inner), rest
    full = (*prefix, *location)
    written = source.written_as(full)
    dotted = ".".join(map(str, full))
    if written != full:
        dotted += f" (written as {'.'.join(map(str, written))})"
    return f"{source.where(full)}: {dotted}: {problem}"


def _leads_to_field(field: str, value: Any) -> bool:
    """Whether a message's beginning is the name of a field inside the value (or of a model made of it)."""
    names = [name for name in field.split(".") if name]
    if not names or " " in field:
        return False
    if isinstance(value, BaseModel):
        value = value.model_dump(by_alias=True)
    return isinstance(value, dict) and names[0] in value


def _problem(item: dict[str, Any], location: Sequence[str | int], owner: type[BaseModel] | None) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        fields = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
        hint = nearest(str(location[-1]), fields) if location else ""
        allowed = f"; allowed: {', '.join(fields)}" if fields else ""
        return f"unknown key (its value is {_shown(value)}){hint}{allowed}"
    if kind == "missing":
        return "missing; it has no default"
    if kind in ("literal_error", "enum"):
        allowed_values = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        hint = nearest(str(value), allowed_values)
        return f"{_shown(value)} is not allowed{hint}; allowed: {context.get('expected')}"
    if kind == "value_error":
        return _with_suggestion(str(context.get("error", item["msg"])))
    if kind == "union_tag_not_found":
        field = str(context.get("discriminator", "")).split(" | ")[-1].strip("'")
        return f"{_shown(value)}: {field}: missing; it says which kind this is"
    if kind == "union_tag_invalid":
        return f"'{context.get('tag')}' is not allowed; allowed: {context.get('expected_tags')}"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{_shown(value)}: {message.replace('input should', 'it should')}"


def _with_suggestion(message: str) -> str:
    """Add the nearest spelling to a message of the form "… 'x' … allowed: a, b"."""
    found = re.search(r"'([^']+)'.*allowed: ([\w, .+-]+)", message)
    if not found or "did you mean" in message:
        return message
    return message + nearest(found[1], [word.strip() for word in found[2].split(",")])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _dig(values: Any, location: Sequence[str | int]) -> Any:
    for part in location:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _follow(
    model: type[BaseModel], location: Sequence[str | int], values: Any
) -> tuple[tuple[str | int, ...], type[BaseModel] | None]:
    """The location as the recipe writes it, and the model that the last part of it is a key of.

    Pydantic's location also has the tags of unions; they are left out. A method's own Config is behind the
    free `model` section of a training stage: it is found by the name of the method.
    """
    kept: list[str | int] = []
    owner: type[BaseModel] | None = model
    candidates: list[Any] = [model]
    for part in location:
        if kept == ["model"] and isinstance(values, dict) and "method" in values:
            candidates = _method_config(values)
        step = _step(candidates, part)
        if step is None and not _has(values, part):
            continue  # the tag of a union
        kept.append(part)
        owner = _owner(candidates, values)
        candidates = step or []
        values = _dig(values, [part])
    return tuple(kept), owner


def _owner(candidates: Sequence[Any], values: Any) -> type[BaseModel] | None:
    """The model among the candidates; of several, the one whose tags `values` has."""
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return next((model for model in models if _has_tags(model, values)), models[0] if models else None)


def _has_tags(model: type[BaseModel], values: Any) -> bool:
    """Whether every field of one allowed value (`tower: clip`) has that value, written or by default."""
    for name, field in model.model_fields.items():
        allowed = typing.get_args(field.annotation)
        if typing.get_origin(field.annotation) is typing.Literal and len(allowed) == 1:
            written = field.alias or name
            found = values.get(written, field.default) if isinstance(values, dict) else field.default
            if found != allowed[0]:
                return False
    return True


def _has(values: Any, part: str | int) -> bool:
    if isinstance(values, dict):
        return part in values
    return isinstance(part, int) and isinstance(values, list) and part < len(values)


def _method_config(values: dict[str, Any]) -> list[Any]:
    from learning import methods  # imports torch: here alone, where a mistake is being explained

    name = values.get("method")
    return [methods.module(name).Config] if name in methods.names() else []


def _step(candidates: Sequence[Any], part: str | int) -> list[Any] | None:
    """The types that a value at `part` may have under any of the candidates; None if none has such a part."""
    found: list[Any] = []
    for candidate in candidates:
        origin, arguments = typing.get_origin(candidate), typing.get_args(candidate)
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            for name, field in candidate.model_fields.items():
                if part in (name, field.alias):
                    found += _alternatives(field.annotation)
        elif origin is dict and len(arguments) == 2:
            found += _alternatives(arguments[1])
        elif origin in (list, tuple, set, frozenset) and arguments and isinstance(part, int):
            found += _alternatives(arguments[0])
    return found or None


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation itself; `Annotated` is taken off."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [a for argument in typing.get_args(annotation) for a in _alternatives(argument)]
    return [annotation]
