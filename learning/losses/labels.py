"""Losses of samples that have labels, of which several may hold: multi-label, pairwise, triplet."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from learning.losses.contrastive import widened

LabelLoss = Literal["logistic", "literal"]


def label_rows(
    logits_bc: Float[Tensor, "b c"], labels_bc: Float[Tensor, "b c"], how: LabelLoss = "logistic"
) -> Float[Tensor, " b"]:
    """The label prediction loss of each sample: Semantic Sharing, Eq. 4. Half precision is computed in fp32.

    logistic: Σ_c log(1 + exp(-ỹ_c g_c)), ỹ = 1 for a label and -1 for one that is not there: the common
    multi-label loss that the paper says it has. literal: log(1 + exp(-yᵀ softmax(g))), y of 0 and 1, as
    Eq. 4 is printed.
    """
    logits_bc = widened(logits_bc)
    labels_bc = labels_bc.to(logits_bc.dtype)
    if how == "literal":
        return F.softplus(-(labels_bc * logits_bc.softmax(dim=1)).sum(dim=1))
    return F.binary_cross_entropy_with_logits(logits_bc, labels_bc, reduction="none").sum(dim=1)


def same_class(
    labels_bc: Float[Tensor, "b c"], all_labels_nc: Float[Tensor, "n c"], first: int
) -> Bool[Tensor, "b n"]:
    """S of Eq. 1: whether two samples share a label. Row i is sample `first` + i, of its own class."""
    shared = labels_bc @ all_labels_nc.T > 0
    place_b = torch.arange(first, first + len(labels_bc), device=shared.device)
    return shared | (place_b[:, None] == torch.arange(len(all_labels_nc), device=shared.device))


def pairwise_likelihood_rows(
    unit_bd: Float[Tensor, "b d"], others_nd: Float[Tensor, "n d"], same_bn: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """-Σ_j (S_ij Θ_ij - log(1 + exp Θ_ij)), Θ = cos / 2, of each row: one term of Semantic Sharing, Eq. 1.

    Both inputs have unit length.
    """
    theta = unit_bd @ others_nd.T / 2
    return (F.softplus(theta) - theta * same_bn).sum(dim=1)


def triplet_rows(
    unit_bd: Float[Tensor, "b d"],
    others_nd: Float[Tensor, "n d"],
    same_bn: Bool[Tensor, "b n"],
    margin: float,
    first: int,
) -> Float[Tensor, " b"]:
    """The hinge of each row on its own pair and on the most similar sample of another class (VSE++).

    Row i's pair is `first` + i of the others; 0 for a row that shares a class with all.
    """
    cosines = unit_bd @ others_nd.T
    own = cosines.diagonal(offset=first)
    hardest = cosines.masked_fill(same_bn, -torch.inf).amax(dim=1)
    return (margin - own + hardest).clamp(min=0)
