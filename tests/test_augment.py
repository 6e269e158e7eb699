"""The augmentations: their order, their odds, their ranges, and that the given generator alone decides."""

import colorsys
import io
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from data_tools.pictures import EncodedPicture
from learning.training import augment
from learning.training.augment import ImageTransform, augment_tokens

SPECIAL = (0, 1, 2, 3, 4)
MASK = 4
HALF = (0.5, 0.5, 0.5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 30, width: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=generator(seed), dtype=torch.uint8)


def as_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class Scripted:
    """Stands in for torch.rand: the draws of one picture, as wanted; by default none acts."""

    NOTHING = (1.0, 1.0, 0.0, 0.0, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.9)

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.draws = list(self.NOTHING)
        monkeypatch.setattr(augment.torch, "rand", lambda *shape, generator: torch.tensor(self.draws))


def in_order(pixels: Tensor, side: int, draws: list[float], noise: Tensor | None) -> Tensor:
    """Sec. IV-C a, operation by operation on the whole picture, resized after the last one; values 0-1."""
    height, width = pixels.shape[1:]
    h, w = round((0.6 + 0.4 * draws[0]) * height), round((0.6 + 0.4 * draws[1]) * width)
    top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
    x = pixels[:, top : top + h, left : left + w].double() / 255
    if draws[4] < 0.5:
        x = x.flip(2)
    if noise is not None:
        x = x + 0.05 * noise.double()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)

    def grey(image: Tensor) -> Tensor:
        return torch.einsum("c,chw->hw", luma, image)

    if draws[6] < 0.8:
        x = x * (0.6 + 0.8 * draws[7])
        contrast = 0.6 + 0.8 * draws[8]
        x = contrast * x + (1 - contrast) * grey(x).mean()
        saturation = 0.6 + 0.8 * draws[9]
        x = saturation * x + (1 - saturation) * grey(x)
        angle = (2 * draws[10] - 1) * 0.1 * 2 * math.pi
        yiq = torch.tensor(
            [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]],
            dtype=torch.float64,
        )
        y, i, q = torch.einsum("ij,jhw->ihw", yiq, x)
        turned = torch.stack(
            [y, i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle)]
        )
        x = torch.einsum("ij,jhw->ihw", torch.linalg.inv(yiq), turned)
    if draws[11] < 0.2:
        x = grey(x).expand(3, -1, -1)
    x = F.interpolate(x[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    return x.clamp(0, 1)


@pytest.mark.parametrize("seed", range(12))
def test_the_one_pass_equals_the_papers_order_step_by_step(seed: int) -> None:
    pixels = picture(30, 23, seed)
    draws = torch.rand(12, generator=generator(seed))
    ours = ImageTransform(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).augmented(pixels, generator(seed))
    stream = generator(seed)
    torch.rand(12, generator=stream)
    values = draws.tolist()
    noise = None
    if values[5] < 0.5:
        h, w = round((0.6 + 0.4 * values[0]) * 30), round((0.6 + 0.4 * values[1]) * 23)
        noise = torch.randn(3, h, w, generator=stream)
    # without noise whole numbers are resized, rounded twice, and jitter may make three times as much of it
    atol = 2e-5 if noise is not None else 3 / 255
    torch.testing.assert_close(ours, in_order(pixels, 16, values, noise).float(), atol=atol, rtol=0)


def test_without_a_draw_the_augmented_picture_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch)
    transform = ImageTransform(16, HALF, HALF)
    pixels = picture()
    # the plain one is resized in whole numbers, rounded twice: a step of 1/255, over a std of 0.5
    torch.testing.assert_close(
        transform.augmented(pixels, generator()), transform.plain(pixels), atol=0.0079, rtol=0
    )


def test_crop_sides_are_independent_and_places_reach_all_edges() -> None:
    pixels = torch.zeros(3, 100, 200, dtype=torch.uint8)
    pixels[0] = torch.arange(100, dtype=torch.uint8)[:, None]
    pixels[1] = torch.arange(200, dtype=torch.uint8)[None]
    heights, widths, tops, lefts, bottoms, rights = [], [], [], [], [], []
    stream = generator(1)
    for _ in range(2000):
        window = augment._cropped(pixels, torch.rand(4, generator=stream).tolist())
        heights.append(window.shape[1] / 100)
        widths.append(window.shape[2] / 200)
        tops.append(int(window[0, 0, 0]))
        bottoms.append(int(window[0, -1, 0]))
        lefts.append(int(window[1, 0, 0]))
        rights.append(int(window[1, 0, -1]))
    for sides in (heights, widths):
        assert 0.6 <= min(sides) < 0.61
        assert 0.99 < max(sides) <= 1.0
        assert np.mean(sides) == pytest.approx(0.8, abs=0.01)
        assert np.std(sides) == pytest.approx(0.4 / math.sqrt(12), abs=0.01)
    assert abs(np.corrcoef(heights, widths)[0, 1]) < 0.08
    assert (min(tops), min(lefts), max(bottoms), max(rights)) == (0, 0, 99, 199)


def test_a_picture_of_one_pixel_survives() -> None:
    for seed in range(20):
        made = ImageTransform(8, HALF, HALF).augmented(picture(1, 1), generator(seed))
        assert made.shape == (3, 8, 8)
        assert bool(made.isfinite().all())


def test_odds_of_each_operation() -> None:
    """Each seen by its own trace on a picture, 1,500 times with one stream."""
    ramp = torch.linspace(60, 180, 64).byte().expand(64, 64)
    pixels = torch.stack([ramp, (ramp * 0.5).byte(), 255 - ramp])
    transform = ImageTransform(64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    stream = generator(3)
    seen: Counter[str] = Counter()
    count = 1500
    for _ in range(count):
        made = transform.augmented(pixels, stream)
        if float((made.amax(dim=0) - made.amin(dim=0)).max()) < 1e-4:
            seen["grey"] += 1
            brightness = made.mean(dim=(0, 1))
            seen["grey flipped"] += int(brightness[:8].mean() > brightness[-8:].mean())
            continue
        difference = (made[0] - made[2]).mean(dim=0)  # red grows to the right, blue falls
        seen["flipped"] += int(difference[:8].mean() > difference[-8:].mean())
        seen["noisy"] += int(float((made[:, 1:] - made[:, :-1]).std()) > 0.005)
    coloured = count - seen["grey"]
    assert seen["grey"] / count == pytest.approx(0.2, abs=0.03)
    assert seen["flipped"] / coloured == pytest.approx(0.5, abs=0.04)
    assert seen["noisy"] / coloured == pytest.approx(0.5, abs=0.04)
    jittered = 0
    draws = torch.rand(4000, 6, generator=stream)
    for row in draws.tolist():
        matrix, _ = augment._colours(torch.tensor([0.3, 0.4, 0.5]), [*row[:5], 0.9])
        jittered += int(not torch.equal(matrix, torch.eye(3)))
    assert jittered / len(draws) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("place", "low", "high"),
    [
        (7, "darker", "brighter"),
        (8, "flatter", "steeper"),
        (9, "paler", "richer"),
        (10, "turned", "turned back"),
    ],
)
def test_each_part_of_the_jitter_does_what_it_is_called(
    monkeypatch: pytest.MonkeyPatch, place: int, low: str, high: str
) -> None:
    script = Scripted(monkeypatch)
    transform = ImageTransform(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    pixels = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    pixels[0, :, :4], pixels[2] = 140, 80
    script.draws[6] = 0.0
    plain = transform.augmented(pixels, generator())

    def measure(image: Tensor) -> float:
        red, green, blue = image[:, 4, 0].tolist()
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        if place == 7:
            return value
        if place == 8:
            return float(image[0].std())
        return saturation if place == 9 else (0.5 - hue) % 1

    found = []
    for draw in (0.0, 1.0):
        script.draws[place] = draw
        found.append(measure(transform.augmented(pixels, generator())))
    assert found[0] < measure(plain) < found[1], (low, high)
    if place == 7:
        assert [value / measure(plain) for value in found] == pytest.approx([0.6, 1.4], abs=0.01)
    if place == 8:
        assert [value / measure(plain) for value in found] == pytest.approx([0.6, 1.4], abs=0.01)


def test_noise_has_the_stated_strength_and_comes_before_the_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch)
    script.draws[5] = 0.0
    grey = torch.full((3, 256, 256), 128, dtype=torch.uint8)
    same = ImageTransform(256, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).augmented(grey, generator(2))
    assert float(same.std()) == pytest.approx(0.05, rel=0.02)
    small = ImageTransform(64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).augmented(grey, generator(2))
    assert float(small.std()) < 0.02  # averaged by the resizing that follows


def test_the_generator_alone_decides() -> None:
    transform = ImageTransform(16, HALF, HALF)
    first = transform.augmented(picture(), generator(5))
    torch.manual_seed(123)
    again = transform.augmented(picture(), generator(5))
    assert torch.equal(first, again)
    state = torch.get_rng_state()
    stream = generator(5)
    one, two = transform.augmented(picture(), stream), transform.augmented(picture(), stream)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, first)
    assert not torch.equal(one, two)
    ids = torch.arange(5, 25)
    assert torch.equal(
        augment_tokens(ids, generator(1), MASK, 100, SPECIAL),
        augment_tokens(ids, generator(1), MASK, 100, SPECIAL),
    )


