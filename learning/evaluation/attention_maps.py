"""Where a method looks in an image when it is given an entity: the attention map of R2D2, Sec. 4.4."""

import math

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from learning.evaluation.embed import evaluation_mode, weights_dtype
from learning.methods.base import Method, RanksPairs
from learning.tokenizer import Tokenizer


@torch.no_grad()
def attention_map(
    method: Method,
    tokenizer: Tokenizer,
    pixels: Float[Tensor, "3 h w"],
    entity: str,
    *,
    layer: int,
    max_length: int,
    device: torch.device,
) -> Float32[np.ndarray, "side side"]:
    """How an entity's attention is shared among the patches of an image, row by row; the shares sum to 1.

    It is the mean over the heads and over the entity's tokens of the attention to the image's patches in
    `layer` (from 1) of the text-image cross encoder. [CLS] and [SEP] do not ask, and what goes to the image's
    [CLS] is left out. The paper takes "the attention score of an image-entity pair": the entity alone is the
    text that is fed in. One pair is computed alone, so that no other changes it.

    `method` is on `device`; its modes are as before afterwards. Raises ValueError for a method that judges no
    pairs, a layer that it has not, an entity without a token, patches that are no square grid, and weights
    that have diverged.
    """
    if not isinstance(method, RanksPairs):
        raise ValueError(
            f"{type(method).__name__} embeds images and texts apart: no text attends to an image in it; "
            "leave the field out, or give a method that has cross encoders"
        )
    texts = tokenizer.encode([entity], max_length).to(device)
    if texts.ids.shape[1] < 3:
        raise ValueError(f"'{entity}' has no token beside [CLS] and [SEP]; give another text")
    with evaluation_mode(method):
        images = method.image_tokens(pixels[None].to(device, weights_dtype(method)))
        weights = method.attention(images, method.text_tokens(texts), texts.mask, layer)
    to_patches = weights[0, :, 1:-1].double().mean(dim=(0, 1))  # one text is not padded: it ends with [SEP]
    side = math.isqrt(len(to_patches))
    if side * side != len(to_patches):
        raise ValueError(
            f"the image's {len(to_patches)} tokens beside [CLS] are no square grid of patches; "
            "that takes a ViT with image_cls: first and no register tokens, or a CNN with image_cls: mean"
        )
    total = to_patches.sum()
    if not total > 0:  # catches nan as well
        raise ValueError(
            f"the attention of '{entity}' to the patches sums to {float(total):.4g} "
            "(not a number: the training that made the model has diverged)"
        )
    return (to_patches / total).float().view(side, side).cpu().numpy()
