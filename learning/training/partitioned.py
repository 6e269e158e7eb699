"""Parameters that ZeRO-3 may have split over ranks, whole for a moment."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside, the parameters hold all their values, to be read. All ranks enter it together."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))
