"""Pairs of sentences with people's scores, 0 (unlike) to 5 (the same): STS benchmark, STS12 to STS16."""

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from data_tools.corpora.source import Dropped, Source, TextPair, sure_lines
from data_tools.corpora.web import csv_fields, is_utf8
from data_tools.errors import DataError

SPLITS = ("train", "dev", "test")


def sts_benchmark(source: Source) -> Iterator[TextPair | Dropped]:
    """sts-train.csv, sts-dev.csv, sts-test.csv: tabs between genre, filename, year, index, score, sentence1,
    sentence2 (and sometimes where the sentences are from); no header, quotes are plain characters."""
    for split, path in _by_split(source):
        for number, line in sure_lines(path):
            if not line.strip():
                continue
            fields = line.split("\t")
            if len(fields) < 7:
                raise DataError(
                    f"{path}: line {number}: {len(fields)} fields, not 7. Is it of the STS benchmark?"
                )
            yield _scored(path, number, fields[4], fields[5], fields[6], split)


def sts_csv(source: Source) -> Iterator[TextPair | Dropped]:
    """stsb-<lang>-train.csv and its fellows (the benchmark in many languages): sentence1, sentence2, score,
    quoted as CSV is; no header."""
    for split, path in _by_split(source):
        for number, fields in csv_fields(path):
            if not is_utf8(fields):
                raise DataError(f"{path}: line {number}: invalid UTF-8. Fetch the file again.")
            if len(fields) != 3:
                raise DataError(f"{path}: line {number}: {len(fields)} fields, not 3: two sentences, score.")
            yield _scored(path, number, fields[2], fields[0], fields[1], split)


def sts_tsv(source: Source) -> Iterator[TextPair | Dropped]:
    """<set>.test.tsv: score, sentence1, sentence2 with tabs between; no header, no quoting."""
    for split, path in _by_split(source):
        for number, line in sure_lines(path):
            if not line.strip():
                continue
            fields = line.split("\t")
            if len(fields) != 3:
                raise DataError(f"{path}: line {number}: {len(fields)} fields, not 3: score, two sentences.")
            yield _scored(path, number, fields[0], fields[1], fields[2], split)


def sts_year(source: Source) -> Iterator[TextPair | Dropped]:
    """STS12 to STS16: STS.input.<set>.txt, two sentences with a tab between, and STS.gs.<set>.txt, the score
    of each line, empty for a pair that nobody scored."""
    scores = {path.name.removeprefix("STS.gs."): path for path in source.files["scores"]}
    for path in source.files["sentences"]:
        name = path.name.removeprefix("STS.input.")
        if name not in scores:
            raise DataError(
                f"{path}: no file STS.gs.{name} among `files.scores`: there are {', '.join(scores)}."
            )
        for one, other in zip_longest(sure_lines(path), sure_lines(scores[name])):
            if one is None or other is None:
                raise DataError(f"{path}: not as many lines as {scores[name]}: they are not of one release.")
            number, line = one
            fields = line.split("\t")
            if len(fields) < 2:
                raise DataError(
                    f"{path}: line {number}: {len(fields)} field, not 2 sentences with a tab between."
                )
            yield _scored(path, number, other[1], fields[0], fields[1], source.split)


def _by_split(source: Source) -> Iterator[tuple[str, Path]]:
    for split in SPLITS:
        for path in source.files.get(split, ()):
            yield split, path


def _scored(
    path: Path, number: int, score: str, one: str, other: str, split: str | None
) -> TextPair | Dropped:
    one, other, score = one.strip(), other.strip(), score.strip()
    where = f"{path.name}: line {number}"
    if not one or not other:
        return Dropped("no_text", where, text=one or other)
    if not score:
        return Dropped("no_score", where, text=one)
    try:
        value = float(score)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 5:
        raise DataError(f"{path}: line {number}: score {score[:20]!r} is not a number from 0 to 5.")
    return TextPair(one, other, value, split)
