"""Hard negatives for fine-grained ranking: drawn over all ranks, the more similar the more likely."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

NONE = -1


@torch.no_grad()
def draw_negatives(
    similarity_bn: Float[Tensor, "b n"], same_bn: Bool[Tensor, "b n"], uniform_b: Float[Tensor, " b"]
) -> Int64[Tensor, " b"]:
    """For each row a column that shows something else, with the probabilities softmax(similarity).

    similarity_bn: logits, sim/τ of Eq. 1; same_bn: columns of the row's own id, which are never drawn;
    uniform_b: a number in [0, 1) a row, which decides (the inverse of the distribution). NONE (-1) for a row
    where every column is its own. Ranks that hold other rows draw as one process does, row by row.
    """
    wide = similarity_bn.to(torch.float64)  # sums over 65,536 columns
    weights = wide.masked_fill(same_bn, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    mass = weights.cumsum(dim=1)
    total = mass[:, -1:]
    at = uniform_b.to(wide)[:, None] * total
    drawn = (mass <= at).sum(dim=1)
    last = same_bn.shape[1] - 1 - (~same_bn).flip(1).int().argmax(dim=1)  # were rounding to pass the end
    drawn = torch.minimum(drawn, last)
    return torch.where(same_bn.all(dim=1), NONE, drawn)


def uniform_numbers(seed: int, rows: int, draws: int, device: torch.device) -> Float[Tensor, "draws rows"]:
    """Numbers in [0, 1) for the rows of all ranks: the same on every rank, whatever their number."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(draws, rows, generator=generator, dtype=torch.float64).to(device)
