"""Semantic Sharing in plain float64 torch, sample by sample: for tests alone.

Written from "Rethinking Label-Wise Cross-Modal Retrieval from A Semantic Sharing Perspective" (Yang et al.),
equation by equation, with loops in place of matrices.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.r2d2_reference import cross_entropy
from tests.reference import State, gru_step, linear

DOUBLE = torch.float64


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def zero() -> Tensor:
    return torch.zeros((), dtype=DOUBLE)


# ------------------------------------------------------------------------------------------------ segments


def place(t: int, size: int) -> Tensor:
    """PE(t, ·) of Vaswani et al. 2017, Sec. 3.5."""
    angles = [t / 10000 ** (2 * (i // 2) / size) for i in range(size)]
    return torch.tensor(
        [math.sin(a) if i % 2 == 0 else math.cos(a) for i, a in enumerate(angles)], dtype=DOUBLE
    )


def box(a1: float, b1: float, a2: float, b2: float, width: float, height: float) -> Tensor:
    """p of Sec. 3.2."""
    area = (b2 - b1) * (a2 - a1) / (width * height)
    return torch.tensor([a1 / width, b1 / height, a2 / width, b2 / height, area], dtype=DOUBLE)


def segment(v: Tensor, position: Tensor, state: State, name: str) -> Tensor:
    """Eq. 3: φ(ψ1(v) + ψ2(l))."""
    summed = linear(v, state, f"{name}.segment_fc") + linear(position, state, f"{name}.position_fc")
    return relu(linear(summed, state, f"{name}.mixed_fc"))


def bi_gru(words: Tensor, state: State, name: str, layers: int) -> Tensor:
    """Annotations of Bahdanau et al. 2015, Sec. 3.2, of one text's words (m, w): both directions beside."""
    for number in range(layers):
        size = len(state[f"{name}.layers.{number}.ahead.bias_hh"]) // 3
        told = {}
        for way in ("ahead", "back"):
            own = {
                f"x.{kind}_{part}_l0": state[f"{name}.layers.{number}.{way}.{kind}_{part}"]
                for kind in ("weight", "bias")
                for part in ("ih", "hh")
            }
            h, rows = torch.zeros(size, dtype=DOUBLE), []
            for word in words if way == "ahead" else reversed(list(words)):
                h = gru_step(word, h, own, "x", "l0")
                rows.append(h)
            told[way] = rows if way == "ahead" else rows[::-1]
        words = torch.stack(
            [torch.cat([one, two]) for one, two in zip(told["ahead"], told["back"], strict=True)]
        )
    return words


def mean(rows: Sequence[Tensor]) -> Tensor:
    return sum(rows, torch.zeros_like(rows[0])) / len(rows)


# -------------------------------------------------------------------------------------------------- losses


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y) / (torch.sqrt(x @ x) * torch.sqrt(y @ y))


def shares(y: Sequence[float], other: Sequence[float]) -> bool:
    return any(a == 1 and b == 1 for a, b in zip(y, other, strict=True))


def label_loss(logits: Tensor, y: Sequence[float], literal: bool = False) -> Tensor:
    """Eq. 4 of one embedding: a logistic loss a label, or as it is printed."""
    if literal:
        exps = [torch.exp(value) for value in logits]
        product = sum((e for e, has in zip(exps, y, strict=True) if has), zero()) / sum(exps, zero())
        return torch.log(1 + torch.exp(-product))
    signs = [1.0 if has else -1.0 for has in y]
    return sum(
        (torch.log(1 + torch.exp(-sign * value)) for sign, value in zip(signs, logits, strict=True)), zero()
    )


def masked_loss(logits: Sequence[Tensor], targets: Sequence[int]) -> Tensor:
    """Eq. 5: the mean of -log P(what was masked | the rest)."""
    each = [cross_entropy(row, target) for row, target in zip(logits, targets, strict=True)]
    return sum(each, zero()) / max(1, len(each))


def consistency(images: Tensor, texts: Tensor, labels: Sequence[Sequence[float]]) -> Tensor:
    """Eq. 1, each of its three sums as a mean over the pairs."""
    total, count = zero(), len(labels)
    for one, other in ((images, texts), (images, images), (texts, texts)):
        for i in range(count):
            for j in range(count):
                s = 1.0 if i == j or shares(labels[i], labels[j]) else 0.0
                theta = cosine(one[i], other[j]) / 2
                total = total - (s * theta - torch.log(1 + torch.exp(theta)))
    return total / count**2


def triplet(images: Tensor, texts: Tensor, labels: Sequence[Sequence[float]], margin: float) -> Tensor:
    """Own pair against the most similar of another class, both ways, the mean over samples."""
    total, count = zero(), len(labels)
    for one, other in ((images, texts), (texts, images)):
        for i in range(count):
            wrong = [j for j in range(count) if j != i and not shares(labels[i], labels[j])]
            if wrong:
                hardest = max(cosine(one[i], other[j]) for j in wrong)
                total = total + torch.clamp(margin - cosine(one[i], other[i]) + hardest, min=0)
    return total / count


def to_mask(classes: Sequence[int], numbers: Sequence[float], share: float) -> list[int]:
    """Regions of one picture that are masked: of those with a class, by the lowest numbers."""
    having = [place for place, number in enumerate(classes) if number >= 0]
    count = max(1, round(share * len(having))) if having else 0
    return sorted(having, key=lambda place: numbers[place])[:count]
