"""R2D2's released augmentation: its crops, its operations, and that the given generator alone decides."""

import threading
from collections import Counter

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from learning.training import rand_augment
from learning.training.augment import ImageTransform
from learning.training.rand_augment import SMALLEST_SIDE, crop_of, rand_augmented


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=generator(seed), dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(60, 80), (50, 50), (40, 200), (200, 40), (1, 1)])
def test_crops_have_the_releases_areas_and_aspects_and_reach_all_edges(height: int, width: int) -> None:
    crops = [
        crop_of(height, width, torch.rand(22, generator=generator(seed)).tolist()) for seed in range(400)
    ]
    for top, left, h, w in crops:
        assert h > 0 and 0 <= top <= height - h
        assert w > 0 and 0 <= left <= width - w
        assert min(h, w) >= min(height, width) * SMALLEST_SIDE - 1
        if max(height, width) <= 2 * min(height, width) and height > 1:
            assert 0.5 - 0.04 <= h * w / (height * width) <= 1
            assert 0.73 <= w / h <= 1.37
    if height > 1 and max(height, width) <= 2 * min(height, width):
        assert min(top for top, *_ in crops) == min(left for _, left, *_ in crops) == 0
        assert max(top + h for top, _, h, _ in crops) == height
        assert max(left + w for _, left, _, w in crops) == width


@pytest.mark.parametrize(("height", "width"), [(60, 80), (50, 50), (100, 70), (40, 200), (200, 40)])
def test_crops_are_torchvisions_in_distribution(height: int, width: int) -> None:
    theirs = v2.RandomResizedCrop(16, scale=(0.5, 1.0))
    image = picture(height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wanted = [theirs.make_params([image]) for _ in range(3000)]
    boxes = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in wanted])
    ours = torch.tensor(
        [crop_of(height, width, torch.rand(22, generator=generator(seed)).tolist()) for seed in range(3000)]
    )
    for own, other in zip(ours.double().T, boxes.double().T, strict=True):
        assert abs(float(own.mean() - other.mean())) < 0.6
        assert abs(float(own.std() - other.std())) < 0.6


def test_the_generator_alone_decides_also_beside_another_thread() -> None:
    image = picture()
    wanted = [rand_augmented(image, 24, generator(seed)) for seed in range(20)]
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            torch.rand(10)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = [rand_augmented(image, 24, generator(seed)) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), before)  # the process's random state is not touched
    thread = threading.Thread(target=disturb)
    thread.start()
    beside = [rand_augmented(image, 24, generator(seed)) for seed in range(20)]
    done.set()
    thread.join()
    for first, second, third in zip(wanted, again, beside, strict=True):
        assert first.shape == (3, 24, 24) and first.dtype == torch.uint8
        assert torch.equal(first, second) and torch.equal(first, third)
    assert sum(torch.equal(wanted[0], other) for other in wanted[1:]) == 0


def test_two_operations_are_drawn_evenly_and_act_half_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    signs: Counter[int] = Counter()

    def noting(name: str) -> object:
        def operation(image: Tensor, sign: int) -> Tensor:
            seen[name] += 1
            signs[sign] += 1
            return image

        return operation

    monkeypatch.setattr(rand_augment, "_OPERATIONS", {n: noting(n) for n in rand_augment._OPERATIONS})
    for seed in range(3000):
        rand_augmented(torch.zeros(3, 4, 4, dtype=torch.uint8), 2, generator(seed))
    assert len(seen) == 10
    assert 2850 < sum(seen.values()) < 3150  # 2 × 3000 × 0.5
    assert all(230 < count < 370 for count in seen.values()), seen
    assert 1400 < signs[1] < 1600


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("shear_x", "ShearX"),
        ("shear_y", "ShearY"),
        ("rotate", "Rotate"),
        ("autocontrast", "AutoContrast"),
        ("equalize", "Equalize"),
        ("identity", "Identity"),
    ],
)
def test_the_strengths_are_torchvisions_at_5_of_10(name: str, theirs: str) -> None:
    """Where the release and torchvision's RandAugment have the same scale."""
    library = v2.RandAugment(magnitude=15, num_magnitude_bins=31, interpolation=v2.InterpolationMode.BILINEAR)
    strengths, signed = v2.RandAugment._AUGMENTATION_SPACE[theirs]
    scale = strengths(31, 32, 32)
    strength = 0.0 if scale is None else float(scale[15])
    image = picture(32, 32, seed=2) // 2
    for sign in (1, -1) if signed else (1,):
        wanted = library._apply_image_or_video_transform(
            image,
            theirs,
            sign * strength,
            interpolation=v2.InterpolationMode.BILINEAR,
            fill={Tensor: [128.0] * 3},
        )
        assert torch.equal(rand_augment._OPERATIONS[name](image, sign), wanted)
    assert name == "identity" or not torch.equal(wanted, image)


def test_a_shift_is_five_pixels_and_what_comes_in_is_grey() -> None:
    image = picture(20, 20)
    right = rand_augment._OPERATIONS["shift_x"](image, 1)
    assert torch.equal(right[:, :, 5:], image[:, :, :-5])
    assert (right[:, :, :5] == 128).all()
    up = rand_augment._OPERATIONS["shift_y"](image, -1)
    assert torch.equal(up[:, :-5], image[:, 5:])
    assert (up[:, -5:] == 128).all()


def test_half_of_all_pictures_are_mirrored_and_nothing_else_is_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rand_augment, "ACTS", 0.0)
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64).contiguous()
    mirrored = 0
    for seed in range(400):
        made = rand_augmented(ramp, 16, generator(seed)).float()
        mirrored += int(made[0, 8, 0] > made[0, 8, -1])
        assert torch.equal(made.diff(dim=2).sign().unique().abs(), torch.ones(1))
    assert 160 < mirrored < 240


def test_the_view_is_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rand_augment, "ACTS", 0.0)
    transform = ImageTransform(16, (0.25, 0.5, 0.75), (0.5, 0.25, 0.125))
    image = torch.full((3, 30, 20), 51, dtype=torch.uint8)
    made = transform.randaugmented(image, generator())
    wanted = (0.2 - torch.tensor([0.25, 0.5, 0.75])) / torch.tensor([0.5, 0.25, 0.125])
    assert made.shape == (3, 16, 16)
    torch.testing.assert_close(made, wanted[:, None, None].expand(3, 16, 16))
