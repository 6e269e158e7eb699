"""Where a token or a region is, as numbers: sines and cosines of a place, and the boxes of a square grid."""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

POSITION_WIDTH = 5  # of a box: left, top, right, bottom, area, as shares of the picture


def sinusoids(count: int, size: int) -> Float64[Tensor, "n s"]:
    """Sines and cosines of the places 0 … count - 1, in turn (Vaswani et al. 2017, Sec. 3.5)."""
    place_n1 = torch.arange(count, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, size, 2, dtype=torch.float64) * (-math.log(10000.0) / size))
    pairs = torch.stack([torch.sin(place_n1 * rate), torch.cos(place_n1 * rate)], dim=-1)
    return pairs.flatten(1)[:, :size]


def grid_boxes(side: int) -> Float64[Tensor, "n 5"]:
    """The cells of a picture cut into side × side, row by row, as `Regions.positions` has boxes."""
    edges = torch.arange(side + 1, dtype=torch.float64) / side
    top, left = (each.flatten() for each in torch.meshgrid(edges[:-1], edges[:-1], indexing="ij"))
    bottom, right = (each.flatten() for each in torch.meshgrid(edges[1:], edges[1:], indexing="ij"))
    return torch.stack([left, top, right, bottom, (right - left) * (bottom - top)], dim=1)
