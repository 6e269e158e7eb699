"""Pairs of sentences with scores: each of the layouts; what is missing is counted, what is wrong is named."""

import os
from pathlib import Path

import pytest

from data_tools.corpora.source import TextPair
from data_tools.errors import DataError
from tests.corpora_case import read, write

SHARED = Path(os.environ.get("TANDEM_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "sts"


def test_sts_benchmark_has_seven_columns_or_more_and_plain_quotes(tmp_path: Path) -> None:
    lines = [
        "main-captions\tMSRvid\t2012test\t0001\t5.000\tA plane is taking off.\tAn air plane is taking off.",
        'main-news\theadlines\t2013\t0002\t0\t"Quoted start\tno end, 中文\tlicence\tsource\r',
        "main-news\theadlines\t2013\t0003\t\tone\tother",
        "main-news\theadlines\t2013\t0004\t1.0\tone\t ",
    ]
    write(tmp_path, {"sts-train.csv": "\n".join(lines), "sts-dev.csv": lines[0]})
    files = {"train": "sts-train.csv", "dev": "sts-dev.csv"}
    rows, dropped = read(tmp_path, {"format": "sts_benchmark", "files": files})
    plane = ("A plane is taking off.", "An air plane is taking off.", 5.0)
    assert rows == [
        TextPair(*plane, "train"),
        TextPair('"Quoted start', "no end, 中文", 0.0, "train"),
        TextPair(*plane, "dev"),
    ]
    assert dropped == [("no_score", "sts-train.csv: line 3"), ("no_text", "sts-train.csv: line 4")]
    write(tmp_path, {"sts-dev.csv": lines[0].replace("5.000", "5.5")})
    with pytest.raises(DataError, match=r"sts-dev\.csv: line 1: score '5.5' is not a number from 0 to 5"):
        read(tmp_path, {"format": "sts_benchmark", "files": files})
    write(tmp_path, {"sts-dev.csv": "a,b,1\n"})
    with pytest.raises(DataError, match=r"sts-dev\.csv: line 1: 1 fields, not 7"):
        read(tmp_path, {"format": "sts_benchmark", "files": files})


def test_sts_in_other_languages_is_quoted_csv(tmp_path: Path) -> None:
    write(tmp_path, {"stsb-zh-dev.csv": '"一个人，""跳舞""，","两个人",4.75\r\n"多\n行",b,0.0\r\n'})
    rows, _ = read(tmp_path, {"format": "sts_csv", "files": {"dev": "stsb-zh-dev.csv"}, "lang": "zh"})
    assert rows == [
        TextPair('一个人，"跳舞"，', "两个人", 4.75, "dev"),
        TextPair("多\n行", "b", 0.0, "dev"),
    ]
    write(tmp_path, {"stsb-zh-dev.csv": b"a,\xff,1.0\n"})
    with pytest.raises(DataError, match=r"line 1: invalid UTF-8"):
        read(tmp_path, {"format": "sts_csv", "files": {"dev": "stsb-zh-dev.csv"}})


def test_sts_of_a_year_joins_sentences_and_scores_by_the_set_s_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "STS.input.MSRpar.txt": 'The "problem\tHe said\nunscored\tpair\n',
            "STS.gs.MSRpar.txt": "4.400\n\n",
        },
    )
    files = {"sentences": "STS.input.MSRpar.txt", "scores": "STS.gs.MSRpar.txt"}
    rows, dropped = read(tmp_path, {"format": "sts_year", "files": files, "split": "test"})
    assert rows == [TextPair('The "problem', "He said", 4.4, "test")]
    assert dropped == [("no_score", "STS.input.MSRpar.txt: line 2")]
    write(tmp_path, {"STS.gs.MSRpar.txt": "4.400\n"})
    with pytest.raises(DataError, match="not as many lines as"):
        read(tmp_path, {"format": "sts_year", "files": files})
    write(tmp_path, {"STS.gs.OnWN.txt": "1\n"})
    with pytest.raises(DataError, match=r"no file STS\.gs\.MSRpar\.txt among"):
        read(tmp_path, {"format": "sts_year", "files": files | {"scores": "STS.gs.OnWN.txt"}})


def test_sts_tsv_is_score_first(tmp_path: Path) -> None:
    write(tmp_path, {"OnWN.test.tsv": "5.000\trender one\trestate (words)  \n"})
    rows, _ = read(tmp_path, {"format": "sts_tsv", "files": {"test": "OnWN.test.tsv"}})
    assert rows == [TextPair("render one", "restate (words)", 5.0, "test")]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}: the STS files are no part of the project")
def test_the_real_files_are_read_whole() -> None:
    rows, dropped = read(SHARED, {"format": "sts_csv", "files": {"train": "stsb-en-train.csv"}})
    assert (len(rows), dropped) == (5749, [])
    sets = [f"2012/{name}.test.tsv" for name in ("MSRpar", "OnWN", "SMTeuroparl", "SMTnews")]
    rows, dropped = read(SHARED, {"format": "sts_tsv", "files": {"test": sets}})
    assert len(rows) + len(dropped) == sum(len((SHARED / name).read_bytes().splitlines()) for name in sets)
    assert len(rows) > 2000
