"""The GRU text tower: against a plain GRU, padding, word vectors of files, vocabularies of whole words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from learning import methods
from learning.encoders.gru import GruConfig, GruEncoder
from learning.encoders.text_towers import load_word_vectors
from learning.methods.base import Texts
from learning.tokenizer import SPECIAL, load_tokenizer, whole_words
from tests import cookie_case, semantic_reference

CONFIG = GruConfig(word_width=5, width=6, layers=2, max_length=9)
WORDS = ("a", "cat", "sat", "dog")


def tower(**changed: Any) -> GruEncoder:
    torch.manual_seed(0)
    return GruEncoder(CONFIG.model_copy(update=changed), 12).double()


def texts() -> Texts:
    lengths = torch.tensor([7, 3, 5])
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids = torch.randint(1, 12, (3, 7), generator=torch.Generator().manual_seed(0))
    return Texts(ids * mask, mask)


def test_it_is_the_plain_gru_both_ways() -> None:
    """Values at every token, gradients of every weight."""
    model, given = tower(), texts()
    out, state = model(given), dict(model.named_parameters())
    ours, theirs = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(given.mask.sum(1).tolist()):
        words = state["words.weight"][given.ids[row, :length]]
        expected = semantic_reference.bi_gru(words, {f"t.{n}": p for n, p in state.items()}, "t", 2)
        torch.testing.assert_close(out[row, :length], expected, rtol=1e-9, atol=1e-12)
        weights = torch.arange(expected.numel(), dtype=torch.float64).view_as(expected)
        ours, theirs = ours + (out[row, :length] * weights).sum(), theirs + (expected * weights).sum()
    found = torch.autograd.grad(ours, list(state.values()))
    for one, other in zip(found, torch.autograd.grad(theirs, list(state.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_it_is_torchs_packed_gru() -> None:
    model, given = tower(), texts()
    whole = nn.GRU(5, 3, num_layers=2, bidirectional=True, batch_first=True).double()
    for number in range(2):
        for ours, theirs in (("ahead", ""), ("back", "_reverse")):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                source = model.get_parameter(f"layers.{number}.{ours}.{kind}")
                whole.get_parameter(f"{kind}_l{number}{theirs}").data = source.data
    packed = nn.utils.rnn.pack_padded_sequence(
        model.words(given.ids), given.mask.sum(1), batch_first=True, enforce_sorted=False
    )
    expected = nn.utils.rnn.pad_packed_sequence(whole(packed)[0], batch_first=True)[0]
    torch.testing.assert_close(model(given) * given.mask[..., None], expected)


def test_padding_changes_no_token() -> None:
    model, given = tower(), texts()
    longer = Texts(nn.functional.pad(given.ids, (0, 4), value=3), nn.functional.pad(given.mask, (0, 4)))
    other = Texts(torch.where(given.mask.bool(), given.ids, 7), given.mask)
    out = model(given)
    for changed in (model(longer)[:, :7], model(other)):
        assert torch.equal(changed[given.mask.bool()], out[given.mask.bool()])
    alone = model(Texts(given.ids[1:2, :3], given.mask[1:2, :3]))
    torch.testing.assert_close(alone[0], out[1, :3])


def test_frozen_word_vectors_stay_and_layers_have_depths() -> None:
    model = tower(trainable=False)
    model(texts()).sum().backward()
    assert model.words.weight.grad is None
    assert all(p.grad is not None for p in model.layers.parameters())
    assert {name.split(".")[0]: 0 for name, depth in model.depths().items() if depth == 0} == {"words": 0}
    assert set(model.depths().values()) == {0, 1, 2}
    assert len(model.blocks()) == 2


@pytest.mark.parametrize("name", ["clip", "cookie"])
def test_methods_that_read_tokens_may_have_it(name: str) -> None:
    values = cookie_case.MODEL | {"text": CONFIG.model_dump(mode="json")}
    if name == "clip":
        values = {key: values[key] for key in ("vision", "text", "dimension")} | {"method": "clip"}
    config = methods.parse_config(values)
    assert methods.parse_config(config.model_dump(mode="json")) == config
    model = methods.build(config, ("ccl",), 12)
    assert model.embed_texts(texts()).shape == (3, 8)


# --------------------------------------------------------------------------------------------- word vectors


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def vectors(path: Path, width: int = 3) -> Tensor:
    """The table of a tower that read a file, for [PAD] … and WORDS."""
    model = tower(weights=path, word_width=width)
    model.words.weight.data = torch.zeros(12, width, dtype=torch.float64)
    load_word_vectors(nn.ModuleList([model]), [*SPECIAL, *WORDS])
    return model.words.weight.data


@pytest.mark.parametrize("header", [["4 3"], []], ids=["word2vec", "GloVe"])
def test_vectors_are_found_by_the_word(tmp_path: Path, header: list[str]) -> None:
    lines = ["dog 1 2 3", "the 4 5 6", ". . . 7 8 9", "cat -1e-1 0.5 2 ", "cat 9 9 9"]
    table = vectors(written(tmp_path / "v.txt", [*header, *lines]))
    expected = torch.zeros(12, 3, dtype=torch.float64)
    expected[len(SPECIAL) + 3] = torch.tensor([1.0, 2.0, 3.0])
    expected[len(SPECIAL) + 1] = torch.tensor([-0.1, 0.5, 2.0])
    torch.testing.assert_close(table, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["2 4", "cat 1 2 3 4", "dog 1 2 3 4"],
            "have 4 numbers, model.text.word_width is 3; set word_width: 4",
        ),
        (["cat 1 2", "dog 1 2"], "have 2 numbers, model.text.word_width is 3"),
        (["2 3", "cat 1 2 3", "dog 1 2"], "line 3: 2 numbers, not 3; the file is damaged"),
        (["cat 1 2 3", "dog 1 x 3"], "line 2: could not convert string to float: 'x'; the file is damaged"),
        (["cat 1 2 nan"], "line 1: a number is not finite"),
        (["Cat 1 2 3"], "has none of the vocabulary's 9 words"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = written(tmp_path / "v.txt", lines)
    with pytest.raises(ValueError, match=r"model\.text\.weights") as raised:
        vectors(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_binary_or_absent_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.bin").write_bytes(b"3 3\ncat \xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="binary format is not read: convert it to text"):
        vectors(tmp_path / "v.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        vectors(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="the word vectors were not read"):
        tower(weights=tmp_path / "v.txt")(texts())
    with pytest.raises(ValidationError, match="width: 7 is odd"):
        GruConfig(width=7)


# ---------------------------------------------------------------------------------------------- whole words


def test_a_vocabulary_of_whole_words(tmp_path: Path) -> None:
    """Frequent words first, ties by the word; any other word, a longer one too, is [UNK]."""
    lines = ["A cat sat.", "a Cat, a dog", *(f"w{n:02d}" for n in range(40))]
    tokenizer = whole_words(lines, 32)
    assert tokenizer.vocabulary()[:8] == [*SPECIAL, "a", "cat", ","]
    assert len(tokenizer.vocabulary()) == tokenizer.vocabulary_size == 32
    assert whole_words(reversed(lines), 32).vocabulary() == tokenizer.vocabulary()
    assert tokenizer.tokens("A cats CAT dog w39") == ["a", "[UNK]", "cat", "dog", "[UNK]"]
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again = load_tokenizer(tmp_path / "vocab.txt")  # so any list of words will do
    assert again.tokens("A cats CAT dog w39") == ["a", "[UNK]", "cat", "dog", "[UNK]"]
    with pytest.raises(ValueError, match="too small"):
        whole_words(lines, 10)
    with pytest.raises(ValueError, match="no word"):
        whole_words([" "], 32)
