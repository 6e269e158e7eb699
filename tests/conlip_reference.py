"""ConLIP's losses and momentum in plain float64 torch, sample by sample: for tests alone.

Written from "Conditioned Masked Language and Image Modeling for Image-Text Dense Retrieval" (Luo et al.),
Sec. 3, equation by equation, with loops in place of matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference import State


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Eq. 2."""
    return (x * y).sum() / (torch.sqrt((x * x).sum()) * torch.sqrt((y * y).sum()))


@dataclass
class Stored:
    """What a queue has: features and what they show, the oldest first."""

    features: list[Tensor] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


def negatives(query: Tensor, queue: Stored, number: int, tau: Tensor | float) -> list[Tensor]:
    """sim(h, q_j)/τ over the queue, but for what shows the same as the query."""
    return [
        similarity(query, feature.detach()) / tau
        for feature, other in zip(queue.features, queue.ids, strict=True)
        if other != number
    ]


def info_nce_row(query: Tensor, positive: Tensor, queue: Stored, number: int, tau: Tensor | float) -> Tensor:
    """Eq. 9."""
    right = similarity(query, positive) / tau
    wrong = negatives(query, queue, number, tau)
    return -torch.log(torch.exp(right) / (torch.exp(right) + sum(torch.exp(s) for s in wrong)))


def dcl_row(query: Tensor, positive: Tensor, queue: Stored, number: int, tau: Tensor | float) -> Tensor:
    """Eq. 10, or Eq. 11 with the sides exchanged. Where there is no negative, there is no loss."""
    right = similarity(query, positive) / tau
    wrong = negatives(query, queue, number, tau)
    if not wrong:
        return 0 * right
    return -right + torch.log(torch.stack([torch.exp(s) for s in wrong]).sum())


def masked_patches(draw: int, rows: int, side: int, unit: int, share: float) -> list[set[int]]:
    """The masked patches of each row: SimMIM's units in the order of numbers drawn for them."""
    cells = (side // unit) ** 2
    generator = torch.Generator().manual_seed(draw)
    numbers = torch.rand(1, rows * cells, generator=generator, dtype=torch.float64)[0].tolist()
    found = []
    for row in range(rows):
        own = numbers[row * cells : (row + 1) * cells]
        chosen = sorted(range(cells), key=lambda cell, own=own: own[cell])[: max(1, round(share * cells))]  # type: ignore[misc]
        places = set()
        for cell in chosen:
            top, left = unit * (cell // (side // unit)), unit * (cell % (side // unit))
            places |= {(top + y) * side + left + x for y in range(unit) for x in range(unit)}
        found.append(places)
    return found


def patch(image: Tensor, place: int, px: int) -> Tensor:
    """The pixels of one patch, (3, px, px)."""
    row, column = divmod(place, image.shape[-1] // px)
    return image[:, row * px : (row + 1) * px, column * px : (column + 1) * px]


def l1(predicted: Tensor, true: Tensor) -> Tensor:
    """‖y - z‖₁ of Eq. 6, by the number of values."""
    return sum((abs(a - b) for a, b in zip(predicted, true, strict=True)), torch.zeros(())) / len(true)


@dataclass
class Momentum:
    """What one process keeps from step to step: momentum encoders and two queues."""

    teacher: State
    size: int
    m: float = 0.99
    image_queue: Stored = field(default_factory=Stored)
    text_queue: Stored = field(default_factory=Stored)

    def enqueued(self, queue: Stored, rows: Tensor, ids: Sequence[int]) -> Stored:
        """A queue once the momentum features of a batch are in it."""
        features = [*queue.features, *(row.detach().clone() for row in rows)]
        numbers = [*queue.ids, *(int(number) for number in ids)]
        return Stored(features[-self.size :], numbers[-self.size :])

    def after_step(self, student: State, images: Tensor, texts: Tensor, ids: Sequence[int]) -> None:
        """Eq. 8, and the batch's features of both sides stay."""
        self.image_queue = self.enqueued(self.image_queue, images, ids)
        self.text_queue = self.enqueued(self.text_queue, texts, ids)
        for name, value in self.teacher.items():
            self.teacher[name] = self.m * value + (1 - self.m) * student[name].detach()
