"""COOKIE's modules in plain float64 torch, sample by sample, from the papers: for tests alone."""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def layer_norm(x: Tensor, state: State, name: str, eps: float = 1e-5) -> Tensor:
    """Ba et al. 2016, Eq. 4, for one vector."""
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def transformer_layer(tokens: Tensor, state: State, name: str, heads: int, activation: str) -> Tensor:
    """Vaswani et al. 2017, Sec. 3.1-3.3, for one sample's tokens (n, d), none of them padding."""
    d = tokens.shape[1]
    size = d // heads
    weight, bias = state[f"{name}.query_key_value.weight"], state[f"{name}.query_key_value.bias"]
    query, key, value = (
        [weight[i * d : (i + 1) * d] @ x + bias[i * d : (i + 1) * d] for x in tokens] for i in range(3)
    )
    rows = []
    for i in range(len(tokens)):
        heads_out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = torch.stack([query[i][part] @ k[part] / math.sqrt(size) for k in key])
            weights = torch.exp(scores) / torch.exp(scores).sum()
            heads_out.append(sum(w * v[part] for w, v in zip(weights, value, strict=True)))
        attended = linear(torch.cat(heads_out), state, f"{name}.attended")
        x = layer_norm(tokens[i] + attended, state, f"{name}.attention_norm")
        wide = linear(x, state, f"{name}.widen")
        wide = torch.where(wide > 0, wide, 0.0) if activation == "relu" else gelu(wide)
        rows.append(layer_norm(x + linear(wide, state, f"{name}.narrow"), state, f"{name}.ffn_norm"))
    return torch.stack(rows)


def encoder(
    tokens: Tensor, state: State, name: str, layers: int, heads: int, activation: str = "relu"
) -> Tensor:
    for number in range(layers):
        tokens = transformer_layer(tokens, state, f"{name}.layers.{number}", heads, activation)
    return tokens


def fully_connected(tokens: Tensor, state: State, name: str, layers: int) -> Tensor:
    rows = []
    for x in tokens:
        for number in range(layers):
            if number:
                x = torch.where(x > 0, x, 0.0)
            x = linear(x, state, f"{name}.layers.{number}")
        rows.append(x)
    return torch.stack(rows)


def gru_step(x: Tensor, h: Tensor, state: State, name: str, end: str) -> Tensor:
    """Cho et al. 2014, in the form with two biases."""
    inner = state[f"{name}.weight_ih_{end}"] @ x + state[f"{name}.bias_ih_{end}"]
    outer = state[f"{name}.weight_hh_{end}"] @ h + state[f"{name}.bias_hh_{end}"]
    (ir, iz, in_), (hr, hz, hn) = inner.chunk(3), outer.chunk(3)
    reset, update = 1 / (1 + torch.exp(-(ir + hr))), 1 / (1 + torch.exp(-(iz + hz)))
    new = torch.tanh(in_ + reset * hn)
    return (1 - update) * new + update * h


def generalized_pooling(tokens: Tensor, state: State, name: str, ranks: int = 32, hidden: int = 32) -> Tensor:
    """Chen et al. 2021, Sec. 3, for one sample's tokens (n, d)."""
    n = len(tokens)
    places = []
    for rank in range(n):
        angles = [rank / 10000 ** (2 * (i // 2) / ranks) for i in range(ranks)]
        values = [math.sin(a) if i % 2 == 0 else math.cos(a) for i, a in enumerate(angles)]
        places.append(torch.tensor(values, dtype=torch.float64))
    ahead, back = [], []
    h = torch.zeros(hidden, dtype=torch.float64)
    for x in places:
        h = gru_step(x, h, state, f"{name}.gru", "l0")
        ahead.append(h)
    h = torch.zeros(hidden, dtype=torch.float64)
    for x in reversed(places):
        h = gru_step(x, h, state, f"{name}.gru", "l0_reverse")
        back.insert(0, h)
    scores = torch.stack(
        [state[f"{name}.score.weight"][0] @ (a + b) / 2 for a, b in zip(ahead, back, strict=True)]
    )
    weights = torch.exp(scores / 0.1) / torch.exp(scores / 0.1).sum()
    ordered = torch.stack([torch.stack(sorted(column, reverse=True)) for column in tokens.unbind(1)], dim=1)
    return sum((w * row for w, row in zip(weights, ordered, strict=True)), torch.zeros(tokens.shape[1]))


def pooled(tokens: Tensor, kind: str, state: State, name: str) -> Tensor:
    """Eq. 4's Pooling of one sample's tokens (n, d)."""
    if kind == "max":
        return torch.stack([max(column) for column in tokens.unbind(1)])
    if kind == "mean":
        return sum(tokens, torch.zeros(tokens.shape[1])) / len(tokens)
    if kind == "first":
        return tokens[0]
    return generalized_pooling(tokens, state, name)


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum())


def info_nce(queries: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
    """COOKIE, Eq. 5."""
    terms = []
    for i, q in enumerate(queries):
        exps = [torch.exp(q @ k / temperature) for k in keys]
        terms.append(-torch.log(exps[i] / sum(exps)))
    return torch.stack(terms).sum() / len(queries)


def hinge(images: Tensor, texts: Tensor, margin: float) -> Tensor:
    """COOKIE, Eq. 13, on the hardest negatives, as a mean over the pairs."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(images)):
        right = images[i] @ texts[i]
        wrong_image = max(images[j] @ texts[i] for j in range(len(images)) if j != i)
        wrong_text = max(images[i] @ texts[j] for j in range(len(texts)) if j != i)
        total = total + torch.clamp(margin + wrong_image - right, min=0)
        total = total + torch.clamp(margin + wrong_text - right, min=0)
    return total / len(images)
