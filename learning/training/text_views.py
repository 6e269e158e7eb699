"""The views of a batch's texts, as token ids: plain, augmented, masked."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from learning.methods.base import MaskedTokens, TextView
from learning.tokenizer import Tokenizer
from learning.training.augment import augment_tokens
from learning.training.masking import mask_tokens
from learning.training.randomness import keyed_generator


class TextViews:
    """Texts to the ids of each view. What is drawn hangs on seed, epoch, sample key and view alone."""

    def __init__(self, tokenizer: Tokenizer, views: Mapping[str, TextView], max_length: int, seed: int):
        self.tokenizer, self.views, self.max_length, self.seed = tokenizer, views, max_length, seed
        self._vocabulary_size = tokenizer.vocabulary_size  # once: it is counted anew each time

    def __call__(
        self, epoch: int, keys: Sequence[str], texts: Sequence[str]
    ) -> dict[str, list[Int64[np.ndarray, " _"]]]:
        """Ids of each text, unpadded, by view."""
        rows = self.tokenizer.encode_each(texts, self.max_length)
        made = {}
        for name, how in self.views.items():
            each = (
                rows
                if how == "plain"
                else [self._changed(how, epoch, key, name, row) for key, row in zip(keys, rows, strict=True)]
            )
            made[name] = [ids.numpy() for ids in each]
        return made

    def _changed(self, how: TextView, epoch: int, key: str, view: str, ids: Tensor) -> Tensor:
        generator = keyed_generator(self.seed, epoch, key, "tokens", view)
        own = self.tokenizer
        if isinstance(how, MaskedTokens):
            return mask_tokens(ids, how.share, generator, own.mask_id, own.special_ids)
        return augment_tokens(ids, generator, own.mask_id, self._vocabulary_size, own.special_ids)
