"""Opening a picture that came from the web: to RGB, or refused with one reason. Safe against bombs."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from data_tools.errors import DataError

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what is read, and the file ending of each
REASONS = ("not_an_image", "unsupported_format", "bomb", "truncated")
_JPEG_SCALES = (8, 4, 2)  # denominators of the scales at which a JPEG is decoded, beside 1
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

_MAGIC = (  # the first bytes of pictures, so that a damaged one is told from a page
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
)


class PictureError(DataError):
    """A picture that cannot be used. `reason` is one of REASONS; the message names the picture."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name}: {reason}: {detail}")
        self.name, self.reason, self.detail = name, reason, detail

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:  # so that it crosses process borders
        return type(self), (self.name, self.reason, self.detail)


@dataclass(frozen=True)
class PictureRules:
    """Which pictures of the web stay, once they were fetched."""

    min_side_px: int = 100
    max_aspect: float = 4.0  # longer side over shorter
    max_pixels: int = 50_000_000


def picture_format(data: bytes) -> str | None:
    """The format that the first bytes tell (JPEG, PNG, WEBP, GIF …), or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if data.startswith(magic)), None)


def picture_extension(data: bytes) -> str:
    """The file ending (jpg, png, webp) of a picture's bytes; ValueError for other formats."""
    found = picture_format(data)
    if found not in FORMATS:
        raise ValueError(
            f"a picture of format {found} has no file ending here; allowed: {', '.join(FORMATS)}"
        )
    return FORMATS[found]


class EncodedPicture:
    """A picture's bytes, decoded when they are asked for, and once for each scale that is asked for.

    A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the work: its decoder leaves out the
    frequencies that the smaller picture cannot show (Pillow's `draft`). Which scale is taken hangs on the
    picture's size and on what is asked for, on nothing else. Pillow decodes no part of a picture alone: a
    crop is taken from the scaled one.
    """

    def __init__(self, data: bytes, *, max_pixels: int, name: str) -> None:
        """`data`: the file's bytes; JPEG, PNG or WebP (of an animation the first frame).

        `max_pixels`: width x height above which nothing is decoded. `name`: what errors call the picture,
        say its URL or key.
        """
        self._data, self._max_pixels, self._name = data, max_pixels, name
        self._size: tuple[int, int] | None = None  # upright; known once it was opened
        self._decoded: dict[int, Image.Image] = {}  # by denominator of the scale

    def decoded(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """RGB, whole and upright (EXIF rotation applied), transparency laid on white.

        `at_least`: the width and height, in px of the upright picture, that are enough; None: full size. A
        JPEG comes at the smallest scale that still has them, all other pictures at full size.

        Raises:
            PictureError: not_an_image (HTML, empty …), unsupported_format, bomb, truncated.
        """
        with self._explained():
            image = self._open() if self._size is None else None
            scale = self._denominator(at_least)
            if scale not in self._decoded:
                image = image or self._open()
                if scale > 1:  # asked for w // scale x h // scale, draft takes exactly that scale
                    image.draft(None, (image.width // scale, image.height // scale))
                image.load()
                self._decoded[scale] = _to_rgb(ImageOps.exif_transpose(image))
            return self._decoded[scale]

    def _open(self) -> Image.Image:
        """The picture with its header read."""
        found = picture_format(self._data)
        if found is None:
            raise PictureError(self._name, "not_an_image", _looks_like(self._data))
        if found not in FORMATS:
            raise PictureError(self._name, "unsupported_format", f"{found}; allowed: {', '.join(FORMATS)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            image = Image.open(io.BytesIO(self._data), formats=(found,))
        width, height = image.size
        if width * height > self._max_pixels:
            raise PictureError(
                self._name, "bomb", f"{width} x {height} px are more than max_pixels = {self._max_pixels}"
            )
        turned = found == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) in _QUARTER_TURNS
        self._size = (height, width) if turned else (width, height)
        return image

    def _denominator(self, at_least: tuple[int, int] | None) -> int:
        if at_least is None or picture_format(self._data) != "JPEG":
            return 1
        assert self._size is not None
        room = min(have // max(1, need) for have, need in zip(self._size, at_least, strict=True))
        return next((scale for scale in _JPEG_SCALES if scale <= room), 1)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PictureError:
            raise
        except Image.DecompressionBombError as error:
            raise PictureError(self._name, "bomb", str(error)) from error
        except MemoryError as error:
            raise PictureError(self._name, "bomb", "decoding it takes more memory than there is") from error
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
            found = picture_format(self._data)
            raise PictureError(
                self._name, "truncated", f"{found} of {len(self._data)} bytes: {error}"
            ) from error


def open_picture(data: bytes, *, max_pixels: int, name: str) -> Image.Image:
    """A picture's bytes as RGB at full size: see EncodedPicture, which names arguments and errors."""
    return EncodedPicture(data, max_pixels=max_pixels, name=name).decoded()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255
        array = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(array >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _looks_like(data: bytes) -> str:
    if not data:
        return "0 bytes"
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<?xml", b"<svg", b"<!--")):
        return f"a page or other markup of {len(data)} bytes"
    return f"{len(data)} bytes that begin with {data[:12]!r}"
