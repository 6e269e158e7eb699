"""Match or no match: the binary cross-entropy of judged image-text pairs."""

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from learning.losses.contrastive import widened

MATCH = 1  # the class of a pair that belongs together; 0 is the other one


def matching_rows(logits_p2: Float[Tensor, "p 2"], labels_p: Int64[Tensor, " p"]) -> Float[Tensor, " p"]:
    """The cross-entropy of each pair: R2D2, L_c in Eq. 3. Half precision is computed in fp32."""
    return F.cross_entropy(widened(logits_p2), labels_p, reduction="none")


def match_probability(logits_p2: Float[Tensor, "p 2"]) -> Float[Tensor, " p"]:
    """The probability (0-1) that a pair matches."""
    return widened(logits_p2).softmax(dim=1)[:, MATCH]