def encoded(pixels: Tensor, format: str) -> EncodedPicture:
    buffer = io.BytesIO()
    as_pil(pixels).save(buffer, format, quality=95)
    return EncodedPicture(buffer.getvalue(), max_pixels=10**7, name="k")


def smooth(height: int, width: int) -> Tensor:
    small = torch.rand(1, 3, 3, 3, generator=generator(3)) * 255
    return F.interpolate(small, (height, width), mode="bicubic")[0].clamp(0, 255).byte()


def test_an_encoded_png_gives_what_its_pixels_give() -> None:
    transform = ImageTransform(16, HALF, HALF)
    pixels = picture(50, 60)
    assert torch.equal(transform.plain(encoded(pixels, "PNG")), transform.plain(pixels))
    for seed in range(4):
        made = transform.augmented(encoded(pixels, "PNG"), generator(seed))
        assert torch.equal(made, transform.augmented(as_pil(pixels), generator(seed)))


@pytest.mark.parametrize("seed", range(6))
def test_a_jpeg_decoded_small_gives_nearly_what_the_whole_one_gives(seed: int) -> None:
    transform = ImageTransform(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    small = encoded(smooth(320, 240), "JPEG")
    whole = encoded(smooth(320, 240), "JPEG").decoded()
    assert float((transform.plain(small) - transform.plain(whole)).abs().mean()) < 0.004
    noisy = bool(torch.rand(12, generator=generator(seed))[5] < 0.5)
    made, expected = (transform.augmented(each, generator(seed)) for each in (small, whole))
    # the crop is of whole pixels; the noise is of a smaller picture: less of it is averaged away
    assert float((made - expected).abs().mean()) < (0.05 if noisy else 0.02)


def test_a_crop_has_the_views_pixels_at_whatever_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = ImageTransform(64, HALF, HALF)
    crops: list[tuple[int, int]] = []
    cropped = augment._cropped

    def watched(pixels: Tensor, draws: list[float]) -> Tensor:
        window = cropped(pixels, draws)
        crops.append((window.shape[1], window.shape[2]))
        return window

    monkeypatch.setattr(augment, "_cropped", watched)
    jpeg = encoded(smooth(320, 300), "JPEG")
    for seed in range(60):
        transform.augmented(jpeg, generator(seed))
    assert min(min(crop) for crop in crops) >= 64
    assert set(jpeg._decoded) == {2, 4}  # 1/4 where the crop takes more than 64 × 4 of 300 px
    alone = transform.augmented(encoded(smooth(320, 300), "JPEG"), generator(7))
    assert torch.equal(
        transform.augmented(jpeg, generator(7)), alone
    )  # what others asked for changes nothing


@pytest.mark.parametrize("seed", range(8))
def test_the_colour_matrix_has_the_values_of_torchvision(seed: int) -> None:
    """Where nothing leaves 0-1, which torchvision clips to after each step; and no hue, which is another."""
    pixels = torch.rand(3, 9, 11, generator=generator(seed)) * 0.3 + 0.3
    draws = torch.rand(3, generator=generator(seed + 100)) * 0.5 + 0.25
    brightness, contrast, saturation = (draws * 2 - 1) * 0.4 + 1
    expected = v2.adjust_brightness(pixels, float(brightness))
    expected = v2.adjust_contrast(expected, float(contrast))
    expected = v2.adjust_saturation(expected, float(saturation))
    matrix, offset = augment._colours(pixels.mean(dim=(1, 2)), [0.0, *draws.tolist(), 0.5, 0.9])
    made = torch.einsum("ij,jhw->ihw", matrix, pixels) + offset[:, None, None]
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=0)  # its luma's digits are others: 0.2989 …
    matrix, offset = augment._colours(pixels.mean(dim=(1, 2)), [0.9, *draws.tolist(), 0.5, 0.0])
    grey = torch.einsum("ij,jhw->ihw", matrix, pixels) + offset[:, None, None]
    torch.testing.assert_close(grey, v2.rgb_to_grayscale(pixels, 3), atol=1e-3, rtol=0)


