"""Pictures from the web: decoded to RGB as a browser shows them, or refused for one reason."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_tools.pictures import EncodedPicture, PictureError, open_picture, picture_extension, picture_format
from tests.data_helpers import picture

LIMIT = 1_000_000


def reason_of(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(PictureError, match="some-key") as caught:
        open_picture(data, max_pixels=max_pixels, name="some-key")
    return caught.value.reason


def noise(format: str) -> bytes:
    """A picture that does not compress away, so that a cut goes through its data."""
    pixels = np.random.default_rng(0).integers(0, 255, (100, 120, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(("format", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_good_pictures(format: str, ending: str) -> None:
    data = picture(120, 90, (200, 30, 30), format)
    image = open_picture(data, max_pixels=LIMIT, name="k")
    assert (image.mode, image.size) == ("RGB", (120, 90))
    assert np.abs(np.asarray(image).astype(int) - [200, 30, 30]).max() < 8
    assert picture_extension(data) == ending


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_truncated(format: str, share: float) -> None:
    data = noise(format)
    assert reason_of(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"\n  <html>",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        b'{"error": 1}',
        bytes(2000),
        b"RIFF\x10\0\0\0WAVEfmt ",
    ],
)
def test_not_an_image(data: bytes) -> None:
    assert reason_of(data) == "not_an_image"


def test_html_is_said_to_be_a_page() -> None:
    with pytest.raises(PictureError, match="a page or other markup"):
        open_picture(b"<html></html>", max_pixels=LIMIT, name="k")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_named_not_decoded(format: str) -> None:
    data = picture(format=format)
    assert picture_format(data) == format
    assert reason_of(data) == "unsupported_format"


def test_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 10 GB of pixels in 100 bytes
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )
    assert reason_of(bomb) == "bomb"
    assert reason_of(bomb, max_pixels=10**12) == "bomb"  # Pillow's own limit stands above any setting


def test_the_limit_counts_pixels() -> None:
    data = picture(100, 100)
    assert open_picture(data, max_pixels=10_000, name="k").size == (100, 100)
    assert reason_of(data, max_pixels=9_999) == "bomb"


def test_transparency_is_laid_on_white() -> None:
    for format in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, format)
        assert open_picture(buffer.getvalue(), max_pixels=LIMIT, name="k").getpixel((1, 1)) == (255, 255, 255)
    half = picture(4, 4, (0, 0, 0, 128), "PNG", "RGBA")
    assert open_picture(half, max_pixels=LIMIT, name="k").getpixel((1, 1)) == (127, 127, 127)


def test_palette_grey_and_sixteen_bits() -> None:
    assert open_picture(picture(4, 4, 7, "PNG", "L"), max_pixels=LIMIT, name="k").getpixel((0, 0)) == (
        7,
        7,
        7,
    )
    deep = picture(4, 4, 32_768, "PNG", "I;16")
    assert open_picture(deep, max_pixels=LIMIT, name="k").getpixel((0, 0)) == (128, 128, 128)
    palette = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 20, 30)).quantize().save(palette, "PNG")
    assert open_picture(palette.getvalue(), max_pixels=LIMIT, name="k").getpixel((0, 0)) == (10, 20, 30)


def test_exif_rotation_is_applied() -> None:
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert open_picture(buffer.getvalue(), max_pixels=LIMIT, name="k").size == (20, 40)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert open_picture(buffer.getvalue(), max_pixels=LIMIT, name="k").getpixel((0, 0)) == (255, 0, 0)


def test_the_error_crosses_process_borders() -> None:
    error = pickle.loads(pickle.dumps(PictureError("key", "bomb", "too big")))
    assert (error.name, error.reason, str(error)) == ("key", "bomb", "key: bomb: too big")


def photo(width: int, height: int, format: str = "JPEG", orientation: int = 1) -> bytes:
    """Smooth shapes with some noise, as a camera gives them."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = [np.sin(7 * x + 3 * y), np.cos(9 * y - 2 * x), np.sin(11 * x * y)]
    pixels = 120 + 80 * np.stack(planes, axis=-1) + np.random.default_rng(1).normal(0, 6, (height, width, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(buffer, format, quality=92, **({"exif": exif} if format == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("at_least", "size"),
    [
        (None, (643, 481)),
        ((643, 481), (643, 481)),
        ((322, 200), (643, 481)),  # half of 643 is 321.5: the decoder gives 322, but 2 x 322 > 643
        ((321, 240), (322, 241)),
        ((10, 121), (322, 241)),
        ((160, 120), (161, 121)),
        ((80, 60), (81, 61)),
        ((1, 1), (81, 61)),
        ((5000, 1), (643, 481)),
    ],
)
def test_a_jpeg_comes_at_the_smallest_scale_that_is_enough(
    at_least: tuple[int, int] | None, size: tuple[int, int]
) -> None:
    data = photo(643, 481)
    found = EncodedPicture(data, max_pixels=LIMIT, name="k").decoded(at_least)
    assert found.size == size
    full = open_picture(data, max_pixels=LIMIT, name="k")
    expected = np.asarray(full.resize(size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(found) - expected).mean() < 3  # of 255: the same picture


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_other_formats_come_whole(format: str) -> None:
    data = photo(320, 240, format)
    found = EncodedPicture(data, max_pixels=LIMIT, name="k").decoded((10, 10))
    assert np.array_equal(found, open_picture(data, max_pixels=LIMIT, name="k"))


def test_a_turned_jpeg_is_asked_for_upright() -> None:
    picture = EncodedPicture(photo(640, 320, orientation=6), max_pixels=LIMIT, name="k")
    assert picture.decoded().size == (320, 640)
    assert picture.decoded((160, 320)).size == (160, 320)
    assert picture.decoded((320, 160)).size == (320, 640)


def test_a_scale_does_not_hang_on_what_was_asked_before() -> None:
    data = photo(640, 480)
    one = EncodedPicture(data, max_pixels=LIMIT, name="k")
    one.decoded()
    small = one.decoded((100, 100))
    assert small is one.decoded((110, 110))
    assert np.array_equal(small, EncodedPicture(data, max_pixels=LIMIT, name="k").decoded((100, 100)))


def test_a_cut_jpeg_is_refused_at_every_scale() -> None:
    data = photo(640, 480)
    for at_least in (None, (300, 200), (10, 10)):
        picture = EncodedPicture(data[: len(data) // 2], max_pixels=LIMIT, name="some-key")
        for _ in range(2):  # asked again, it is refused again
            with pytest.raises(PictureError, match="some-key: truncated: JPEG of"):
                picture.decoded(at_least)
    with pytest.raises(PictureError, match="bomb: 640 x 480"):
        EncodedPicture(data, max_pixels=1000, name="k").decoded((10, 10))
