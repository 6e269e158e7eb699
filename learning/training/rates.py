"""The optimizer's settings, and each parameter's group: its part, its learning rate, its weight decay."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from learning.encoders.layers import Layered
from learning.methods.base import Method


class OptimizerConfig(BaseModel):
    """AdamW, with a learning rate a part of the model, and within a part a layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(
        default=0.01, ge=0, description="not on norms, biases and other 1-D parameters"
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    lr_scale: dict[str, float] = Field(
        default_factory=dict, description="part of the model: factor on the learning rate (vision: 0.1)"
    )
    layer_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict,
        description="part: factor from a layer to the one below it (text: 0.9); the top one has the part's "
        "own rate",
    )


def parameter_groups(method: Method, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Two groups a part (with and without weight decay), each with `part` and its own `base_lr`.

    A part in `layer_decay` has two a layer, the layers from below. The order depends on the model and the
    config alone: a checkpoint's optimizer state goes by it. Raises ValueError when lr_scale or layer_decay
    names no part, when a part has no layers, or when a trainable parameter is in no part.
    """
    parts = method.parts()
    for field, named in (("lr_scale", config.lr_scale), ("layer_decay", config.layer_decay)):
        unknown = sorted(set(named) - set(parts))
        if unknown:
            raise ValueError(
                f"optimizer.{field}: {', '.join(unknown)} is no trainable part of this model; "
                f"its parts: {', '.join(parts)}"
            )
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for part, parameters in parts.items():
        own = [p for p in parameters if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        rate = config.learning_rate * config.lr_scale.get(part, 1.0)
        layers: Iterator[tuple[float, list[nn.Parameter]]] = iter([(1.0, own)])
        if part in config.layer_decay:
            layers = _by_layer(method, part, own, config.layer_decay[part])
        for factor, members in layers:
            for decays in (True, False):
                chosen = [p for p in members if (p.ndim > 1) == decays]
                if chosen:
                    decay = config.weight_decay if decays else 0.0
                    own_rate = {"lr": rate * factor, "base_lr": rate * factor}
                    groups.append({"params": chosen, "weight_decay": decay, "part": part} | own_rate)
    left_out = [name for name, p in method.named_parameters() if p.requires_grad and id(p) not in seen]
    if left_out:
        names = ", ".join(left_out)
        raise ValueError(f"{type(method).__name__}.parts() leaves out trainable parameters: {names}")
    return groups


def _by_layer(
    method: Method, part: str, own: list[nn.Parameter], decay: float
) -> Iterator[tuple[float, list[nn.Parameter]]]:
    """Factor on the rate, and parameters, of each layer of a part, from below.

    decay^(top - layer): BEiT's rule (Bao et al. 2021, App.), counted over all layers, frozen ones too.
    """
    layer_of = _layers(method, own)
    if layer_of is None:
        having = [name for name, theirs in method.parts().items() if _layers(method, theirs) is not None]
        raise ValueError(
            f"optimizer.layer_decay: {part} is not one encoder of layers in order; "
            f"those that are: {', '.join(having) or 'none'}"
        )
    top = max(layer_of.values())
    for layer in range(top + 1):
        members = [p for p in own if layer_of[id(p)] == layer]
        yield decay ** (top - layer), members


def _layers(method: Method, parameters: list[nn.Parameter]) -> dict[int, int] | None:
    """The layer by the id of the parameter, of the encoder that has all of `parameters`."""
    for module in method.modules():
        if isinstance(module, Layered):
            named = dict(module.named_parameters())
            if {id(p) for p in parameters} <= {id(p) for p in named.values()}:
                return {id(named[name]): layer for name, layer in module.depths().items()}
    return None
