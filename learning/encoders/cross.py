"""The cross encoder: tokens of one side that attend to each other and to the other side's tokens."""

import math

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from learning.encoders.fusion import INIT_STD, initialise_linear
from learning.encoders.layers import Layered

NORM_EPS = 1e-12  # BERT's
BERT_WIDTH = 768


class Attention(nn.Module):
    """Multi-head attention of queries to keys (Vaswani et al. 2017, Sec. 3.2)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        x_bnd: Float[Tensor, "b n d"],
        keys_bkd: Float[Tensor, "b k d"],
        keep_b11k: Tensor | None,
    ) -> Float[Tensor, "b n d"]:
        query, key, value = (
            self._split(self.query(x_bnd)),
            self._split(self.key(keys_bkd)),
            self.value(keys_bkd),
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, self._split(value), attn_mask=keep_b11k, dropout_p=dropout
        )
        return self.output(mixed.transpose(1, 2).reshape(x_bnd.shape))

    def weights(
        self, x_bnd: Float[Tensor, "b n d"], keys_bkd: Float[Tensor, "b k d"], keep_b11k: Tensor | None
    ) -> Float[Tensor, "b heads n k"]:
        """The attention weights; each row sums to 1."""
        query, key = self._split(self.query(x_bnd)), self._split(self.key(keys_bkd))
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        if keep_b11k is not None:
            scores = scores.masked_fill(~keep_b11k, -math.inf)
        return scores.softmax(dim=-1)

    def _split(self, x_bnd: Tensor) -> Float[Tensor, "b heads n s"]:
        b, n, d = x_bnd.shape
        return x_bnd.view(b, n, self.heads, d // self.heads).transpose(1, 2)


class CrossLayer(nn.Module):
    """Self-attention, cross-attention, FFN; the norm after each sum, as in BERT.

    x ← LN(x + A(x, x));  x ← LN(x + A(x, y));  x ← LN(x + W₂ gelu(W₁ x + b₁) + b₂), y the other's tokens.
    """

    def __init__(self, width: int, heads: int, intermediate: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.self_attention = Attention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attention = Attention(width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.widen = nn.Linear(width, intermediate)
        self.narrow = nn.Linear(intermediate, width)
        self.ffn_norm = nn.LayerNorm(width, eps=NORM_EPS)
        # The paper is silent on initialisation: BERT's 0.02 at BERT's width, and at another one what keeps
        # the sub-layers' outputs as large as there
        initialise_linear(self, INIT_STD * math.sqrt(BERT_WIDTH / width))

    def forward(
        self,
        x_bnd: Float[Tensor, "b n d"],
        keep_b11n: Tensor | None,
        other_bkd: Float[Tensor, "b k d"],
        keep_b11k: Tensor | None,
        first: int | None = None,
    ) -> Float[Tensor, "b n d"]:
        """`first`: only so many tokens of x, from [CLS] on, are asked for; None: all."""
        x_bnd = self.attended_to_itself(x_bnd, keep_b11n, first)
        crossed = self.cross_attention(x_bnd, other_bkd, keep_b11k)
        x_bnd = self.cross_norm(x_bnd + self._dropped(crossed))
        return self.ffn_norm(x_bnd + self._dropped(self.narrow(F.gelu(self.widen(x_bnd)))))

    def attended_to_itself(
        self, x_bnd: Float[Tensor, "b n d"], keep_b11n: Tensor | None, first: int | None = None
    ) -> Float[Tensor, "b n d"]:
        """The first of the three sums: what the cross-attention asks with."""
        asking = x_bnd[:, :first]
        return self.self_norm(asking + self._dropped(self.self_attention(asking, x_bnd, keep_b11n)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CrossEncoder(Layered):
    """`layers` cross layers in turn (R2D2, Sec. 3.1: six). No token attends to padding of either side."""

    def __init__(
        self, layers: int, width: int, heads: int, intermediate: int, dropout: float, shared: bool = False
    ):
        """`shared`: all layers have the same weights (ConLIP, Table 4: 2*).

        Raises ValueError when `heads` does not divide `width`.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"model.cross_heads: {heads} does not divide model.dimension, {width}")
        own = min(1, layers) if shared else layers
        self.layers = nn.ModuleList(CrossLayer(width, heads, intermediate, dropout) for _ in range(own))
        self._order = [0 if shared else number for number in range(layers)]

    def forward(
        self,
        x_bnd: Float[Tensor, "b n d"],
        x_mask_bn: Int64[Tensor, "b n"] | None,
        other_bkd: Float[Tensor, "b k d"],
        other_mask_bk: Int64[Tensor, "b k"] | None,
        first: int | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Masks: 1 = token, 0 = padding; None: no padding.

        `first`: so many tokens come out, from [CLS] on, and the last layer computes no other; None: all.
        """
        keep_x, keep_other = _keep(x_mask_bn), _keep(other_mask_bk)
        *before, last = self._in_turn()
        for layer in before:
            x_bnd = layer(x_bnd, keep_x, other_bkd, keep_other)
        return last(x_bnd, keep_x, other_bkd, keep_other, first)

    def attention(
        self,
        x_bnd: Float[Tensor, "b n d"],
        x_mask_bn: Int64[Tensor, "b n"] | None,
        other_bkd: Float[Tensor, "b k d"],
        other_mask_bk: Int64[Tensor, "b k"] | None,
        layer: int,
    ) -> Float[Tensor, "b heads n k"]:
        """The weights of cross-attention in a layer, from 1. Raises ValueError for one it has not."""
        if not 1 <= layer <= len(self._order):
            raise ValueError(f"layer: {layer}; this cross encoder has the layers 1 … {len(self._order)}")
        keep_x, keep_other = _keep(x_mask_bn), _keep(other_mask_bk)
        *before, last = self._in_turn()[:layer]
        for each in before:
            x_bnd = each(x_bnd, keep_x, other_bkd, keep_other)
        asked: CrossLayer = last  # type: ignore[assignment]
        x_bnd = asked.attended_to_itself(x_bnd, keep_x)
        return asked.cross_attention.weights(x_bnd, other_bkd, keep_other)

    def _in_turn(self) -> list[nn.Module]:
        return [self.layers[number] for number in self._order]

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def depths(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) for name, _ in self.named_parameters()}


def _keep(mask_bn: Tensor | None) -> Tensor | None:
    return None if mask_bn is None else mask_bn[:, None, None, :].bool()
