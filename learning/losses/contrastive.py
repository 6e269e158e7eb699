"""Contrastive losses over the whole batch: pure functions of gathered tensors, with no rank in them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def info_nce(
    queries_nd: Float[Tensor, "n d"], keys_nd: Float[Tensor, "n d"], temperature: Float[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """InfoNCE: row i of `keys_nd` is the positive of row i of `queries_nd`, the other rows its negatives.

    -1/N Σ_i log( exp(q_i·k_i/τ) / Σ_j exp(q_i·k_j/τ) )   COOKIE, Eq. 5, by log-sum-exp with the maximum taken
    out, so that no τ overflows. Inputs are embeddings of unit length (not checked). Raises ValueError for
    less than two rows: there is no negative.
    """
    _check(queries_nd, keys_nd)
    logits_nn = queries_nd @ keys_nd.T / temperature
    return F.cross_entropy(logits_nn, torch.arange(len(logits_nn), device=logits_nn.device))


def hardest_negative_hinge(
    image_nd: Float[Tensor, "n d"], text_nd: Float[Tensor, "n d"], margin: float
) -> Float[Tensor, ""]:
    """The hinge on the hardest negative of the batch, in both directions, as a mean over the pairs.

    [α + S(I', T) - S(I, T)]₊ + [α + S(I, T') - S(I, T)]₊   COOKIE, Eq. 13; I' is the image most similar to T
    but its own, T' the text most similar to I but its own, S the cosine (inputs of unit length). Raises
    ValueError for less than two rows.
    """
    # The paper is silent: Eq. 13 is one pair's loss; VSE++ [24] sums it over the batch. Here it is the
    # mean, so that a learning rate means the same for every batch size.
    _check(image_nd, text_nd)
    similarity_nn = image_nd @ text_nd.T
    own = torch.eye(len(similarity_nn), dtype=torch.bool, device=similarity_nn.device)
    right_n = similarity_nn.diagonal()
    wrong_nn = similarity_nn.masked_fill(own, -torch.inf)
    by_image_n = F.relu(margin + wrong_nn.amax(dim=1) - right_n)
    by_text_n = F.relu(margin + wrong_nn.amax(dim=0) - right_n)
    return (by_image_n + by_text_n).mean()


@torch.no_grad()
def matching_accuracy(queries_nd: Float[Tensor, "n d"], keys_nd: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The share (0-1) of queries whose most similar key is their own: R@1 within the batch."""
    best_n = (queries_nd @ keys_nd.T).argmax(dim=1)
    return (best_n == torch.arange(len(best_n), device=best_n.device)).float().mean()


def _check(left_nd: Tensor, right_nd: Tensor) -> None:
    if left_nd.shape != right_nd.shape or left_nd.ndim != 2:
        raise ValueError(
            f"two (n, d) tensors of one shape are needed: {tuple(left_nd.shape)}, {tuple(right_nd.shape)}"
        )
    if len(left_nd) < 2:
        raise ValueError(f"a batch of {len(left_nd)} has no negatives; contrastive_batch must be 2 or more")
