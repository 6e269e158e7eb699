"""Pooling of tokens to one vector (COOKIE, Eq. 4): max, mean, GPO, or [CLS]; padding never counts."""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from learning.encoders.positions import sinusoids

Pooling = Literal["max", "mean", "gpo", "first"]


class MaxPooling(nn.Module):
    """The maximum over the tokens, by dimension."""

    def forward(
        self, tokens_bnd: Float[Tensor, "b n d"], mask_bn: Int64[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b d"]:
        if mask_bn is not None:
            tokens_bnd = tokens_bnd.masked_fill(mask_bn[..., None] == 0, -torch.inf)
        return tokens_bnd.amax(dim=1)


class MeanPooling(nn.Module):
    """The mean over the tokens."""

    def forward(
        self, tokens_bnd: Float[Tensor, "b n d"], mask_bn: Int64[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b d"]:
        if mask_bn is None:
            return tokens_bnd.mean(dim=1)
        weight_bn1 = mask_bn[..., None].to(tokens_bnd.dtype)
        return (tokens_bnd * weight_bn1).sum(dim=1) / weight_bn1.sum(dim=1)


class FirstToken(nn.Module):
    """The first token: [CLS], of BERT and of most ViTs."""

    def forward(
        self, tokens_bnd: Float[Tensor, "b n d"], mask_bn: Int64[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b d"]:
        return tokens_bnd[:, 0]


class GeneralizedPooling(nn.Module):
    """GPO: tokens are sorted by dimension, and each rank gets a learned weight (Chen et al. 2021, Sec. 3).

    The weights of k tokens come from the positional encoding of the ranks 1…k through a bidirectional GRU
    and a linear layer, by a soft-max over the k ranks; so they hold for any k, and padding gets none.
    `ranks` is the size of the positional encoding, `hidden` that of the GRU.
    """

    # Differs from the paper: the soft-max has a temperature of 0.1, as in GPO's released code; its text has
    # none.
    SHARPNESS = 0.1

    def __init__(self, ranks: int = 32, hidden: int = 32):
        super().__init__()
        self.ranks = ranks
        self.gru = nn.GRU(ranks, hidden, batch_first=True, bidirectional=True)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(
        self, tokens_bnd: Float[Tensor, "b n d"], mask_bn: Int64[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b d"]:
        b, n, _ = tokens_bnd.shape
        if mask_bn is None:
            weights_bn = self.weights(torch.tensor([n]), tokens_bnd).expand(b, n)
            return (tokens_bnd.sort(dim=1, descending=True).values * weights_bn[..., None]).sum(dim=1)
        padding_bn1 = mask_bn[..., None] == 0
        ranked_bnd = tokens_bnd.masked_fill(padding_bn1, -torch.inf).sort(dim=1, descending=True).values
        counts_b = mask_bn.sum(dim=1)
        # padding was sorted to the end of every dimension: by rank, not by place
        beyond_bn = torch.arange(n, device=tokens_bnd.device) >= counts_b[:, None]
        ranked_bnd = ranked_bnd.masked_fill(beyond_bn[..., None], 0.0)
        counts, which_b = counts_b.unique(return_inverse=True)  # the weights depend on the count alone
        weights_kn = self.weights(counts.cpu(), tokens_bnd)
        missing = n - weights_kn.shape[1]
        weights_kn = nn.functional.pad(weights_kn, (0, missing))
        return (ranked_bnd * weights_kn[which_b][..., None]).sum(dim=1)

    def weights(self, counts: Int64[Tensor, " k"], like: Tensor) -> Float[Tensor, "k n"]:
        """The weights by rank for each number of tokens (1 or more); 0 beyond it. n is the largest count."""
        longest = int(counts.max())
        encoding_nr = sinusoids(longest, self.ranks).to(like.device, self.score.weight.dtype)
        packed = nn.utils.rnn.pack_padded_sequence(
            encoding_nr.expand(len(counts), -1, -1), counts, batch_first=True, enforce_sorted=False
        )
        hidden_knh, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        forwards, backwards = hidden_knh.chunk(2, dim=-1)
        score_kn = self.score((forwards + backwards) / 2).squeeze(-1) / self.SHARPNESS
        beyond_kn = torch.arange(longest) >= counts[:, None]
        return score_kn.masked_fill(beyond_kn.to(like.device), -torch.inf).softmax(dim=1).to(like.dtype)


def make_pooling(name: Pooling) -> nn.Module:
    """A pooling by name: called with tokens (b, n, d) and a mask (b, n) or None, it gives (b, d)."""
    kinds = {"max": MaxPooling, "mean": MeanPooling, "gpo": GeneralizedPooling, "first": FirstToken}
    return kinds[name]()
