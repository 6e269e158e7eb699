"""What a training stage starts from: weights and heads of an upstream stage, files that its model names."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from learning import model_files
from learning.encoders.image_tower import with_fitted_towers
from learning.methods.base import Method

logger = logging.getLogger(__name__)


def load_upstream(
    method: Method,
    state: Mapping[str, Tensor],
    new_parts: tuple[str, ...],
    dropped_parts: tuple[str, ...],
    source: Path,
) -> None:
    """Start `method` from upstream weights, of another `image_px` where the image tower can be fitted.

    Raises ValueError that names every key that does not fit.
    """
    own = method.state_dict()
    state = with_fitted_towers(method, state)
    missing = sorted(name for name in set(own) - set(state) if not name.startswith(new_parts or ("\0",)))
    extra = sorted(name for name in set(state) - set(own) if not name.startswith(dropped_parts or ("\0",)))
    shapes = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in set(own) & set(state)
        if own[name].shape != state[name].shape
    )
    problems = [
        f"{what}: {', '.join(names)}{remedy}"
        for what, names, remedy in (
            ("missing", missing, " (name their beginnings in new_parts to start them from scratch)"),
            ("unexpected", extra, " (name their beginnings in dropped_parts to leave them out)"),
            ("of another shape", shapes, ""),
        )
        if names
    ]
    if problems:
        raise ValueError(f"inputs.weights: {source} does not fit this model; {'; '.join(problems)}")
    method.load_state_dict({name: state.get(name, value) for name, value in own.items()})


def load_heads(method: Method, heads: Mapping[str, Tensor], source: Path) -> None:
    """Go on with upstream's training heads, those of them that `method` has; others start from scratch.

    Raises ValueError for heads of other sizes.
    """
    own = method.state_dict()
    found = {name: value for name, value in heads.items() if name in own}
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in found.items()
        if value.shape != own[name].shape
    ]
    if shapes:
        raise ValueError(
            f"inputs.weights: {source}: {model_files.HEADS} does not fit this model; of another shape: "
            f"{', '.join(shapes)}"
        )
    if found:
        logger.info("the training heads go on from %s: %d tensors", source, len(found))
    method.load_state_dict(found, strict=False)


def absolute_weights(values: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """A model config in which every `weights`, at any depth, is relative to `directory` no more."""
    return {
        key: str(directory / value)
        if key == "weights" and value is not None
        else absolute_weights(value, directory)
        if isinstance(value, Mapping)
        else value
        for key, value in values.items()
    }