def test_the_hue_turns_as_far_as_torchvisions() -> None:
    """And the other way round, which is all one: both ways are drawn alike."""
    red = torch.tensor([0.6, 0.4, 0.4])
    for draw in (0.0, 0.25, 0.75, 1.0):
        matrix, offset = augment._colours(red, [0.0, 0.5, 0.5, 0.5, draw, 0.9])
        made = colorsys.rgb_to_hsv(*(matrix @ red + offset).tolist())[0]
        theirs = v2.adjust_hue(red[:, None, None], (1 - 2 * draw) * augment.HUE).flatten()
        expected = colorsys.rgb_to_hsv(*theirs.tolist())[0]
        assert (made - expected + 0.5) % 1 - 0.5 == pytest.approx(0, abs=0.05)


def test_resizing_is_torchvisions() -> None:
    pixels = picture(50, 60)
    made = ImageTransform(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).plain(pixels)
    expected = v2.to_dtype(v2.resize(pixels, [16, 16], antialias=True), torch.float32, scale=True)
    torch.testing.assert_close(made, expected)


def test_pil_and_tensor_give_the_same() -> None:
    transform = ImageTransform(16, HALF, (0.25, 0.25, 0.25))
    pixels = picture()
    assert torch.equal(transform.plain(pixels), transform.plain(as_pil(pixels)))
    assert torch.equal(
        transform.augmented(pixels, generator(4)), transform.augmented(as_pil(pixels), generator(4))
    )
    grey = as_pil(pixels).convert("L")
    assert transform.plain(grey).shape == (3, 16, 16)


