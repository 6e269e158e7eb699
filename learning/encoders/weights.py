"""Reads a tower's weights from a local file and fits them to a module, strictly by key and shape."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

SHOWN = 3  # keys that an error names


def read_weights(path: Path, field: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .bin file, by name; no code in it is run (`weights_only`).

    `field` is the recipe's field, for errors. Raises ValueError for a file that is missing, of another
    kind, or unreadable.
    """
    if not path.is_file():
        raise ValueError(f"{field}: {path}: no such file; give a local .safetensors or .pth file, or null")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix in (".pth", ".pt", ".bin"):
            return _tensors(torch.load(path, map_location="cpu", weights_only=True), path, field)
    except ValueError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen kinds for a damaged file
        raise ValueError(f"{field}: {path}: cannot be read as weights: {error}") from error
    raise ValueError(f"{field}: {path}: is neither .safetensors nor .pth, .pt or .bin")


def _tensors(content: Any, path: Path, field: str) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{field}: {path}: holds no plain state dict (a mapping of names to tensors)")
    return content


def load_by_name(module: nn.Module, found: dict[str, Tensor], without: Iterable[str], where: str) -> None:
    """Copy `found` into `module`; the two must have the same names and shapes.

    `without`: beginnings of names that the file may have and the module has not (a classifier). Counters of
    batches in batch norm may be missing: old files have none. `where` begins the ValueError's message.
    """
    own = module.state_dict()
    found = {name: value for name, value in found.items() if not name.startswith(tuple(without))}
    missing = [name for name in own if name not in found and not _is_counter(name)]
    unexpected = [name for name in found if name not in own]
    if missing or unexpected:
        raise ValueError(
            f"{where}: does not fit the model: missing {_some(missing)}; unexpected {_some(unexpected)}; "
            "give the file of this very model (model.vision.name, model.text), or, for a timm model under "
            "other names in the same order, key_order: true"
        )
    for name, value in found.items():
        _check_shape(own[name], value, name, name, where)
    module.load_state_dict({**own, **found})


def load_by_order(module: nn.Module, found: dict[str, Tensor], where: str) -> None:
    """Copy the tensors of `found` into `module` by their order alone; every shape must agree.

    For files that hold the same model under other names. A classifier (a matrix and a vector) may follow.
    """
    own = {name: value for name, value in module.state_dict().items() if not _is_counter(name)}
    theirs = [(name, value) for name, value in found.items() if not _is_counter(name)]
    rest = [tuple(value.shape) for _, value in theirs[len(own) :]]
    classifier = len(rest) == 2 and len(rest[0]) == 2 and rest[1] == rest[0][:1]
    if len(theirs) < len(own) or (rest and not classifier):
        raise ValueError(
            f"{where}: holds {len(theirs)} tensors, the model has {len(own)}: not the same model under "
            "other names; give the file of this very model, or key_order: false"
        )
    for (name, value), (theirs_name, theirs_value) in zip(own.items(), theirs, strict=False):
        _check_shape(value, theirs_value, name, theirs_name, where)
    values = {name: value for name, (_, value) in zip(own, theirs, strict=False)}
    module.load_state_dict({**module.state_dict(), **values})


def _check_shape(own: Tensor, found: Tensor, name: str, found_name: str, where: str) -> None:
    if own.shape != found.shape:
        raise ValueError(
            f"{where}: {found_name} has the shape {tuple(found.shape)}, but {name} in the model has "
            f"{tuple(own.shape)}; give the file of this very model, made for the same image_px or text length"
        )


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
