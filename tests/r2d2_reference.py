"""R2D2's losses, cross encoder and momentum in plain float64 torch, sample by sample: for tests alone.

Written from "Zero and R2D2" (Xie et al.), Sec. 3, equation by equation, with loops in place of matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference import State, gelu, layer_norm, linear

BERT_EPS = 1e-12


def log_soft_max(scores: Sequence[Tensor]) -> list[Tensor]:
    """log( exp s_j / Σ exp s ), the maximum taken out: exp(1 / 0.001) is over float64's range too."""
    largest = max(float(score.detach()) for score in scores)
    total = torch.log(torch.stack([torch.exp(score - largest) for score in scores]).sum())
    return [score - largest - total for score in scores]


def soft_max(scores: Sequence[Tensor]) -> list[Tensor]:
    return [torch.exp(value) for value in log_soft_max(scores)]


# ------------------------------------------------------------------------------------------ cross encoder


def attention(x: Tensor, other: Tensor, state: State, name: str, heads: int) -> tuple[Tensor, Tensor]:
    """Multi-head attention of x (n, d) to other (m, e): the output (n, d) and the weights (heads, n, m)."""
    query = [linear(row, state, f"{name}.query") for row in x]
    key = [linear(row, state, f"{name}.key") for row in other]
    value = [linear(row, state, f"{name}.value") for row in other]
    size = len(query[0]) // heads
    rows, weights = [], []
    for q in query:
        mixed, told = [], []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            share = soft_max([q[part] @ k[part] / math.sqrt(size) for k in key])
            mixed.append(sum((w * v[part] for w, v in zip(share, value, strict=True)), torch.zeros(size)))
            told.append(torch.stack(share))
        rows.append(linear(torch.cat(mixed), state, f"{name}.output"))
        weights.append(torch.stack(told))
    return torch.stack(rows), torch.stack(weights, dim=1)


def cross_layer(
    x: Tensor, other: Tensor, state: State, name: str, heads: int, eps: float = BERT_EPS
) -> tuple[Tensor, Tensor]:
    """x attends to itself, then to `other`, then the FFN, the norm after each sum. And how x attends."""

    def summed(x: Tensor, y: Tensor, norm: str) -> Tensor:
        return torch.stack(
            [layer_norm(a + b, state, f"{name}.{norm}", eps) for a, b in zip(x, y, strict=True)]
        )

    x = summed(x, attention(x, x, state, f"{name}.self_attention", heads)[0], "self_norm")
    crossed, weights = attention(x, other, state, f"{name}.cross_attention", heads)
    x = summed(x, crossed, "cross_norm")
    narrow = [linear(gelu(linear(row, state, f"{name}.widen")), state, f"{name}.narrow") for row in x]
    return summed(x, torch.stack(narrow), "ffn_norm"), weights


def cross_encoder(
    x: Tensor, other: Tensor, state: State, name: str, layers: int, heads: int, eps: float = BERT_EPS
) -> tuple[Tensor, list[Tensor]]:
    """One pair's tokens, x (n, d) and other (m, d), none of them padding: x at the end, and the attention."""
    told = []
    for number in range(layers):
        x, weights = cross_layer(x, other, state, f"{name}.layers.{number}", heads, eps)
        told.append(weights)
    return x, told


# ------------------------------------------------------------------------------------------------- losses


@dataclass
class Stored:
    """What a queue has: features, ids and weights, the oldest first."""

    features: list[Tensor] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def even(query_id: int, key_ids: Sequence[int]) -> list[float]:
    """y(I, ·): one-hot, even over the keys of the query's id."""
    count = sum(key_id == query_id for key_id in key_ids)
    return [(key_id == query_id) / count for key_id in key_ids]


def contrastive_rows(queries: Tensor, keys: Tensor, temperature: Tensor, ids: Sequence[int]) -> Tensor:
    """Eq. 1 and L_c of Eq. 2 for each query; row i of the queries and of the keys are of sample i."""
    rows = []
    for i, q in enumerate(queries):
        log_s = log_soft_max([q @ k / temperature for k in keys])  # Eq. 1
        y = even(ids[i], ids)
        rows.append(-sum(y_j * log_s[j] for j, y_j in enumerate(y) if y_j))
    return torch.stack(rows)


def gcpr(images: Tensor, texts: Tensor, temperature: Tensor, ids: Sequence[int]) -> Tensor:
    """Eq. 2."""
    i2t = contrastive_rows(images, texts, temperature, ids)
    t2i = contrastive_rows(texts, images, temperature, ids)
    return (i2t.sum() / len(i2t) + t2i.sum() / len(t2i)) / 2


