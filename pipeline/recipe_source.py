"""A recipe's text: YAML files joined by `extends:` and `--set`, and where each of its keys was written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.base import StageError


def nearest(word: str, allowed: Sequence[str]) -> str:
    """'; did you mean 'x'?' for the nearest spelling, or nothing."""
    close = get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


@dataclass(frozen=True)
class Source:
    """A recipe's values, resolved, and what is needed to say where a value comes from."""

    path: (
        Path  # the file named on the command line; relative paths in the recipe are relative to its directory
    )
    files: tuple[Path, ...]  # the files of the `extends` chain, the one named first
    overrides: tuple[str, ...]  # the `--set key=value` as given
    unresolved: dict[str, Any] = field(repr=False)
    values: dict[str, Any] = field(repr=False)

    def where(self, location: Sequence[str | int]) -> str:
        """'recipes/demo.yaml:31' or '--set a.b=c': the place that wrote the value at `location`."""
        location = list(self.written_as(location))
        for override in reversed(self.overrides):
            key = override.partition("=")[0].split(".")
            if [str(part) for part in location[: len(key)]] == key:
                return f"--set {override}"
        best = (
            0,
            str(self.path),
        )  # of all files, the one with the longest part of the location; then the first
        for file in self.files:
            depth, line = _locate(file, location)
            if depth > best[0]:
                best = (depth, f"{file}:{line}")
        for override in reversed(self.overrides):  # a key that --set made, on the way to a deeper one
            key = override.partition("=")[0].split(".")
            if best[0] < len(location) and key[: len(location)] == [str(part) for part in location]:
                return f"--set {override}"
        return best[1]

    def written_as(self, location: Sequence[str | int]) -> tuple[str | int, ...]:
        """The location with interpolations followed: stages.x.model.y is model.y where model is ${model}."""
        node: Any = self.unresolved
        for depth, part in enumerate(location):
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                break
            if isinstance(node, str) and node.startswith("${") and node.endswith("}") and ":" not in node:
                target: list[str | int] = [*node[2:-1].split("."), *location[depth + 1 :]]
                return self.written_as(target) if target != list(location) else tuple(location)
        return tuple(location)


def read(path: Path, overrides: Sequence[str] = (), what: str = "recipe") -> Source:
    """Read, merge and resolve a recipe. Raises StageError that names the file and line, key or override.

    `what` the file is called in errors: cluster files are read so too.
    """
    files = _chain(path, what)
    merged = OmegaConf.create({})
    for file in reversed(files):
        layer = _load(file, what)
        layer.pop("extends", None)
        merged = _merge(merged, layer, str(file))
    known_stages = list(merged.get("stages") or {}) if OmegaConf.is_dict(merged.get("stages")) else []
    for override in overrides:
        merged = _set(merged, override, known_stages)
    unresolved = OmegaConf.to_container(merged, resolve=False)
    try:
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise StageError(f"{path}: {_omegaconf_message(error)}") from error
    assert isinstance(unresolved, dict)
    assert isinstance(values, dict)
    return Source(path, tuple(files), tuple(overrides), unresolved, values)  # type: ignore[arg-type]


def _chain(path: Path, what: str) -> list[Path]:
    """The file and what it extends, and so on; refuses a circle."""
    chain = [path]
    while True:
        extends = _load(chain[-1], what).get("extends")
        if extends is None:
            return chain
        if not isinstance(extends, str):
            raise StageError(f"{chain[-1]}: extends: {extends!r} is not the name of one recipe file")
        base = Path(extends) if Path(extends).is_absolute() else chain[-1].parent / extends
        if base.resolve() in {file.resolve() for file in chain}:
            circle = " → ".join(file.name for file in [*chain, base])
            raise StageError(f"{chain[-1]}: extends: the recipes extend each other in a circle: {circle}")
        if not base.is_file():
            raise StageError(f"{chain[-1]}: extends: '{extends}' is no file{_beside(base, what)}")
        chain.append(base)


def _beside(path: Path, what: str) -> str:
    names = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    if not names:
        return ""
    return f"{nearest(path.name, names)}; {what}s in {path.parent}: {', '.join(names)}"


def _load(path: Path, what: str) -> DictConfig:
    if not path.is_file():
        raise StageError(f"{what} {path}: no such file{_beside(path, what)}")
    try:
        text = path.read_text(encoding="utf-8")
        is_mapping = isinstance(yaml.compose(text, Loader=yaml.SafeLoader), yaml.MappingNode)
        loaded = OmegaConf.create(text) if is_mapping else None
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise StageError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    except OmegaConfBaseException as error:
        raise StageError(f"{path}: {_omegaconf_message(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise StageError(f"{path}: a {what} is a mapping (name: …), this is not")
    return loaded


def _merge(base: Any, layer: Any, origin: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise StageError(f"{origin}: {_omegaconf_message(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _set(merged: DictConfig, override: str, known_stages: list[str]) -> DictConfig:
    """Apply one `--set a.b=c`; the value is YAML. Which keys exist is the models' affair, but for stages."""
    key, equals, _ = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise StageError(f"--set {override}: write key=value, say --set stages.finetune.epochs=14")
    if parts[0] == "stages" and len(parts) > 2 and parts[1] not in known_stages:
        raise StageError(
            f"--set {override}: there is no stage '{parts[1]}'{nearest(parts[1], known_stages)}; "
            f"stages: {', '.join(map(str, known_stages))}"
        )
    try:
        value = OmegaConf.select(OmegaConf.from_dotlist([f"value={override.partition('=')[2]}"]), "value")
        OmegaConf.update(merged, key, value, merge=True, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise StageError(f"--set {override}: {_omegaconf_message(error)}") from error
    return merged


def _omegaconf_message(error: Exception) -> str:
    """The first line of what OmegaConf says, led by the full key."""
    key = getattr(error, "full_key", None)
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{key}: {text}" if key else text


def _locate(file: Path, location: Sequence[str | int]) -> tuple[int, int]:
    """How many leading parts of the location the file has, and the line of the last of them."""
    node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    depth, line = 0, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
        depth += 1
    return depth, line
