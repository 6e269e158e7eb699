"""The text tower: BERT, from a local directory or from scratch, unpooled (COOKIE, Sec. III-A b)."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from learning.encoders.layers import Layered
from learning.encoders.local_model import check_sizes, read_config, resolve_sizes, weights_file
from learning.encoders.weights import load_by_name, read_weights
from learning.methods.base import Texts

PRESETS: dict[str, dict[str, int]] = {
    "bert_base": {"layers": 12, "width": 768, "heads": 12, "intermediate": 3072},
    "bert_medium": {"layers": 8, "width": 512, "heads": 8, "intermediate": 2048},
    "bert_small": {"layers": 4, "width": 512, "heads": 8, "intermediate": 2048},
    "bert_mini": {"layers": 4, "width": 256, "heads": 4, "intermediate": 1024},
    "bert_tiny": {"layers": 2, "width": 128, "heads": 2, "intermediate": 512},
}
# the recipe's fields and BERT's own names of them
_SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "positions": "max_position_embeddings",
    "segments": "type_vocab_size",
}


class TextConfig(BaseModel):
    """The recipe's `model.text` section. Sizes come from a preset or from the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Not written out: a model that was saved before there were kinds has none, and means this one.
    tower: Literal["bert"] = Field(default="bert", exclude=True)
    name: str | None = Field(default=None, description="a preset: bert_base, …; null: the sizes below")
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    intermediate: int = Field(ge=1)
    positions: int = Field(default=512, ge=3, description="rows of BERT's table of positions")
    segments: int = Field(
        default=2, ge=1, description="rows of BERT's table of segments; the first alone is used"
    )
    max_length: int = Field(
        default=50, ge=3, description="tokens a text, with [CLS] and [SEP]; the rest is cut off"
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)
    weights: Path | None = Field(
        default=None, description="local HF directory with the weights; null: from scratch"
    )
    trainable: bool = Field(default=True, description="false: BERT keeps its weights")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        return resolve_sizes(values, PRESETS, read_sizes, "BERT")

    @model_validator(mode="after")
    def _check(self) -> "TextConfig":
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide width, {self.width}")
        if self.max_length > self.positions:
            raise ValueError(f"max_length: {self.max_length} is over positions, {self.positions}: shorten it")
        return self


class TextEncoder(Layered):
    """Texts (b, m) to BERT's last layer (b, m, `width`). Padding is attended to by no token.

    Has no pooler: nothing would train it. Raises ValueError for weights that do not fit.
    """

    def __init__(self, config: TextConfig, vocabulary_size: int):
        super().__init__()
        self.config = config
        self.width = config.width
        # Not with this module, as timm in learning/encoders/vision.py
        from transformers import BertConfig, BertModel

        bert = BertConfig(
            vocab_size=vocabulary_size,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            pad_token_id=0,
            **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        )
        bert._attn_implementation = "sdpa"
        self.bert = BertModel(bert, add_pooling_layer=False)
        if config.weights is not None:
            self._load(config.weights, vocabulary_size)
        if not config.trainable:
            self.bert.requires_grad_(False)
        self.train(self.training)

    def forward(self, texts: Texts) -> Float[torch.Tensor, "b m t"]:
        if texts.ids.shape[1] > self.config.positions:
            raise ValueError(
                f"texts of {texts.ids.shape[1]} tokens; model.text.positions is {self.config.positions}"
            )
        learns = any(parameter.requires_grad for parameter in self.bert.parameters())
        with nullcontext() if learns else torch.no_grad():
            return self.bert(input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state

    def train(self, mode: bool = True) -> "TextEncoder":
        """As torch's; but a frozen BERT stays in evaluation mode."""
        super().train(mode)
        if not self.config.trainable:
            self.bert.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        return list(self.bert.encoder.layer)

    def depths(self) -> dict[str, int]:
        """0: the embeddings; then BERT's layers."""
        inside = "bert.encoder.layer."
        return {
            name: 1 + int(name.removeprefix(inside).split(".")[0]) if name.startswith(inside) else 0
            for name, _ in self.named_parameters()
        }

    def _load(self, directory: Path, vocabulary_size: int) -> None:
        field = "model.text.weights"
        check_sizes(self.config, directory, read_sizes(directory), "model.text")
        path = weights_file(directory, "model.text")
        found = {_bare(name): value for name, value in read_weights(path, field).items()}
        table = "embeddings.word_embeddings.weight"
        if table in found and len(found[table]) < vocabulary_size:
            raise ValueError(
                f"{field}: {path}: BERT knows {len(found[table])} tokens, "
                f"the vocabulary has {vocabulary_size}: "
                "give the vocabulary of this directory (vocabulary.path)"
            )
        if table in found:
            found[table] = found[table][:vocabulary_size]  # some tables are padded to a round number
        load_by_name(self.bert, found, ["pooler.", "cls.", "embeddings.position_ids"], f"{field}: {path}")


def read_sizes(directory: Path) -> dict[str, int]:
    """The sizes in a local BERT's config.json, by the recipe's names; ValueError names file and key."""
    path = directory / "config.json"
    content = read_config(directory, "model.text")
    if content.get("model_type") != "bert":
        raise ValueError(
            f"model.text: {path}: model_type is {content.get('model_type')!r}; only 'bert' is read"
        )
    for key, needed in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-12)):
        if content.get(key, needed) != needed:
            raise ValueError(f"model.text: {path}: {key} is {content[key]!r}; only {needed!r} is supported")
    missing = [theirs for theirs in _SIZES.values() if theirs not in content]
    if missing:
        raise ValueError(f"model.text: {path}: {', '.join(missing)} missing")
    return {ours: int(content[theirs]) for ours, theirs in _SIZES.items()}


def _bare(name: str) -> str:
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
