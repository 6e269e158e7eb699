"""A trained model as files: weights (safetensors), model.json and the tokenizer; written, read, and used.

`out/` of a training stage holds all that using the model needs, and refers to no other file:
    model.safetensors   the method's state
    heads.safetensors   what only its losses read (`Method.training_heads`), where it has such heads
    model.json          the model config, the losses, the image and text preparation, a checksum a file
    tokenizer.json, …   what Tokenizer.save writes
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float32
from PIL import Image, ImageOps
from pydantic import ValidationError
from torch import Tensor

from learning import methods
from learning.methods.base import EmbedsRegions, Method, MethodConfig, Regions, Texts
from learning.tokenizer import Tokenizer, load_tokenizer
from learning.training.augment import ImageTransform
from learning.training.split_regions import cast_regions, check_sizes, reads_regions

WEIGHTS = "model.safetensors"
HEADS = "heads.safetensors"
CARD = "model.json"
FORMAT = 1
_FIELDS = ("model", "losses", "vocabulary_size", "image", "max_length", "files")


def save(
    directory: Path,
    method: Method,
    model_config: Mapping[str, Any],
    losses: tuple[str, ...],
    tokenizer: Tokenizer,
    *,
    transform: ImageTransform,
    max_length: int,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model to `directory` (a stage's `out/`); model.json is written last, by rename.

    model_config: the recipe's `model` section. Stored is the config that the method was built from, where
    it has one (`method.config`): sizes that stood in other files are spelt out there.
    transform, max_length: how images and texts were prepared in training (max_length in tokens).
    state: the method's state dict where `method` does not hold it whole (ZeRO-3); default
    `method.state_dict()`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    tensors = _unshared(method.state_dict() if state is None else state)
    model = without_heads(method, tensors)
    heads = {name: tensor for name, tensor in tensors.items() if name not in model}
    safetensors.torch.save_file(model, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / HEADS).unlink(missing_ok=True)
    if heads:
        safetensors.torch.save_file(heads, directory / HEADS, metadata={"format": "pt"})
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name != CARD)
    card = {
        "format": FORMAT,
        "model": _resolved(method, model_config),
        "losses": list(losses),
        "vocabulary_size": tokenizer.vocabulary_size,
        "image": {
            "px": int(transform.image_px),
            "mean": [float(value) for value in transform.mean],
            "std": [float(value) for value in transform.std],
        },
        "max_length": int(max_length),
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files},
    }
    temporary = directory / f"{CARD}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(card, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / CARD)


@dataclass
class RetrievalModel:
    """A method, its tokenizer and its preparation of images and texts; in evaluation mode, on `device`."""

    method: Method
    tokenizer: Tokenizer
    transform: ImageTransform
    max_length: int  # tokens, with [CLS] and [SEP]
    model_config: dict[str, Any]
    losses: tuple[str, ...]
    device: torch.device

    def embed_images(self, images: Sequence[Image.Image], batch: int = 64) -> Float32[np.ndarray, "n d"]:
        """Unit-length embeddings of pictures of any mode; transparent parts are put on white.

        Raises ValueError for a model that reads regions.
        """
        if reads_regions(self.method):
            raise ValueError(
                "this model reads regions of pictures, not their pixels; use embed_regions, with regions "
                "made as in training (a regions stage)"
            )
        rows = []
        for start in range(0, len(images), batch):
            pixels = torch.stack([self.transform.plain(as_rgb(i)) for i in images[start : start + batch]])
            rows.append(self._embed(self.method.embed_images, pixels.to(self.device)))
        return self._joined(rows)

    def embed_regions(self, regions: Regions, batch: int = 64) -> Float32[np.ndarray, "n d"]:
        """Unit-length embeddings of pictures by their regions, of a model that reads these.

        Raises ValueError for a model of pictures, and for another number of regions or numbers a region.
        """
        if not (reads_regions(self.method) and isinstance(self.method, EmbedsRegions)):
            raise ValueError("this model reads pictures, not regions; use embed_images")
        check_sizes(self.method, regions.features.shape[1], regions.features.shape[2], "these regions")
        rows = []
        for start in range(0, len(regions), batch):
            part = regions.each(lambda x, start=start: x[start : start + batch].to(self.device))  # type: ignore[misc]
            rows.append(self._embed(self.method.embed_regions, cast_regions(part, torch.float32)))
        return self._joined(rows)

    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> Float32[np.ndarray, "n d"]:
        """Unit-length embeddings of texts; what is over `max_length` tokens is cut off."""
        if isinstance(texts, str):
            raise ValueError("texts: one string was given; give a list of strings")
        rows = []
        for start in range(0, len(texts), batch):
            tokens = self.tokenizer.encode(list(texts[start : start + batch]), self.max_length)
            rows.append(self._embed(self.method.embed_texts, tokens.to(self.device)))
        return self._joined(rows)

    @torch.inference_mode()
    def _embed(self, embed: Any, inputs: Tensor | Texts | Regions) -> np.ndarray:
        embedded = embed(inputs).float()
        return torch.nn.functional.normalize(embedded, dim=-1).cpu().numpy()

    def _joined(self, rows: list[np.ndarray]) -> np.ndarray:
        if rows:
            return np.concatenate(rows)
        # the dimension is the model's secret: one text tells it
        token = self.tokenizer.encode(["a"], self.max_length).to(self.device)
        return np.zeros((0, self._embed(self.method.embed_texts, token).shape[1]), dtype=np.float32)


def without_heads(method: Method, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of `method` without its training heads: what the model itself is."""
    return {name: value for name, value in state.items() if not name.startswith(method.training_heads)}


