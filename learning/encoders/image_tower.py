"""What every image tower is: images in, tokens of a known number and width out; at rest where frozen."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learning.encoders.layers import Layered


class ImageTowerConfig(Protocol):
    """What the config of every kind of image tower has."""

    @property
    def image_px(self) -> int:
        """Side of the square that images become, pixels."""
        ...

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the pixels (0-1), by channel."""
        ...

    @property
    def std(self) -> tuple[float, float, float]:
        """Of the pixels (0-1), by channel."""
        ...

    @property
    def trainable(self) -> bool:
        """False: the tower keeps its weights."""
        ...

    def model_dump(self, *, mode: str = ..., exclude: set[str] | None = ...) -> dict[str, Any]:
        """All fields, as pydantic gives them."""
        ...


class PatchGrid(NamedTuple):
    """How the tokens of a ViT lie: those before the patches ([CLS], registers), then `side` × `side` patches,
    row by row."""

    before: int
    has_cls: bool  # then it is the first token
    side: int
    px: int  # side of a patch, pixels


class ImageTower(Layered):
    """(b, 3, h, w) images to (b, `tokens`, `width`) tokens by `backbone`, which may be frozen.

    A tower in which nothing wants a gradient keeps no activations. Its weights may be parameters, or buffers
    of the same names (a momentum teacher's).
    """

    config: ImageTowerConfig
    backbone: nn.Module
    tokens: int
    width: int

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """The tokens of images in the weights' dtype."""

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        hide: Callable[[Float[Tensor, "b p v"]], Float[Tensor, "b p v"]] | None = None,
    ) -> Float[Tensor, "b n v"]:
        """The tokens. Raises ValueError for images whose sides are not `image_px`: `tokens` says how many.

        `hide`: what is made of the embeddings of the patches before they get their positions, for masked
        image modelling (SimMIM, Xie et al. 2022, Sec. 3.2). Raises ValueError for it where there are none.
        """
        side = self.config.image_px
        if images.shape[-1] != side or images.shape[-2] != side:
            raise ValueError(
                f"images of {images.shape[-2]}x{images.shape[-1]} px; model.vision.image_px is {side}"
            )
        learns = any(parameter.requires_grad for parameter in self.backbone.parameters())
        with nullcontext() if learns else torch.no_grad(), self._hidden(hide):
            return self._encode(images.to(_dtype(self.backbone)))

    def train(self, mode: bool = True) -> "ImageTower":
        """As torch's; but a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if not self.config.trainable:
            self.backbone.eval()
        return self

    def patch_grid(self) -> PatchGrid:
        """How the tokens lie. Raises ValueError for a tower that does not embed patches one by one."""
        raise self._without_patches()

    def _patch_embedding(self) -> nn.Module:
        """What gives the patches' embeddings, (b, p, v) or (b, side, side, v). Raises ValueError likewise."""
        raise self._without_patches()

    def _without_patches(self) -> ValueError:
        return ValueError(f"model.vision: a {type(self).__name__} has no patches; choose a ViT")

    def _changed(self, found: Tensor, hide: Callable[[Tensor], Tensor]) -> Tensor:
        """What `hide` makes of what `_patch_embedding` gives, in the same layout."""
        return hide(found.flatten(1, -2)).view_as(found)

    @contextmanager
    def _hidden(self, hide: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        """Inside, `hide` changes the patches' embeddings.

        By a hook, so that the backbone's own forward runs: under ZeRO-3 it gathers [CLS] and positions.
        """
        if hide is None:
            yield
            return
        self.patch_grid()
        hook = self._patch_embedding().register_forward_hook(
            lambda _module, _inputs, found: self._changed(found, hide)
        )
        try:
            yield
        finally:
            hook.remove()

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of the same tower at another `image_px`, made for this one where that can be done."""
        return dict(state)


def with_fitted_towers(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state for `module`, the part of each image tower in it as `ImageTower.fitted` makes it."""
    found = dict(state)
    for name, part in module.named_modules():
        if isinstance(part, ImageTower):
            before = f"{name}."
            theirs = {key.removeprefix(before): v for key, v in state.items() if key.startswith(before)}
            found |= {before + key: value for key, value in part.fitted(theirs).items()}
    return found


def _dtype(module: nn.Module) -> torch.dtype:
    weights = chain(module.parameters(), module.buffers())
    return next(tensor.dtype for tensor in weights if tensor.is_floating_point())
