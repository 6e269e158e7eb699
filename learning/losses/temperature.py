"""The temperature τ of a contrastive loss: fixed, or learned within bounds."""

import math
from typing import Any

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn


class TemperatureConfig(BaseModel):
    """The recipe's `model.temperature` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial: float = Field(default=0.07, gt=0)
    learnable: bool = False
    min: float = Field(default=0.01, gt=0)
    max: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "TemperatureConfig":
        if not self.min <= self.initial <= self.max:
            raise ValueError(f"initial: {self.initial} is not between min, {self.min}, and max, {self.max}")
        return self


class Temperature(nn.Module):
    """Gives τ, a scalar, from its logarithm, clamped to the bounds. The state goes on from stage to stage."""

    def __init__(self, config: TemperatureConfig):
        super().__init__()
        self.low, self.high = math.log(config.min), math.log(config.max)
        # one dimension: DeepSpeed takes no parameter without any
        self.log = nn.Parameter(torch.tensor([math.log(config.initial)]), requires_grad=config.learnable)

    def forward(self) -> Float[Tensor, ""]:
        wide = self.log.to(torch.promote_types(self.log.dtype, torch.float32))
        return _Clamp.apply(wide, self.low, self.high).exp().squeeze(0)


class _Clamp(torch.autograd.Function):
    """A clamp with a way back: beyond a bound the inward gradient passes, the outward one is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outward = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))  # steps descend
        return gradient.masked_fill(outward, 0.0), None, None
