"""Heads that predict inputs from tokens: BERT's for masked language modelling."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from learning.encoders.cross import NORM_EPS
from learning.encoders.fusion import initialise_linear


class MaskedLanguageHead(nn.Module):
    """Tokens to logits over the vocabulary: Linear, GELU, LayerNorm, Linear (Devlin et al. 2019)."""

    # Differs from BERT: the last layer has weights of its own, not the table of the embeddings: under ZeRO-3
    # a parameter belongs to one module.
    def __init__(self, width: int, vocabulary_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder = nn.Linear(width, vocabulary_size)
        initialise_linear(self)

    def forward(self, tokens_bkd: Float[Tensor, "b k d"]) -> Float[Tensor, "b k v"]:
        return self.decoder(self.norm(F.gelu(self.dense(tokens_bkd))))
