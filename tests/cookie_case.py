"""A tiny COOKIE in float64 and a batch for it, for the tests of the method on one rank and on several."""

from typing import Any

import torch
from torch import Tensor

from learning import methods
from learning.methods.base import Batch, Method, Texts

PX = 64
VOCABULARY = 30
ALL = ("ccl", "vcl", "tcl", "hinge")
MODEL: dict[str, Any] = {
    "method": "cookie",
    "vision": {"name": "test_resnet", "image_px": PX},
    "text": {
        "layers": 1,
        "width": 8,
        "heads": 2,
        "intermediate": 12,
        "positions": 12,
        "max_length": 9,
        "dropout": 0,
    },
    "dimension": 8,
    "heads": 2,
    "intermediate": 12,
    "dropout": 0.0,
    "temperature": {"initial": 0.1, "learnable": True},
}


def build(losses: tuple[str, ...] = ALL, seed: int = 0, **changed: Any) -> Method:
    """The tiny model with `changed` fields (`vision__x`: of vision); no start of the fusion is special."""
    values = MODEL | {name: value for name, value in changed.items() if not name.startswith("vision__")}
    inner = {
        name.removeprefix("vision__"): value for name, value in changed.items() if name.startswith("vision__")
    }
    values["vision"] = MODEL["vision"] | inner
    torch.manual_seed(seed)
    model = methods.build(methods.parse_config(values), losses, VOCABULARY).double()
    for parameter in model.fusion.parameters():  # type: ignore[union-attr]
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.train()


def texts(count: int, longest: int, generator: torch.Generator) -> Texts:
    """`count` texts of 3 to `longest` tokens, the first of them the longest."""
    lengths = torch.randint(3, longest + 1, (count,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (count, longest), generator=generator)
    return Texts(ids * mask, mask)


def batch(model: Method, count: int = 4, seed: int = 0) -> Batch:
    """A batch with the views that the model wants; the views of a text differ in length."""
    generator = torch.Generator().manual_seed(seed)
    views = model.views()
    images: dict[str, Tensor] = {
        name: torch.randn(count, 3, PX, PX, generator=generator, dtype=torch.float64) for name in views.images
    }
    words = {name: texts(count, 5 + number, generator) for number, name in enumerate(views.texts)}
    return Batch(images, words, [f"k{number}" for number in range(count)])


def rows(whole: Batch, part: slice) -> Batch:
    """Some rows of a batch, texts cut to their own longest, as a rank's loader would have them."""
    words = {}
    for name, text in whole.texts.items():
        longest = int(text.mask[part].sum(dim=1).max())
        words[name] = Texts(text.ids[part, :longest], text.mask[part, :longest])
    return Batch({name: image[part] for name, image in whole.images.items()}, words, whole.keys[part])
