"""A model saved and loaded again: equal embeddings, any picture, and a clear word about every damage."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import learning
from data_tools.pictures import open_picture
from learning import model_files
from tests import tiny_model
from tests.tiny_model import write_stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return write_stage(tmp_path / "stage")


def pictures(count: int) -> list[Image.Image]:
    return [Image.open(io.BytesIO(tiny_model.picture_bytes(i))) for i in range(count)]


def test_the_loaded_model_gives_the_embeddings_of_the_saved_one(stage: Path) -> None:
    model = learning.load(stage)
    images, texts = pictures(5), ["red thing 1", "content of 7", "你好"]
    found = model.embed_images(images)
    original = tiny_model.method()
    with torch.no_grad():
        expected = original.embed_images(
            torch.stack([tiny_model.transform().plain(i.convert("RGB")) for i in images])
        )
        expected_texts = original.embed_texts(tiny_model.tokenizer().encode(texts, 12))
    assert found.dtype == np.float32
    assert found.shape == (5, 16)
    assert np.allclose(found, expected.numpy(), atol=1e-6)
    assert np.allclose(model.embed_texts(texts), expected_texts.numpy(), atol=1e-6)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_out_serves_as_well_as_the_stage_and_a_copy_of_out_stands_alone(stage: Path, tmp_path: Path) -> None:
    expected = learning.load(stage).embed_texts(["red"])
    assert np.array_equal(learning.load(str(stage / "out")).embed_texts(["red"]), expected)
    alone = tmp_path / "released"
    alone.mkdir()
    for path in (stage / "out").iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    assert np.array_equal(learning.load(alone).embed_texts(["red"]), expected)


def test_batches_change_nothing_but_the_last_bits(stage: Path) -> None:
    model = learning.load(stage)
    texts = [f"red thing {'very ' * (i % 7)}{i}" for i in range(11)]  # several lengths: padding differs
    assert np.allclose(model.embed_texts(texts, batch=3), model.embed_texts(texts, batch=11), atol=1e-5)
    assert np.allclose(model.embed_images(pictures(7), batch=2), model.embed_images(pictures(7)), atol=1e-5)


def test_nothing_to_embed_gives_no_rows_of_the_right_width(stage: Path) -> None:
    model = learning.load(stage)
    for empty in (model.embed_images([]), model.embed_texts([])):
        assert empty.shape == (0, 16)
        assert empty.dtype == np.float32


def test_a_string_is_not_taken_for_a_list_of_letters(stage: Path) -> None:
    with pytest.raises(ValueError, match="list of strings"):
        learning.load(stage).embed_texts("red")


def test_one_text_may_be_empty_or_long(stage: Path) -> None:
    found = learning.load(stage).embed_texts(["", "red " * 500])
    assert np.isfinite(found).all()


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _modes() -> dict[str, Image.Image]:
    generator = np.random.default_rng(3)
    rgb = Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(generator.integers(0, 256, (9, 7), dtype=np.uint8)))
    palette = rgb.quantize(8)
    clear = palette.copy()
    clear.info["transparency"] = 2
    return {
        "RGB": rgb,
        "RGBA": rgba,
        "L": rgb.convert("L"),
        "LA": rgba.convert("LA"),
        "1": rgb.convert("1"),
        "P": palette,
        "P with a clear colour": clear,
        "I;16": Image.fromarray(generator.integers(0, 65536, (9, 7), dtype=np.uint16)),
    }


@pytest.mark.parametrize("mode", _modes())
def test_a_picture_of_any_mode_is_read_as_training_reads_it(mode: str) -> None:
    image = _modes()[mode]
    expected = open_picture(_png(image), max_pixels=1000, name="x")
    assert np.array_equal(np.asarray(model_files.as_rgb(image)), np.asarray(expected))


def test_transparent_means_white_and_cmyk_is_read_too(stage: Path) -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    found = learning.load(stage).embed_images(
        [clear, Image.new("RGB", (20, 20), "white"), clear.convert("CMYK")]
    )
    assert np.allclose(found[0], found[1], atol=1e-6)


def test_loading_neither_draws_random_numbers_nor_asks_for_gradients(stage: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    model = learning.load(stage)
    assert torch.equal(torch.rand(3), expected)
    assert not any(p.requires_grad for p in model.method.parameters())
    assert not model.method.training


def test_import_learning_is_cheap() -> None:
    code = "import sys, learning; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_and_card_for_the_next_stage(stage: Path) -> None:
    weights = model_files.read_weights(stage)
    expected = tiny_model.method().state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    card = model_files.read_card(stage / "out")
    assert card["losses"] == ["ccl"]
    assert card["image"]["px"] == tiny_model.PX
    assert card["max_length"] == 12


def test_a_state_from_elsewhere_is_what_is_saved_and_shared_tensors_are_whole(tmp_path: Path) -> None:
    """ZeRO-3 gathers the state; tied weights share memory, which safetensors refuses."""
    state = {name: tensor.clone() for name, tensor in tiny_model.method(seed=5).state_dict().items()}
    tied = torch.arange(6.0)
    state |= {"a": tied, "b": tied, "half": tied[:3]}
    model_files.save(
        tmp_path / "out",
        tiny_model.method(seed=1),
        tiny_model.MODEL,
        ("ccl",),
        tiny_model.tokenizer(),
        transform=tiny_model.transform(),
        max_length=12,
        state=state,
    )
    found = model_files.read_weights(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_weights_that_training_started_from_are_not_needed_again(copy: Path) -> None:
    card_path = copy / "out" / "model.json"
    card = json.loads(card_path.read_text())
    card["model"]["vision"]["weights"] = "/nowhere/weights.safetensors"
    card_path.write_text(json.dumps(card))
    assert learning.load(copy).embed_texts(["red"]).shape == (1, 16)


def test_a_stage_that_is_not_done(copy: Path) -> None:
    (copy / "DONE.json").unlink()
    for given in (copy, copy / "out"):
        with pytest.raises(ValueError, match=r"not done \(no DONE.json\)"):
            learning.load(given)


def test_not_a_training_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        learning.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is no training stage's directory"):
        learning.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_or_missing_file_is_named(copy: Path, name: str) -> None:
    path = copy / "out" / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=rf"{name}: damaged: its sha256"):
        learning.load(copy)
    path.write_bytes(whole[:middle])
    with pytest.raises(ValueError, match=rf"{name}: damaged: {middle} bytes"):
        learning.load(copy)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: missing"):
        learning.load(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"format": 99}', "format: 99; this version reads 1"),
        ('{"format": 1}', "model, losses, vocabulary_size, image, max_length, files missing"),
        ("[]", "format: None"),
    ],
)
def test_a_damaged_card_is_named(copy: Path, content: str, message: str) -> None:
    (copy / "out" / "model.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model.json: .*{message}"):
        learning.load(copy)


def test_weights_of_another_model_are_refused(copy: Path) -> None:
    card_path = copy / "out" / "model.json"
    card = json.loads(card_path.read_text())
    card["model"]["dimension"] = 24
    card_path.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"model.safetensors: does not fit the model of model.json"):
        learning.load(copy)