def target_guided_rows(
    queries: Tensor,
    keys: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    alpha: float,
    ids: Sequence[int],
    queue: Stored,
) -> Tensor:
    """Eq. 4 and L_w of Eq. 5 for each query, over the batch's keys and the queue's."""
    all_keys = [*keys, *(stored.detach() for stored in queue.features)]
    all_ids = [*ids, *queue.ids]
    w = [1.0] * len(keys) + queue.weights
    rows = []
    for i, q in enumerate(queries):
        log_s = log_soft_max([q @ k / temperature for k in all_keys])
        soft = soft_max([teacher[i].detach() @ k.detach() / temperature.detach() for k in all_keys])
        y = even(ids[i], all_ids)
        y_hat = [alpha * s_j + (1 - alpha) * y_j for s_j, y_j in zip(soft, y, strict=True)]  # Eq. 4
        rows.append(-sum(w[j] * y_hat[j] * log_s[j] for j in range(len(all_keys))))
    return torch.stack(rows)


def gcpr_tgd(
    images: Tensor,
    texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    temperature: Tensor,
    alpha: float,
    ids: Sequence[int],
    image_queue: Stored,
    text_queue: Stored,
) -> Tensor:
    """Eq. 5."""
    i2t = target_guided_rows(images, texts, teacher_images, temperature, alpha, ids, text_queue)
    t2i = target_guided_rows(texts, images, teacher_texts, temperature, alpha, ids, image_queue)
    return (i2t.sum() / len(i2t) + t2i.sum() / len(t2i)) / 2


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    """L_c of one row of logits and the index of its class."""
    return -log_soft_max(list(logits))[target]


def fgr(judged: Sequence[tuple[Tensor, Tensor, int]], class_weights: tuple[float, float]) -> Tensor:
    """Eq. 3 of pairs (logits of h_I, logits of h_T, label), as Σ w l / Σ w."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for by_image, by_text, label in judged:
        loss = (cross_entropy(by_image, label) + cross_entropy(by_text, label)) / 2
        total = total + class_weights[label] * loss
        weight += class_weights[label]
    return total / weight


def mlm(logits: Sequence[Tensor], targets: Sequence[int]) -> Tensor:
    """The mean cross-entropy over masked places."""
    losses = [cross_entropy(row, target) for row, target in zip(logits, targets, strict=True)]
    return torch.stack(losses).sum() / len(losses)


def feature_guided_rows(
    student: Tensor, teacher: Tensor, centre: Tensor, tau_s: float, tau_t: float
) -> Tensor:
    """Eq. 6 and L_c(P_s, P_t) of Eq. 7 for each sample of one side."""
    rows = []
    for f_s, f_t in zip(student, teacher.detach(), strict=True):
        p_t = soft_max([(f_t[i] - centre[i]) / tau_t for i in range(len(f_t))])
        log_p_s = log_soft_max([f_s[i] / tau_s for i in range(len(f_s))])
        rows.append(-sum(p_t[i] * log_p_s[i] for i in range(len(f_s))))
    return torch.stack(rows)


def draw_negative(similarities: Sequence[float], same: Sequence[bool], uniform: float) -> int:
    """The first key whose cumulated probability, ∝ exp(similarity), is over `uniform`; -1: there is none."""
    allowed = [j for j, of_id in enumerate(same) if not of_id]
    if not allowed:
        return -1
    largest = max(similarities[j] for j in allowed)
    mass = {j: math.exp(similarities[j] - largest) for j in allowed}
    total = sum(mass.values())
    reached = 0.0
    for j in allowed:
        reached += mass[j] / total
        if reached > uniform:
            return j
    return allowed[-1]


# ----------------------------------------------------------------------------------------------- momentum


@dataclass
class Momentum:
    """What one process keeps from step to step: the teacher, two queues, two centres."""

    teacher: State
    size: int
    image_centre: Tensor
    text_centre: Tensor
    momentum: float = 0.995
    decay: float = 0.99
    centre_momentum: float = 0.9
    image_queue: Stored = field(default_factory=Stored)
    text_queue: Stored = field(default_factory=Stored)

    def after_step(self, student: State, images: Tensor, texts: Tensor, ids: Sequence[int]) -> None:
        """`images`, `texts`: the teacher's unit features of all ranks' rows, f_t of Eq. 6."""
        for queue, rows in ((self.image_queue, images), (self.text_queue, texts)):
            queue.weights[:] = [weight * self.decay for weight in queue.weights]
            for row, number in zip(rows, ids, strict=True):
                queue.features.append(row.detach().clone())
                queue.ids.append(int(number))
                queue.weights.append(1.0)
            for values in (queue.features, queue.ids, queue.weights):
                del values[: max(0, len(values) - self.size)]
        self.image_centre = self._centre(self.image_centre, images)
        self.text_centre = self._centre(self.text_centre, texts)
        for name, value in self.teacher.items():
            self.teacher[name] = self.momentum * value + (1 - self.momentum) * student[name].detach()

    def _centre(self, centre: Tensor, features: Tensor) -> Tensor:
        mean = sum(features.detach(), torch.zeros_like(centre)) / len(features)
        return self.centre_momentum * centre + (1 - self.centre_momentum) * mean
