"""What an encoder says of its layers: each parameter's depth, for its rate, and the blocks that repeat."""

from abc import ABC, abstractmethod

from torch import nn


class Layered(nn.Module, ABC):
    """An encoder of layers in order. Every parameter belongs to one layer, 0 the nearest to the input."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The modules that repeat, in order: each is computed from its inputs alone."""

    @abstractmethod
    def depths(self) -> dict[str, int]:
        """The layer of each parameter, by the parameter's name in this module."""
