"""Match probabilities of pairs of pictures and texts, in blocks of pairs shared among the processes.

The blocks are the same for any number of processes (see embed.py), and one process computes a block alone: it
encodes the pictures and the texts that stand in the block, each once, and scores its pairs. So the result is
the same to the last bit for 1, 2 or more processes, and memory holds the tokens of one block. Pairs in the
order of their pictures have few pictures in a block: the picture's tower is the dearest part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from data_tools.shards import ShardIndex
from learning.evaluation.embed import Advance, plain_pixels, spread, weights_dtype
from learning.methods.base import Method, RanksPairs
from learning.tokenizer import Tokenizer
from learning.training.augment import ImageTransform


@dataclass(frozen=True)
class PairScorer:
    """A method that judges pairs, with what it takes to read a split for it. On `device`, evaluation mode.

    Raises ValueError for a method that judges no pairs.
    """

    method: Method
    tokenizer: Tokenizer
    transform: ImageTransform
    index: ShardIndex
    batch: int  # pairs a block
    device: torch.device
    max_length: int  # of a text, in tokens
    max_pixels: int  # of a stored picture

    def __post_init__(self) -> None:
        check_ranks_pairs(type(self.method))

    def __call__(
        self,
        images: Int64[np.ndarray, " p"],
        texts: Int64[np.ndarray, " p"],
        of: Sequence[str],
        advance: Advance | None = None,
    ) -> Float32[np.ndarray, " p"]:
        """The match probability of each pair, on every process.

        images: positions in the index. texts: positions in `of`. `advance` is told how many pairs were done.
        Raises ValueError, on every process, that names a picture that cannot be read, or a pair whose score
        is no probability.
        """

        def block(start: int, stop: int) -> Tensor:
            return self._block(images[start:stop], texts[start:stop], of)

        return spread(len(images), self.batch, block, advance)

    def _block(
        self, images: Int64[np.ndarray, " p"], texts: Int64[np.ndarray, " p"], of: Sequence[str]
    ) -> Float[Tensor, " p"]:
        assert isinstance(self.method, RanksPairs)  # checked when this was made
        seen, image_of_pair = np.unique(images, return_inverse=True)
        asked, text_of_pair = np.unique(texts, return_inverse=True)
        pixels = [plain_pixels(self.index, i, self.transform, self.max_pixels) for i in seen.tolist()]
        read = self.tokenizer.encode([of[t] for t in asked.tolist()], self.max_length).to(self.device)
        image_tokens = self.method.image_tokens(torch.stack(pixels).to(self.device, weights_dtype(self.method)))
        text_tokens = self.method.text_tokens(read)
        image_rows = torch.from_numpy(image_of_pair).to(self.device)
        text_rows = torch.from_numpy(text_of_pair).to(self.device)
        found = self.method.score_pairs(
            image_tokens[image_rows], text_tokens[text_rows], read.mask[text_rows]
        ).float()
        wrong = ~((found >= 0) & (found <= 1))  # catches nan as well, which would win every comparison
        if bool(wrong.any()):
            pair = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{self.index.where(int(images[pair]))}: with the text '{of[int(texts[pair])]}' the match "
                f"probability is {float(found[pair]):.4g}; it lies between 0 and 1 (not a number: the training "
                "that made the model has diverged)"
            )
        return found


def check_ranks_pairs(method: type) -> None:
    """Raise ValueError for a class of method that judges no pairs of pictures and texts."""
    if not issubclass(method, RanksPairs):
        raise ValueError(
            f"{method.__name__} embeds pictures and texts apart and cannot judge a pair; leave the field out, "
            "or give a method that has score_pairs"
        )