def load(directory: Path, device: str = "cpu", heads: bool = False) -> RetrievalModel:
    """The model of a training stage's directory, or of its `out/`, in evaluation mode.

    `heads`: with its training heads, where there are any.
    Raises ValueError, naming the file and what to do, when it is no training stage's directory, when the
    stage is not done, or when a file is missing or damaged.
    """
    out, card = _open(Path(directory))
    try:
        config = methods.parse_config(without_weights(card["model"]))
    except (ValidationError, ValueError) as error:
        raise ValueError(f"{out / CARD}: model: {error}") from error
    losses = tuple(card["losses"])
    with torch.random.fork_rng(devices=[]):  # building a model draws numbers; loading one must not
        method = methods.build(config, losses, int(card["vocabulary_size"]))
        if heads:
            method.make_heads()
    try:
        method.load_state_dict(_read(out / WEIGHTS) | (_read_heads(out) if heads else {}), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{out / WEIGHTS}: does not fit the model of {CARD}: {error}") from error
    method.eval().requires_grad_(False)
    image = card["image"]
    return RetrievalModel(
        method=method.to(torch.device(device)),
        tokenizer=load_tokenizer(out),
        transform=ImageTransform(image["px"], tuple(image["mean"]), tuple(image["std"])),
        max_length=int(card["max_length"]),
        model_config=card["model"],
        losses=losses,
        device=torch.device(device),
    )


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The state dict in a training stage's directory (or its `out/`), on the CPU; errors as in `load`."""
    out, _ = _open(Path(directory))
    return _read(out / WEIGHTS)


def read_heads(directory: Path) -> dict[str, Tensor]:
    """The training heads beside the model, as `read_weights`; empty where there are none."""
    return _read_heads(_open(Path(directory))[0])


def _read_heads(out: Path) -> dict[str, Tensor]:
    return _read(out / HEADS) if (out / HEADS).exists() else {}


def read_card(directory: Path) -> dict[str, Any]:
    """What model.json says, its files checked: model, losses, vocabulary_size, image, max_length."""
    return _open(Path(directory))[1]


def _resolved(method: Method, model_config: Mapping[str, Any]) -> dict[str, Any]:
    config = getattr(method, "config", None)
    if not isinstance(config, MethodConfig):
        config = methods.parse_config(dict(model_config))
    return config.model_dump(mode="json")


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, by the rules of data_tools.pictures.open_picture.

    The camera's rotation is applied, transparency laid on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow itself would clip at 255
        return Image.fromarray(
            np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model config that starts from nothing: every `weights` in it, at any depth, is None.

    The saved state replaces the weights that training started from; their files need not be there any more.
    """
    return {
        key: None if key == "weights" else without_weights(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }


def _open(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The directory that holds the model's files, and model.json's content, each file checked."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: is no directory; give a training stage's directory")
    stage = directory.parent if directory.name == "out" else directory
    if (stage / "config.yaml").exists() and not (stage / "DONE.json").exists():
        raise ValueError(f"{stage}: the stage is not done (no DONE.json); run it to its end first")
    out = directory if (directory / CARD).exists() else directory / "out"
    path = out / CARD
    if not path.exists():
        raise ValueError(
            f"{directory}: is no training stage's directory (no out/{CARD}); give a finetune stage's, say"
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: damaged: {error}; delete the stage's directory and run the stage again"
        ) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise ValueError(f"{path}: format: {found!r}; this version reads {FORMAT}")
    missing = [name for name in _FIELDS if name not in card]
    if missing:
        raise ValueError(f"{path}: damaged: {', '.join(missing)} missing; run the stage again")
    for name, expected in card["files"].items():
        _check(out / name, expected)
    return out, card


def _check(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {CARD} names it; run the stage again")
    if path.stat().st_size != expected["bytes"]:
        found = path.stat().st_size
        raise ValueError(f"{path}: damaged: {found} bytes, not {expected['bytes']}; run the stage again")
    if _sha256(path) != expected["sha256"]:
        raise ValueError(f"{path}: damaged: its sha256 is not the one in {CARD}; run the stage again")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}; run the stage again") from error


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing memory with another (safetensors refuses that)."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen:
            tensor = tensor.clone()
        seen.add(pointer)
        tensors[name] = tensor
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
