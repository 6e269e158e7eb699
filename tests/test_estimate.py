"""Parameters and memory before training."""

import pytest

from learning import methods
from learning.training.estimate import bytes_per_gpu, estimate
from tests.training_case import MODEL


def test_parts_are_those_of_the_built_model() -> None:
    told = estimate(MODEL, ("ccl", "vcl", "tcl"), world_size=4, vocabulary_size=120)
    built = methods.build(methods.parse_config(MODEL), ("ccl", "vcl", "tcl"), 120)
    assert told.parts == {name: sum(p.numel() for p in own) for name, own in built.parts().items()}
    assert told.parameters == sum(p.numel() for p in built.parameters())
    assert told.trainable == sum(told.parts.values())
    assert "activations" in told.says


def test_weights_files_are_not_read() -> None:
    model = MODEL | {"vision": MODEL["vision"] | {"weights": "/nowhere/weights.safetensors"}}
    assert estimate(model, ("ccl",), 1, 120).trainable > 0


def test_memory_by_stage() -> None:
    billion = 10**9
    alone = bytes_per_gpu(billion, 0, 10**7, 1)
    assert alone["zero0"] == alone["zero1"] == alone["zero2"] == 20 * billion  # nothing to share with
    many = bytes_per_gpu(billion, 0, 10**7, 64)
    assert many["zero0"] == 20 * billion
    assert many["zero1"] == pytest.approx(4.25 * billion)
    assert many["zero2"] == pytest.approx(2 * billion + 18 * billion / 64)
    assert many["zero3"] == pytest.approx(4 * 10**7 + 18 * billion / 64)
    assert many["zero0"] > many["zero1"] > many["zero2"] > many["zero2_offload"] > many["zero3"]
    frozen = bytes_per_gpu(billion, billion, 10**7, 64)
    assert frozen["zero2"] - many["zero2"] == 2 * billion
    assert frozen["zero3"] - many["zero3"] == 2 * billion // 64
