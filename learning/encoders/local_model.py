"""A tower's sizes, from a preset or as a local Hugging Face directory tells them, and that one's files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

Sizes = Mapping[str, int | str]


def resolve_sizes(
    values: Any, presets: Mapping[str, Mapping[str, int]], read: Callable[[Path], Sizes], what: str
) -> Any:
    """The values of a tower's section with a preset's sizes spelt out: for a validator, before the fields'.

    A local model's sizes must be in the recipe: a saved model needs them when the directory is gone. Where
    they are missing, the ValueError says them, as `read` finds them in the directory; `what` is named there.
    """
    if not isinstance(values, dict):
        return values

    def told(directory: Path) -> str:
        sizes = ", ".join(f"{field}: {size}" for field, size in read(directory).items())
        return f"for this {what} say {{{sizes}, weights: {directory}}}"

    name = values.get("name")
    if name is None:
        absent = [field for field in next(iter(presets.values())) if field not in values]
        directory = Path(str(values.get("weights")))
        if absent and values.get("weights") is not None and (directory / "config.json").is_file():
            raise ValueError(f"{absent[0]}: missing; {told(directory)}")
        return values
    if name in presets:
        for field, size in presets[name].items():
            if values.get(field, size) != size:
                raise ValueError(
                    f"{field}: {values[field]}, but {name} has {size}; leave it out, or leave name out"
                )
        return {**presets[name], **values}
    if (Path(str(name)) / "config.json").is_file():
        raise ValueError(f"name: '{name}' is a directory, not a preset; {told(Path(str(name)))}")
    raise ValueError(f"name: '{name}' is not a preset; allowed: {', '.join(presets)}, or null with sizes")


def read_config(directory: Path, section: str) -> dict[str, Any]:
    """What config.json holds. `section` of the recipe, model.text, begins the ValueError's message."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{section}: {path}: cannot be read: {error}; give a local HF directory") from error
    if not isinstance(content, dict):
        raise ValueError(f"{section}: {path}: holds no JSON object; give a local HF directory")
    return content


def check_sizes(config: BaseModel, directory: Path, sizes: Sizes, section: str) -> None:
    """Raises ValueError where the recipe's section says another size than the directory's config.json."""
    for name, value in sizes.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{section}.weights: {directory / 'config.json'}: {name} is {value}, but the recipe's "
                f"{section}.{name} is {getattr(config, name)}; set it to {value}"
            )


def weights_file(directory: Path, section: str) -> Path:
    """The file of weights in the directory. Raises ValueError where there is none."""
    files = [directory / name for name in ("model.safetensors", "pytorch_model.bin")]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"{section}.weights: {directory}: has neither model.safetensors nor pytorch_model.bin"
        )
    return path
