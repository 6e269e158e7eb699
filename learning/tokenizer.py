"""Tokenizer of word pieces, or of whole words: made from a corpus, or loaded; texts to padded ids.

Chinese is split by character.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Int64
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from learning.methods.base import Texts

os.environ.setdefault(
    "TOKENIZERS_PARALLELISM", "false"
)  # loader workers are forks; a thread pool does not survive

PAD, UNKNOWN, START, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUING = "##"
SMALLEST = 32


class Tokenizer:
    """Texts to ids: [CLS] … [SEP]. Made by `train_wordpiece` or `load_tokenizer`."""

    def __init__(self, inner: tokenizers.Tokenizer, source: str = "tokenizer"):
        """`source` begins errors. Raises ValueError when one of the five special tokens is missing."""
        ids = {token: inner.token_to_id(token) for token in SPECIAL}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise ValueError(f"{source}: has no {', '.join(missing)}; give a BERT vocabulary")
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # a title from the web that spells [SEP] is text, not a command
        self._inner = inner
        self._ids = {token: number for token, number in ids.items() if number is not None}
        start, end = (START, self._ids[START]), (END, self._ids[END])
        inner.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[start, end]
        )

    @property
    def vocabulary_size(self) -> int:
        """Rows that an embedding table needs: one above the largest id."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def mask_id(self) -> int:
        return self._ids[MASK]

    @property
    def pad_id(self) -> int:
        return self._ids[PAD]

    @property
    def unknown_id(self) -> int:
        return self._ids[UNKNOWN]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """[PAD], [UNK], [CLS], [SEP], [MASK]."""
        return tuple(self._ids[token] for token in SPECIAL)

    def vocabulary(self) -> list[str]:
        """The tokens by id; one that no token has is `[unused<id>]`."""
        tokens = {number: token for token, number in self._inner.get_vocab(with_added_tokens=True).items()}
        return [tokens.get(number, f"[unused{number}]") for number in range(self.vocabulary_size)]

    def tokens(self, text: str) -> list[str]:
        """The word pieces of a text, without [CLS] and [SEP]."""
        return list(self._inner.encode(text, add_special_tokens=False).tokens)

    def encode_each(self, texts: Sequence[str], max_length: int) -> list[Int64[Tensor, " _"]]:
        """Ids of each text, unpadded, cut to `max_length` with [CLS] and [SEP]."""
        if max_length < 3:
            raise ValueError(
                f"max_length: {max_length} leaves no room beside [CLS] and [SEP]; give 3 or more"
            )
        if isinstance(texts, str):
            raise ValueError("texts: one string was given; give a list of strings")
        rows = []
        for encoding in self._inner.encode_batch(list(texts)):
            ids = encoding.ids
            rows.append(torch.tensor(ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]))
        return rows

    def encode(self, texts: Sequence[str], max_length: int) -> Texts:
        """Ids and mask of texts, padded on the right to the longest of this call."""
        return self.pad(self.encode_each(texts, max_length))

    def pad(self, rows: Sequence[Int64[Tensor, " _"]]) -> Texts:
        """Ids of several lengths as one batch, padded on the right to the longest."""
        return pad(rows, self.pad_id)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and vocab.txt (a token a line, by id) to `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(directory / "tokenizer.json"))
        (directory / "vocab.txt").write_text("\n".join(self.vocabulary()) + "\n", encoding="utf-8")


def pad(rows: Sequence[Int64[Tensor, " _"]], pad_id: int) -> Texts:
    """Ids of several lengths as one batch, padded on the right to the longest."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return Texts(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long())


def train_wordpiece(texts: Iterable[str], vocabulary_size: int, lowercase: bool = True) -> Tokenizer:
    """A WordPiece vocabulary of at most `vocabulary_size` tokens, the five special ones included.

    The same texts, in any order, give the same vocabulary. Every character of the texts gets a token; where
    they would fill more than three quarters of the vocabulary, the rarest are left out and read as [UNK].
    Raises ValueError for no text, or too small a size.
    """
    texts = list(texts)
    if vocabulary_size < SMALLEST:
        raise ValueError(
            f"vocabulary.size: {vocabulary_size} is too small; give a few thousand, {SMALLEST} at least"
        )
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN, continuing_subword_prefix=CONTINUING))
    _prepare(inner, lowercase)
    seeds, rare = _characters(inner, texts, vocabulary_size * 3 // 4)
    if not seeds:
        raise ValueError("vocabulary: the texts hold no character to learn a vocabulary from")
    if rare:
        texts = [inner.normalizer.normalize_str(text).translate(rare) for text in texts]
    # The trainer numbers characters in the order of a hash map that differs between runs, and breaks ties
    # by that number. Given beforehand, in one order, they leave nothing to chance.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*SPECIAL, *sorted(seeds)],
        limit_alphabet=vocabulary_size,  # its own limit is 1,000 characters: too few for Chinese
        show_progress=False,
        continuing_subword_prefix=CONTINUING,
    )
    inner.train_from_iterator(texts, trainer)
    ranked = sorted(inner.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return _wordpiece(
        {token: number for number, (token, _) in enumerate(ranked[:vocabulary_size])}, lowercase
    )


def whole_words(texts: Iterable[str], vocabulary_size: int, lowercase: bool = True) -> Tokenizer:
    """A vocabulary of whole words: the special tokens, then the most frequent words of the texts.

    Other words are read as [UNK]. Words are what BERT splits a text into before it looks for pieces. Ties go
    by the word, so that the same texts, in any order, give the same vocabulary. Raises ValueError for no
    text, or too small a size.
    """
    if vocabulary_size < SMALLEST:
        raise ValueError(
            f"vocabulary.size: {vocabulary_size} is too small; give a few thousand, {SMALLEST} at least"
        )
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    _prepare(inner, lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        normal = inner.normalizer.normalize_str(text)
        counts.update(word for word, _ in inner.pre_tokenizer.pre_tokenize_str(normal))
    if not counts:
        raise ValueError("vocabulary: the texts hold no word to make a vocabulary of")
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    kept = [*SPECIAL, *ranked[: vocabulary_size - len(SPECIAL)]]
    return _wordpiece({word: number for number, word in enumerate(kept)}, lowercase)


def load_tokenizer(directory_or_vocab: Path) -> Tokenizer:
    """The tokenizer of a directory (tokenizer.json, else vocab.txt), of a tokenizer.json, or of a vocab.txt.

    A vocab.txt is taken for lower-case unless a tokenizer_config.json beside it says `do_lower_case: false`.
    Raises ValueError naming the file for one that is missing, damaged, or without BERT's special tokens.
    """
    path = Path(directory_or_vocab)
    if path.is_dir():
        named = [path / "tokenizer.json", path / "vocab.txt"]
        found = next((file for file in named if file.is_file()), None)
        if found is None:
            raise ValueError(
                f"{path}: has neither tokenizer.json nor vocab.txt; give a tokenizer's directory"
            )
        path = found
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; give a tokenizer's directory, a tokenizer.json or a vocab.txt"
        )
    if path.suffix == ".json":
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path}: is no tokenizer.json: {error}") from error
        return Tokenizer(inner, str(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}; give a vocab.txt, one token a line") from error
    return _wordpiece(
        {line.strip(): number for number, line in enumerate(lines)}, _is_lowercase(path), str(path)
    )


def _prepare(inner: tokenizers.Tokenizer, lowercase: bool) -> None:
    # BERT's own rules: Chinese characters one by one, accents dropped with the case, split at punctuation
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()


def _wordpiece(vocabulary: dict[str, int], lowercase: bool, source: str = "vocabulary") -> Tokenizer:
    if UNKNOWN not in vocabulary:
        raise ValueError(f"{source}: has no {UNKNOWN}; give a BERT vocabulary, one token a line")
    model = models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUING)
    inner = tokenizers.Tokenizer(model)
    _prepare(inner, lowercase)
    inner.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    return Tokenizer(inner, source)


def _characters(
    inner: tokenizers.Tokenizer, texts: Iterable[str], most: int
) -> tuple[list[str], dict[int, str]]:
    """The tokens of single characters, as they begin words and go on in them (`##`), at most `most`.

    The most frequent characters come first, ties by code. Also what turns the characters left out into
    blanks.
    """
    counts: Counter[str] = Counter()
    forms: dict[str, set[str]] = {}
    for text in texts:
        for word, _ in inner.pre_tokenizer.pre_tokenize_str(inner.normalizer.normalize_str(text)):
            counts.update(word)
            forms.setdefault(word[0], set()).add(word[0])
            for character in word[1:]:
                forms.setdefault(character, set()).add(CONTINUING + character)
    seeds: list[str] = []
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    for place, character in enumerate(ranked):
        if len(seeds) + len(forms[character]) > most:
            return seeds, {ord(rare): " " for rare in ranked[place:]}
        seeds += sorted(forms[character])
    return seeds, {}


def _is_lowercase(vocabulary: Path) -> bool:
    path = vocabulary.parent / "tokenizer_config.json"
    if not path.is_file():
        return True
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("do_lower_case", True))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
