"""Encoders of token sequences that stand on the towers: the standard transformer encoder, and FC layers."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from learning.encoders.layers import Layered

Activation = Literal["relu", "gelu"]
INIT_STD = 0.02

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class TransformerLayer(nn.Module):
    """One layer of the standard encoder (Vaswani et al. 2017, Sec. 3.1-3.3): the norm after each sum.

    x ← LayerNorm(x + MultiHead(x, x, x));  x ← LayerNorm(x + max(0, x W₁ + b₁) W₂ + b₂). Dropout acts on the
    attention weights, inside the FFN, and on what each sub-layer gives before the sum.
    """

    # The paper is silent on initialisation and dropout: truncated normal of 0.02 as BERT's, biases 0,
    # dropout 0.1 as [14] has it. Small outputs of the sub-layers keep a fresh layer close to the identity.
    def __init__(self, dimension: int, heads: int, intermediate: int, dropout: float, activation: Activation):
        super().__init__()
        if dimension % heads:
            raise ValueError(f"model.heads: {heads} does not divide model.dimension, {dimension}")
        self.heads = heads
        self.dropout = dropout
        self.activation = ACTIVATIONS[activation]
        self.query_key_value = nn.Linear(dimension, 3 * dimension)
        self.attended = nn.Linear(dimension, dimension)
        self.attention_norm = nn.LayerNorm(dimension)
        self.widen = nn.Linear(dimension, intermediate)
        self.narrow = nn.Linear(intermediate, dimension)
        self.ffn_norm = nn.LayerNorm(dimension)
        initialise_linear(self)

    def forward(
        self, x_bnd: Float[Tensor, "b n d"], keep_b11n: Tensor | None = None
    ) -> Float[Tensor, "b n d"]:
        """`keep_b11n`: True where a token may be attended to; None where all may."""
        x_bnd = self.attention_norm(x_bnd + self._dropped(self._attention(x_bnd, keep_b11n)))
        widened = self._dropped(self.activation(self.widen(x_bnd)))
        return self.ffn_norm(x_bnd + self._dropped(self.narrow(widened)))

    def _attention(self, x_bnd: Tensor, keep_b11n: Tensor | None) -> Tensor:
        b, n, d = x_bnd.shape
        parts = self.query_key_value(x_bnd).view(b, n, 3, self.heads, d // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (b, heads, n, d / heads)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep_b11n, dropout_p=dropout)
        return self.attended(mixed.transpose(1, 2).reshape(b, n, d))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class TransformerEncoder(Layered):
    """`layers` layers in turn; 0 layers are the identity (COOKIE, Table X). No token attends to padding."""

    def __init__(
        self,
        layers: int,
        dimension: int,
        heads: int,
        intermediate: int,
        dropout: float = 0.1,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(dimension, heads, intermediate, dropout, activation) for _ in range(layers)
        )

    def forward(
        self, x_bnd: Float[Tensor, "b n d"], mask_bn: Int64[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        keep_b11n = None if mask_bn is None else mask_bn[:, None, None, :].bool()
        for layer in self.layers:
            x_bnd = layer(x_bnd, keep_b11n)
        return x_bnd

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def depths(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) for name, _ in self.named_parameters()}


class FullyConnected(nn.Module):
    """FC layers on each token alone, in place of the WS-TE (COOKIE, Table IX: `FC Layers`)."""

    # The paper is silent on their number, width and activation: as many as the WS-TE has, D wide, the
    # encoder's activation between them and none after the last.
    def __init__(self, layers: int, dimension: int, activation: Activation = "relu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(nn.Linear(dimension, dimension) for _ in range(layers))

    def forward(
        self, x_bnd: Float[Tensor, "b n d"], mask_bn: Int64[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        for number, layer in enumerate(self.layers):
            x_bnd = layer(x_bnd if number == 0 else self.activation(x_bnd))
        return x_bnd


def initialise_linear(module: nn.Module, std: float = INIT_STD) -> None:
    """Truncated normal of `std` for the weights of the linear layers in `module`, zero for their biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def embedding_vectors(*shape: int) -> nn.Parameter:
    """A learned vector, or a table of them, from a normal of 0.02."""
    return nn.Parameter(torch.randn(*shape) * INIT_STD)
