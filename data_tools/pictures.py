"""Opening a picture that came from the web: to RGB, or refused with one reason. Safe against bombs."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_tools.errors import DataError

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what is read, and the file ending of each
REASONS = ("not_an_image", "unsupported_format", "bomb", "truncated")

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


def open_picture(data: bytes, *, max_pixels: int, name: str) -> Image.Image:
    """Decode a picture's bytes to RGB, whole; transparency is laid on white, EXIF rotation applied.

    Args:
        data: the file's bytes; JPEG, PNG or WebP (of an animation the first frame).
        max_pixels: width x height above which nothing is decoded.
        name: what errors call the picture, say its URL or key.

    Raises:
        PictureError: not_an_image (HTML, empty …), unsupported_format, bomb, truncated.
    """
    found = picture_format(data)
    if found is None:
        raise PictureError(name, "not_an_image", _looks_like(data))
    if found not in FORMATS:
        raise PictureError(name, "unsupported_format", f"{found}; allowed: {', '.join(FORMATS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            image = Image.open(io.BytesIO(data), formats=(found,))
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError(name, "bomb", f"{width} x {height} px are more than max_pixels = {max_pixels}")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(name, "bomb", str(error)) from error
    except MemoryError as error:
        raise PictureError(name, "bomb", "decoding it takes more memory than there is") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error …
        raise PictureError(name, "truncated", f"{found} of {len(data)} bytes: {error}") from error


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