def test_plain_is_the_resized_picture_normalised() -> None:
    pixels = picture(37, 53)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    made = ImageTransform(16, mean, std).plain(pixels)
    resized = as_pil(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    expected = (np.asarray(resized, dtype=np.float64) / 255 - mean) / std
    np.testing.assert_allclose(made.permute(1, 2, 0).numpy(), expected, atol=1.01 / 255 / 0.2)
    assert made.dtype == torch.float32
    exact = ImageTransform(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).plain(picture(8, 8))
    torch.testing.assert_close(exact, picture(8, 8).float() / 255)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_other_tensors_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a picture is uint8 \(3, h, w\)"):
        ImageTransform(16, HALF, HALF).plain(wrong)
    with pytest.raises(ValueError, match="stds > 0"):
        ImageTransform(16, HALF, (0.5, 0.5, 0.0))


def test_odds_of_token_changes() -> None:
    """20 % of the tokens; of these 50 % [MASK], 10 % another word, 40 % deleted; never a special one."""
    words = torch.arange(100, 140)
    ids = torch.cat([torch.tensor([2]), words, torch.tensor([3])])
    seen: Counter[str] = Counter()
    stream = generator(6)
    rounds = 1500
    drawn: Counter[int] = Counter()
    for _ in range(rounds):
        made = augment_tokens(ids, stream, MASK, 90, SPECIAL).tolist()
        assert (made[0], made[-1]) == (2, 3)
        inside = made[1:-1]
        seen["masked"] += inside.count(MASK)
        new = [number for number in inside if number != MASK and number < 100]
        drawn.update(new)
        seen["replaced"] += len(new)
        seen["deleted"] += len(words) - len(inside)
        kept = [number for number in inside if number >= 100]
        assert kept == sorted(kept)  # the order of the words stays
    total = rounds * len(words)
    assert seen["masked"] / total == pytest.approx(0.10, abs=0.005)
    assert seen["replaced"] / total == pytest.approx(0.02, abs=0.003)
    assert seen["deleted"] / total == pytest.approx(0.08, abs=0.005)
    assert not set(drawn) & set(SPECIAL)
    assert set(drawn) == set(range(5, 90))  # every ordinary word, the first and the last too


def test_random_tokens_avoid_special_ids_wherever_they_stand() -> None:
    drawn = augment._random_tokens(4000, generator(), 12, (0, 3, 4, 11, 100))
    assert set(drawn.tolist()) == {1, 2, 5, 6, 7, 8, 9, 10}
    counts = Counter(drawn.tolist()).values()
    assert min(counts) > 400


def test_no_text_becomes_empty() -> None:
    one = torch.tensor([2, 50, 3])
    kinds: Counter[Any] = Counter()
    stream = generator(8)
    for _ in range(3000):
        made = augment_tokens(one, stream, MASK, 100, SPECIAL).tolist()
        assert len(made) == 3
        kinds["kept" if made[1] == 50 else "masked" if made[1] == MASK else "replaced"] += 1
    assert kinds["masked"] / 3000 == pytest.approx(0.1, abs=0.02)
    assert kinds["kept"] / 3000 == pytest.approx(0.88, abs=0.02)
    pair = torch.tensor([2, 50, 60, 3])
    survivors: Counter[int] = Counter()
    for seed in range(4000):
        made = augment_tokens(pair, generator(seed), MASK, 100, SPECIAL).tolist()
        if len(made) == 3:
            survivors[made[1]] += 1
    assert survivors[50] > 100
    assert survivors[60] > 100
    empty = torch.tensor([2, 3])
    assert augment_tokens(empty, stream, MASK, 100, SPECIAL).tolist() == [2, 3]


def test_the_given_ids_stay_as_they_are() -> None:
    ids = torch.arange(5, 45)
    copy = ids.clone()
    for seed in range(20):
        augment_tokens(ids, generator(seed), MASK, 100, SPECIAL)
    assert torch.equal(ids, copy)
