"""Word vectors of a text file, as word2vec and GloVe write them: a word and its numbers a line."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor


def read_word_vectors(path: Path, words: Sequence[str], width: int) -> dict[int, Float32[Tensor, " w"]]:
    """The vectors of those of `words` that the file has, by place in `words`; of equal words, the first.

    word2vec's first line, "count width", may be missing. A word may hold blanks, as GloVe's do. Raises
    ValueError, naming file, line and remedy, for vectors of another width, for a damaged line, and for a file
    that has none of the words.
    """
    field = f"model.text.weights: {path}"
    place_of = {word: place for place, word in enumerate(words)}
    found: dict[int, Tensor] = {}
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip()
                if number == 1 and _is_header(line):
                    _check_width(int(line.split()[1]), width, field)
                    continue
                if number == 1:
                    _check_width(line.count(" "), width, field)
                word, *numbers = line.rsplit(" ", width)
                if len(numbers) != width:
                    raise ValueError(
                        f"{field}: line {number}: {len(numbers)} numbers, not {width}; the file is damaged: "
                        "fetch it again"
                    )
                place = place_of.get(word)
                if place is not None and place not in found:
                    found[place] = _vector(numbers, f"{field}: line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{field}: is no UTF-8 text: {error}; word2vec's binary format is not read: convert it to text"
        ) from error
    except OSError as error:
        raise ValueError(f"{field}: cannot be read: {error}; give a file of word vectors as text") from error
    if not found:
        raise ValueError(
            f"{field}: has none of the vocabulary's {len(words)} words; give a vocabulary of whole words "
            "(vocabulary.kind: words), in the file's case"
        )
    return found


def _is_header(line: str) -> bool:
    parts = line.split()
    return len(parts) == 2 and all(part.isdigit() for part in parts)


def _check_width(found: int, width: int, field: str) -> None:
    """What the first line says, on which every file known has a word without blanks."""
    if found != width:
        raise ValueError(
            f"{field}: its vectors have {found} numbers, model.text.word_width is {width}; "
            f"set word_width: {found}"
        )


def _vector(numbers: Sequence[str], where: str) -> Tensor:
    try:
        values = [float(value) for value in numbers]
    except ValueError as error:
        raise ValueError(f"{where}: {error}; the file is damaged: fetch it again") from error
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{where}: a number is not finite; the file is damaged: fetch it again")
    return torch.tensor(values, dtype=torch.float32)
