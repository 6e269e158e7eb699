"""The text tower of word vectors and a bidirectional GRU (Semantic Sharing, Sec. 3.2)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from learning.encoders.layers import Layered
from learning.encoders.word_vectors import read_word_vectors
from learning.methods.base import Texts

logger = logging.getLogger(__name__)
DRAWN = 0.1  # words without a vector begin even in ±0.1, as [Lee et al. 2018] has all of them


class GruConfig(BaseModel):
    """The recipe's `model.text` section of a bidirectional GRU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tower: Literal["gru"] = "gru"
    word_width: int = Field(default=300, ge=1, description="numbers of a word vector")
    width: int = Field(default=1024, ge=2, description="of a word's output: half of it each direction's")
    layers: int = Field(default=1, ge=1)
    max_length: int = Field(
        default=50, ge=3, description="tokens a text, with [CLS] and [SEP]; the rest is cut off"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on each layer's input")
    weights: Path | None = Field(
        default=None,
        description="word vectors as text, word2vec's or GloVe's; they are found by the word, so the "
        "vocabulary should be of whole words (vocabulary.kind: words); null: from scratch",
    )
    trainable: bool = Field(default=True, description="false: word vectors stay as they are; the GRU learns")

    @model_validator(mode="after")
    def _check(self) -> "GruConfig":
        if self.width % 2:
            raise ValueError(f"width: {self.width} is odd; each direction has half of it: give an even one")
        return self


class GruEncoder(Layered):
    """Texts (b, m) to (b, m, `width`): of each token, what goes before it beside what comes after it.

    Padding, on the right, changes nothing of the tokens; what stands at its own places means nothing.
    """

    # Both directions stand side by side, as the paper's source [Bahdanau et al. 2015] has them; SCAN's mean
    # of both is another choice.
    def __init__(self, config: GruConfig, vocabulary_size: int):
        super().__init__()
        self.config = config
        self.width = config.width
        self.words = nn.Embedding(vocabulary_size, config.word_width)
        nn.init.uniform_(self.words.weight, -DRAWN, DRAWN)
        widths = [config.word_width] + [config.width] * (config.layers - 1)
        self.layers = nn.ModuleList(_BothWays(width, config.width // 2) for width in widths)
        self.words.requires_grad_(config.trainable)
        self._vectors_are_read = config.weights is None

    def read_words(self, words: Sequence[str]) -> None:
        """Word vectors from `weights`, by the words of the vocabulary, in its order; others stay drawn."""
        if self.config.weights is None:
            return
        found = read_word_vectors(self.config.weights, words, self.config.word_width)
        logger.info("%s: %d of %d words have a vector", self.config.weights, len(found), len(words))
        with torch.no_grad():
            places = torch.tensor(list(found))
            self.words.weight[places] = torch.stack(list(found.values())).to(self.words.weight)
        self._vectors_are_read = True

    def forward(self, texts: Texts) -> Float[Tensor, "b m t"]:
        if not self._vectors_are_read:
            raise ValueError(
                "model.text.weights: the word vectors were not read: load_word_vectors comes first"
            )
        x_bmt = self.words(texts.ids)
        turned_bm = _turned(texts.mask)
        for layer in self.layers:
            x_bmt = layer(F.dropout(x_bmt, self.config.dropout, self.training), turned_bm)
        return x_bmt

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def depths(self) -> dict[str, int]:
        """0: the word vectors; then the layers."""
        return {
            name: 1 + int(name.split(".")[1]) if name.startswith("layers.") else 0
            for name, _ in self.named_parameters()
        }


class _BothWays(nn.Module):
    """A layer: one GRU from the first token on, one from the last one back."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.ahead = _Direction(width_in, width)
        self.back = _Direction(width_in, width)

    def forward(self, x_bmt: Tensor, turned_bm: Tensor) -> Tensor:
        back_bmt = self.back(_at(x_bmt, turned_bm))
        return torch.cat([self.ahead(x_bmt), _at(back_bmt, turned_bm)], dim=-1)


class _Direction(nn.Module):
    """One GRU (Cho et al. 2014, in the form with two biases), over all places of its inputs.

    Padding is behind the text and changes no state before it. So nothing waits for lengths, as packed
    sequences do.
    """

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.width = width
        self.weight_ih = nn.Parameter(torch.empty(3 * width, width_in))
        self.weight_hh = nn.Parameter(torch.empty(3 * width, width))
        self.bias_ih = nn.Parameter(torch.empty(3 * width))
        self.bias_hh = nn.Parameter(torch.empty(3 * width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, x_bmt: Tensor) -> Tensor:
        start = x_bmt.new_zeros(1, len(x_bmt), self.width)
        weights: list[Tensor] = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        hidden: Tensor = torch.gru(x_bmt, start, weights, True, 1, 0.0, self.training, False, True)[0]
        return hidden


def _turned(mask_bm: Int64[Tensor, "b m"]) -> Int64[Tensor, "b m"]:
    """Places by which a text is read from its last token to its first; padding stays where it is."""
    place_m = torch.arange(mask_bm.shape[1], device=mask_bm.device)
    return torch.where(mask_bm.bool(), mask_bm.sum(dim=1, keepdim=True) - 1 - place_m, place_m)


def _at(x_bmt: Tensor, places_bm: Tensor) -> Tensor:
    return x_bmt.gather(1, places_bm[..., None].expand_as(x_bmt))
