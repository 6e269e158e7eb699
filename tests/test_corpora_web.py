"""Lists of the web and of queries: each row of the real layouts, bad lines by number, other files refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.corpora.source import Row
from data_tools.errors import DataError
from tests.corpora_case import read, write

URL = "http://site.example/{}.jpg"


def pairs(rows: list[Row]) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.url, row.captions) for row in rows]


def test_cc3m_is_caption_then_url_and_quotes_are_plain_characters(tmp_path: Path) -> None:
    lines = [
        'a "quoted cat on a mat\thttp://site.example/1.jpg',
        '"two words" , he said\thttp://site.example/2.jpg\r',
        "\thttp://site.example/3.jpg",
        "a dog without a picture\t",
        "three\tfields\thttp://site.example/5.jpg",
        "café 图 \u2028 within a line\thttp://site.example/6.jpg",
    ]
    head = b"\xef\xbb\xbf" + "\n".join(lines).encode() + b"\nnot \xff utf-8\thttp://site.example/7.jpg\n"
    write(tmp_path, {"train.tsv": head})
    rows, dropped = read(tmp_path, {"format": "cc3m", "files": {"pairs": "train.tsv"}})
    assert pairs(rows) == [
        (URL.format(1), ('a "quoted cat on a mat',)),
        (URL.format(2), ('"two words" , he said',)),
        (URL.format(6), ("café 图 \u2028 within a line",)),
    ]
    assert dropped == [
        ("no_text", "train.tsv: line 3"),
        ("no_picture", "train.tsv: line 4"),
        ("bad_line", "train.tsv: line 5"),
        ("bad_line", "train.tsv: line 7"),
    ]


def test_cc12m_is_url_then_caption_over_several_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.tsv": f"{URL.format(1)}\tone\n", "b.tsv": f"{URL.format(2)}\ttwo"})
    rows, dropped = read(tmp_path, {"format": "cc12m", "files": {"pairs": ["a.tsv", "b.tsv"]}})
    assert pairs(rows) == [(URL.format(1), ("one",)), (URL.format(2), ("two",))]
    assert dropped == []


def test_a_file_of_another_layout_is_refused_not_dropped_line_by_line(tmp_path: Path) -> None:
    write(tmp_path, {"pairs.csv": "url,caption\nhttp://site.example/1.jpg,one\n"})
    with pytest.raises(
        DataError, match=r"pairs\.csv: 2 of 2 lines are not caption<TAB>URL; .*line 1: 1 fields"
    ):
        read(tmp_path, {"format": "cc3m", "files": {"pairs": "pairs.csv"}})
    many = "\n".join([f"text\t{URL.format(n)}" for n in range(900)] + ["no tab"] * 11)
    write(tmp_path, {"many.tsv": many})
    with pytest.raises(DataError, match=r"11 of 911 lines .* line 901"):
        read(tmp_path, {"format": "cc3m", "files": {"pairs": "many.tsv"}})
    with pytest.raises(DataError, match=r"none\.tsv: cannot be opened \(No such file"):
        read(tmp_path, {"format": "cc3m", "files": {"pairs": "none.tsv"}})


def test_sbu_joins_its_two_files_line_by_line(tmp_path: Path) -> None:
    source = {"format": "sbu", "files": {"urls": "urls.txt", "captions": "captions.txt"}}
    write(tmp_path, {"urls.txt": f"{URL.format(1)}\n{URL.format(2)}\n", "captions.txt": "one . \r\n\r\n"})
    rows, dropped = read(tmp_path, source)
    assert pairs(rows) == [(URL.format(1), ("one .",))]
    assert dropped == [("no_text", "urls.txt: line 2")]
    write(tmp_path, {"captions.txt": "one\n"})
    with pytest.raises(DataError, match=r"captions\.txt: it has 1 lines, .*urls\.txt has more"):
        read(tmp_path, source)


def test_sbu_json_has_its_lists_side_by_side(tmp_path: Path) -> None:
    source = {"format": "sbu_json", "files": {"pairs": "all.json"}}
    whole = {"image_urls": [URL.format(1), URL.format(2)], "user_ids": ["a", "b"], "captions": ["one", ""]}
    write(tmp_path, {"all.json": whole})
    rows, dropped = read(tmp_path, source)
    assert pairs(rows) == [(URL.format(1), ("one",))]
    assert dropped == [("no_text", "all.json: entry 1")]
    write(tmp_path, {"all.json": whole | {"captions": ["one"]}})
    with pytest.raises(DataError, match="'captions' has fewer entries than 'image_urls'"):
        read(tmp_path, source)
    write(tmp_path, {"all.json": whole | {"captions": ["one", "two", "three"]}})
    with pytest.raises(DataError, match="'captions' has more entries"):
        read(tmp_path, source)


def test_wukong_csv_is_quoted_and_its_test_set_names_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "wukong_100m_0.csv": '\ufeffurl,caption\r\nhttp://site.example/1.jpg,"红色, ""大"" 熊猫"\r\n'
            "http://site.example/2.jpg,\r\nhttp://site.example/3.jpg,a,b\r\n\r\n",
            "wukong_test.csv": "dir,caption\nwukong_test/0 1.jpg,测试\n",
        },
    )
    rows, dropped = read(tmp_path, {"format": "wukong", "files": {"pairs": "wukong_100m_0.csv"}})
    assert pairs(rows) == [(URL.format(1), ('红色, "大" 熊猫',))]
    assert dropped == [
        ("no_text", "wukong_100m_0.csv: line 3"),
        ("bad_line", "wukong_100m_0.csv: line 4"),
    ]
    test: dict[str, Any] = {"format": "wukong", "files": {"pairs": "wukong_test.csv"}}
    rows, _ = read(tmp_path, test | {"images": "http://wukong.example/"})
    assert pairs(rows) == [("http://wukong.example/wukong_test/0%201.jpg", ("测试",))]
    with pytest.raises(DataError, match=r"wukong_test\.csv: it names pictures in a folder .*give `images`"):
        read(tmp_path, test)
    write(tmp_path, {"open.csv": 'url,caption\nhttp://site.example/1.jpg,"' + "x\n" * 100_000})
    with pytest.raises(DataError, match=r"open\.csv: line \d+: field larger than .*a quote without its end"):
        read(tmp_path, {"format": "wukong", "files": {"pairs": "open.csv"}})


ZERO = {
    "Url": "http://page.example/",
    "Title": "红熊猫",
    "Content": "一只红熊猫",
    "Keywords": "熊猫",
    "ImageKey": "t01",
    "ImageUrl": URL.format(1),
    "ImageQuery": "熊猫 图片",
}


@pytest.mark.parametrize("layout", ["list.json", "lines.jsonl", "table.csv"])
def test_zero_reads_a_list_lines_and_a_table_alike(tmp_path: Path, layout: str) -> None:
    entries = [ZERO | {"Show": "20", "Click": "5"}, ZERO | {"ImageQuery": ""}, ZERO | {"ImageUrl": ""}]
    entries = [{"Show": "", "Click": ""} | entry for entry in entries]
    if layout == "table.csv":
        lines = [",".join(entry[name] for name in entries[0]) for entry in entries]
        content = "\n".join([",".join(entries[0]), *lines]) + "\n"
    elif layout == "lines.jsonl":
        content = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    else:
        content = json.dumps(entries)
    write(tmp_path, {layout: content})
    rows, dropped = read(tmp_path, {"format": "zero", "files": {"pairs": layout}})
    page = {"title": "红熊猫", "content": "一只红熊猫"}
    assert rows == [
        Row(URL.format(1), query="熊猫 图片", show=20, click=5, **page),
        Row(URL.format(1), **page),
    ]
    where = {"list.json": "[2]", "lines.jsonl": "line 3", "table.csv": "line 4"}[layout]
    assert dropped == [("no_picture", f"{layout}: {where}")]


def test_zero_counts_bad_lines_and_refuses_impossible_clicks(tmp_path: Path) -> None:
    good = json.dumps(ZERO)
    write(tmp_path, {"lines.jsonl": f"{good}\n{good[:-1]}\n[]\n{{}}\n{good}\n"})
    source = {"format": "zero", "files": {"pairs": "lines.jsonl"}}
    rows, dropped = read(tmp_path, source)
    assert len(rows) == 2
    assert dropped == [("bad_line", f"lines.jsonl: line {n}") for n in (2, 3, 4)]
    write(tmp_path, {"lines.jsonl": json.dumps(ZERO | {"Show": 3, "Click": 4})})
    with pytest.raises(DataError, match="line 1: 'Click' 4 is more than 'Show' 3"):
        read(tmp_path, source)
    write(tmp_path, {"lines.jsonl": json.dumps(ZERO | {"Show": -3})})
    with pytest.raises(DataError, match="line 1: 'Show' is '-3', not a whole number"):
        read(tmp_path, source)


def test_muge_gives_a_row_a_picture_that_answers_a_query(tmp_path: Path) -> None:
    lines = [
        {"query_id": 8426, "query_text": "胖妹妹松紧腰长裤", "item_ids": [42967, 1]},
        {"query_id": 8427, "query_text": "没有答案"},
        {"query_id": 8428, "query_text": " ", "item_ids": [2]},
    ]
    write(tmp_path, {"MR_train_queries.jsonl": "\n".join(map(json.dumps, lines)) + "\n"})
    source = {
        "format": "muge",
        "files": {"queries": "MR_train_queries.jsonl"},
        "images": "http://muge.example/",
    }
    rows, dropped = read(tmp_path, source)
    assert rows == [
        Row("http://muge.example/42967.jpg", query="胖妹妹松紧腰长裤"),
        Row("http://muge.example/1.jpg", query="胖妹妹松紧腰长裤"),
    ]
    assert dropped == [
        ("no_picture", "MR_train_queries.jsonl: line 2"),
        ("no_text", "MR_train_queries.jsonl: line 3"),
    ]
    write(tmp_path, {"MR_train_queries.jsonl": '{"query_id": 1}\n'})
    with pytest.raises(DataError, match="line 1: 'query_text' is missing; it must be of type str"):
        read(tmp_path, source)


PAIR_URL = "http://zero.example/{}"


def test_zero_pairs_give_the_label_in_the_url(tmp_path: Path) -> None:
    lines = [
        {"text": " 一只红色的熊猫 ", "image_path": "images/train/00a b.jpg", "label": 1},
        {"text": "一辆车", "image_path": "00a b.jpg", "label": "0"},
        {"text": " ", "image_path": "x/2.jpg", "label": 0},
        {"text": "没有图片", "image_path": "x/", "label": 1},
    ]
    retrieval = [{"text": "雪山", "image_path": "images/7.jpg"}]
    write(
        tmp_path,
        {
            "itm_train.json": "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n",
            "itr_val.json": json.dumps(retrieval[0]),
        },
    )
    source = {
        "format": "zero_pairs",
        "files": {"val": "itr_val.json", "train": "itm_train.json"},
        "images": "http://zero.example/",
    }
    rows, dropped = read(tmp_path, source)
    assert rows == [
        Row(PAIR_URL.format("00a%20b.jpg?match=1"), captions=("一只红色的熊猫",), split="train"),
        Row(PAIR_URL.format("00a%20b.jpg?match=0"), captions=("一辆车",), split="train"),
        Row(PAIR_URL.format("7.jpg"), captions=("雪山",), split="val"),
    ]
    assert dropped == [("no_text", "itm_train.json: line 3"), ("no_picture", "itm_train.json: line 4")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a", "image_path": "1.jpg", "label": 2}', "line 1: 'label' is '2', not 1"),
        ('{"text": "a", "image_path": "1.jpg", "label": true}', "line 1: 'label' is 'True', not 1"),
        ('{"text": "a"}', "line 1: 'image_path' is missing; it must be of type str"),
        ('{"text": "a", ', r"line 1: invalid JSON \("),
    ],
)
def test_zero_pairs_name_the_line_and_the_field(tmp_path: Path, line: str, problem: str) -> None:
    write(tmp_path, {"itm.json": line})
    with pytest.raises(DataError, match=problem):
        read(
            tmp_path,
            {"format": "zero_pairs", "files": {"test": "itm.json"}, "images": "http://zero.example/"},
        )
