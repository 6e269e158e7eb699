"""The tokenizer: deterministic training, Chinese by character, lengths, padding, files, and wrong files."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import models

from learning.tokenizer import SPECIAL, load_tokenizer, train_wordpiece

TEXTS = [
    "The smiling face with sunglasses, a yellow face",
    "Grinning cat face with smiling eyes",
    "戴墨镜的笑脸",
    "笑脸 表情 smiling",
    "naïve café façade",
    *(f"number {n} thing{n % 7} other{n % 5}ing" for n in range(40)),
]


def vocabulary(directory: Path) -> list[str]:
    return (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()


def test_the_same_texts_give_the_same_vocabulary_in_every_process(tmp_path: Path) -> None:
    """The trainer underneath numbers characters by a hash map that differs from process to process."""
    rare = "".join(
        chr(0x4E00 + n) for n in range(150)
    )  # more characters than fit: which are left out is fixed
    texts = [*TEXTS, rare]
    for run, given in enumerate(
        (texts, texts[::-1], sorted(texts))
    ):  # the order is nothing, the counts are all
        train_wordpiece(given, 120).save(tmp_path / str(run))
    code = (
        "import sys, json, pathlib; from learning.tokenizer import train_wordpiece\n"
        "train_wordpiece(json.loads(sys.argv[1]), 120).save(pathlib.Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(texts), str(tmp_path / "3")], check=True)
    found = [(tmp_path / str(run) / "tokenizer.json").read_bytes() for run in range(4)]
    assert found[0] == found[1] == found[2] == found[3]


def test_ids_begin_with_the_special_tokens_and_have_no_hole(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 150)
    tokenizer.save(tmp_path)
    tokens = vocabulary(tmp_path)
    assert tuple(tokens[:5]) == SPECIAL
    assert len(tokens) == len(set(tokens)) == tokenizer.vocabulary_size <= 150
    assert (tokenizer.pad_id, tokenizer.special_ids, tokenizer.mask_id) == (0, (0, 1, 2, 3, 4), 4)


def test_chinese_is_split_by_character_and_words_into_pieces() -> None:
    tokenizer = train_wordpiece(TEXTS, 200)
    assert tokenizer.tokens("戴墨镜的笑脸smiling") == ["戴", "墨", "镜", "的", "笑", "脸", "smiling"]
    assert "".join(piece.removeprefix("##") for piece in tokenizer.tokens("Thing6other")) == "thing6other"
    assert tokenizer.tokens("龘") == ["[UNK]"]
    assert tokenizer.tokens("Café") == tokenizer.tokens("cafe")


def test_every_character_of_the_texts_is_known() -> None:
    """The trainer underneath keeps 1,000 characters by itself; Chinese has more."""
    characters = [chr(0x4E00 + n) for n in range(1500)]
    tokenizer = train_wordpiece(["".join(characters[i : i + 10]) for i in range(0, 1500, 10)], 3000)
    assert tokenizer.tokens("".join(characters)) == characters
    small = train_wordpiece(["".join(characters[:300])] + ["常用"] * 3, 100)
    assert small.vocabulary_size == 75 + 5  # three quarters are characters; there are no words to learn
    assert small.tokens("常用") == ["常", "用"]


def test_case_is_kept_on_request() -> None:
    assert "Smiling" in train_wordpiece(["Smiling face Smiling"] * 5, 200, lowercase=False).tokens("Smiling")


def test_encode_pads_on_the_right_and_cuts_the_end() -> None:
    tokenizer = train_wordpiece(TEXTS, 200)
    encoded = tokenizer.encode(["笑", "戴墨镜的笑脸"], 6)
    cls, sep = tokenizer.special_ids[2], tokenizer.special_ids[3]
    assert encoded.ids.dtype == torch.int64
    assert encoded.ids.shape == (2, 6)  # [CLS] 戴 墨 镜 的 [SEP]
    assert encoded.mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert encoded.ids[0].tolist()[3:] == [tokenizer.pad_id] * 3
    assert [encoded.ids[1, 0].item(), encoded.ids[1, -1].item()] == [cls, sep]
    assert tokenizer.encode(["笑"], 50).ids.shape == (1, 3)
    assert tokenizer.encode([""], 50).ids.tolist() == [[cls, sep]]


def test_special_tokens_spelled_in_a_text_are_text() -> None:
    """A title from the web must not end its own text."""
    tokenizer = train_wordpiece([*TEXTS, "[sep] cls mask"], 200)
    row = tokenizer.encode(["face [SEP] cat [MASK]"], 50).ids[0].tolist()
    special = tokenizer.special_ids
    assert row.count(special[3]) == 1
    assert special[4] not in row


@pytest.mark.parametrize("name", ["", "tokenizer.json", "vocab.txt"])
def test_a_saved_tokenizer_reads_the_same(tmp_path: Path, name: str) -> None:
    tokenizer = train_wordpiece(TEXTS, 150)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path / name)
    texts = ["Smiling 笑脸 unseen words!", "Café"]
    assert again.encode(texts, 20).ids.tolist() == tokenizer.encode(texts, 20).ids.tolist()
    assert again.vocabulary_size == tokenizer.vocabulary_size
    again.save(tmp_path / "again")
    assert vocabulary(tmp_path / "again") == vocabulary(tmp_path)
    copied = pickle.loads(pickle.dumps(again))  # as loader workers get it
    assert copied.encode(texts, 20).ids.tolist() == tokenizer.encode(texts, 20).ids.tolist()


def test_a_cased_vocabulary_says_so_beside_it(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "Face", "face"]))
    assert load_tokenizer(tmp_path).tokens("Face") == ["face"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).tokens("Face") == ["Face"]


def test_what_a_foreign_tokenizer_cuts_and_pads_is_undone(tmp_path: Path) -> None:
    train_wordpiece(TEXTS, 150).save(tmp_path)
    foreign = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    foreign.enable_truncation(4)
    foreign.enable_padding(length=30)
    foreign.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(["戴墨镜的笑脸"], 50).ids.shape == (1, 8)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\nface\n")
    with pytest.raises(ValueError, match=r"vocab.txt: has no \[UNK\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nface\n")
    with pytest.raises(ValueError, match=r"vocab.txt: has no \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"vocab.txt: is not UTF-8"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: is no tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: has no \[PAD\]"):
        load_tokenizer(tmp_path)


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no character"):
        train_wordpiece(["  ", ""], 100)
    with pytest.raises(ValueError, match=r"vocabulary\.size: 5 is too small"):
        train_wordpiece(TEXTS, 5)
    with pytest.raises(ValueError, match="max_length: 2 leaves no room"):
        train_wordpiece(TEXTS, 100).encode(["a"], 2)
    with pytest.raises(ValueError, match="one string was given"):
        train_wordpiece(TEXTS, 100).encode("a text", 10)
