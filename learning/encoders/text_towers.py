"""The kinds of text towers: the type of a recipe's `model.text` section, and the tower that it names."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator
from torch import nn

from learning.encoders.gru import GruConfig, GruEncoder
from learning.encoders.text import TextConfig, TextEncoder

_CONFIGS: dict[str, type[BaseModel]] = {"bert": TextConfig, "gru": GruConfig}


def _by_kind(values: Any) -> Any:
    """Parsed by the Config of its kind, so that an error is of that kind's fields alone."""
    if not isinstance(values, dict):
        return values
    kind = values.get("tower", "bert")
    if kind not in _CONFIGS:
        raise ValueError(f"tower: {kind!r} is not a kind of text tower; allowed: {', '.join(_CONFIGS)}")
    return _CONFIGS[kind].model_validate(values)


TextTower = Annotated[TextConfig | GruConfig, BeforeValidator(_by_kind)]


def make_text(config: TextTower, vocabulary_size: int) -> TextEncoder | GruEncoder:
    """The tower; BERT's weights as the config says, a GRU's word vectors by `load_word_vectors`."""
    if isinstance(config, GruConfig):
        return GruEncoder(config, vocabulary_size)
    return TextEncoder(config, vocabulary_size)


def load_word_vectors(module: nn.Module, words: Sequence[str]) -> None:
    """Read the word vectors that text towers in `module` name, by the vocabulary's tokens, in its order.

    Raises ValueError as `read_word_vectors`.
    """
    for part in module.modules():
        if isinstance(part, GruEncoder):
            part.read_words(words)
