"""The annotation sheet: the same bytes twice, and pages on which a person's answers are kept and saved."""

import csv
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.benchmark.sheet import SheetWriter
from data_tools.benchmark.sheet_csv import COLUMNS, read_sheet
from data_tools.pictures import PictureError
from data_tools.shards import ShardIndex
from tests.benchmark_case import drawn, make, pairs_of, write_source
from tests.browser import CHROMIUM, Browser
from tests.test_shards import contents

HOSTILE = (
    "</script><script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "</p></article></style><svg/onload=document.title='pwned'>",
    "=cmd|'/C calc'!A0",
    "+1+1, then \"quotes\" and 'more'",
    "-2; @SUM(A1)\tand a tab",
    "'=an apostrophe of its own",
    "''already two",
    "{{ 7 * 7 }}{% raw %} ${7*7}",
    "right-to-left \u202e txet, שלום עולם",
    "猫 🐈\nin two lines, & <b>bold</b>",
    "＝full width",
    "a NUL \0 within",
)
CORRECTED = '=HYPERLINK("http://evil.example","红色 熊猫"), \'x\''


def write_sheet(directory: Path, page: int = 5) -> list[dict[str, Any]]:
    pairs = [
        {
            "id": f"icm-{n:016x}",
            "split": "val" if n < 8 else "test",
            "key": f"k{n}",
            "text": text,
            "label": n % 2,
        }
        for n, text in enumerate(HOSTILE)
    ]
    sheet = SheetWriter(directory, "icm", {"train": 0, "val": 8, "test": 5}, page, 64, 10**6)
    for n, pair in enumerate(pairs):
        sheet.add(pair, drawn(n))
    sheet.close()
    return pairs


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_sheet_lists_the_pairs_and_is_the_same_twice(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", 120)
    annotate = {"pairs_per_page": 25}
    report = make(tmp_path / "a", source, set="icm", pairs=100, annotate=annotate)
    make(tmp_path / "b", source, set="icm", pairs=100, annotate=annotate)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")
    assert (tmp_path / "a" / "out" / "sheet.csv").read_bytes().startswith(b"\xef\xbb\xbfid,split,key,text")
    rows = read_csv(tmp_path / "a" / "out" / "sheet.csv")
    assert tuple(rows[0]) == COLUMNS
    pairs = pairs_of(tmp_path / "a")
    shown = ("id", "split", "key", "text")
    assert [[row[name] for name in shown] for row in rows] == [
        [pair[name] for name in shown] for pair in pairs
    ]
    assert [int(row["label"]) for row in rows] == [pair["label"] for pair in pairs]
    assert report.counts["on_sheet"] == 100
    pages = sorted((tmp_path / "a" / "out" / "sheet").iterdir())
    assert [page.name for page in pages] == [f"{n:05d}.html" for n in range(1, 7)]  # 80: 4, 10: 1, 10: 1
    on_pages = [found for page in pages for found in re.findall(r'data-id="([^"]*)"', page.read_text())]
    assert on_pages == [pair["id"] for pair in pairs]
    listed = (tmp_path / "a" / "out" / "sheet.html").read_text()
    assert re.findall(r'href="([^"]*)"', listed) == [f"sheet/{page.name}" for page in pages]
    ShardIndex.open(tmp_path / "a" / "out").verify()  # the corpus beside it is whole


def test_a_share_of_some_splits(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", 120)
    annotate = {"splits": ["test", "train"], "share": 0.5}
    report = make(tmp_path / "a", source, set="iqr", pairs=100, annotate=annotate)
    rows = read_csv(tmp_path / "a" / "out" / "sheet.csv")
    assert {row["split"] for row in rows} == {"train", "test"}
    assert 30 < len(rows) == report.counts["on_sheet"] < 60
    assert len(list((tmp_path / "a" / "out" / "sheet").iterdir())) == 2


def test_cells_are_no_formulas_and_pages_have_no_markup_of_texts(tmp_path: Path) -> None:
    pairs = write_sheet(tmp_path)
    rows = read_csv(tmp_path / "sheet.csv")
    for row in rows:
        assert not row["text"].startswith(tuple("=+-@\t\r＝＋－＠"))
    assert len(rows) == len(pairs)
    for page in (tmp_path / "sheet").iterdir():
        text = page.read_text()
        assert text.count("<script") == 1
        assert text.count("<svg") == 0
        assert len(re.findall(r"<img\b", text)) == text.count("<article ")
        assert not re.search(r'(?:src|href)="(?!data:image/webp;base64,|\d{5}\.html|\.\./sheet\.html)', text)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    sheet = SheetWriter(tmp_path, "icm", {"val": 1}, 5, 64, 10**6)
    pair = {"id": "icm-1", "split": "val", "key": "k1", "text": "x", "label": 1}
    with pytest.raises(PictureError, match="key k1: truncated"):
        sheet.add(pair, drawn(1)[:60])
    with pytest.raises(PictureError, match="key k1: bomb"):
        SheetWriter(tmp_path / "b", "icm", {"val": 1}, 5, 64, 10).add(pair, drawn(1))


# --------------------------------------------------------------------------------------------- in a browser


def downloaded(path: Path) -> Path:
    end = time.monotonic() + 30
    while not path.is_file():
        assert time.monotonic() < end, f"{path} was not saved; there are {list(path.parent.iterdir())}"
        time.sleep(0.05)
    return path


@pytest.fixture
def sheet(tmp_path: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    pairs = write_sheet(tmp_path / "out", page=8)
    yield tmp_path / "out" / "sheet" / "00001.html", pairs[:8]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_judges_by_keys_and_mouse_and_the_saved_file_is_read_back(
    sheet: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, pairs = sheet
    with Browser(tmp_path / "profile", tmp_path / "saved") as browser:
        browser.open(path)
        assert browser.evaluate("document.title") == "icm · val · 1"
        texts = browser.evaluate("[...document.querySelectorAll('.text')].map((p) => p.textContent)")
        assert texts == [pair["text"] for pair in pairs]
        browser.key("s", control=True)  # without a name nothing is saved, and the name is asked for
        assert "your name" in browser.evaluate("document.getElementById('message').textContent")
        assert browser.evaluate("document.activeElement.id") == "annotator"
        browser.type("小王 =1+1")
        browser.evaluate("document.activeElement.blur()")
        for key in "j123":  # to the first pair; match, no match, drop
            browser.key(key)
        browser.key("e")  # the fourth: a better text
        browser.evaluate("document.activeElement.select()")
        browser.type(CORRECTED)
        browser.key("Escape")
        browser.key("j")
        browser.evaluate("document.querySelectorAll('.pair')[4].querySelector('.no span').click()")
        browser.evaluate("document.querySelectorAll('.pair')[4].querySelector('[data-field=note]').focus()")
        browser.type('@note, "quoted"\t; 1')
        browser.evaluate("document.querySelectorAll('.pair')[5].focus()")
        browser.key("e")  # opened and left as it is: no correction
        browser.key("Escape")
        assert browser.evaluate("document.getElementById('count').textContent") == "6 of 8 judged"
        browser.evaluate("document.getElementById('save').click()")
        saved = downloaded(tmp_path / "saved" / "icm-val-00001-小王_1_1.csv")
        before = saved.read_bytes()
        browser.screenshot(tmp_path / "page.png")
        browser.open(path)  # as after a closed tab
        assert browser.evaluate("document.getElementById('count').textContent") == "6 of 8 judged"
        assert browser.evaluate("document.getElementById('annotator').value") == "小王 =1+1"
        saved.unlink()
        browser.key("s", control=True)
        assert downloaded(saved).read_bytes() == before
        assert {request.split(":")[0] for request in browser.requests} <= {"file", "data", "blob"}
    lines = list(read_sheet(saved))
    assert [line.id for line in lines] == [pair["id"] for pair in pairs[:6]]
    assert [line.verdict for line in lines] == ["match", "no match", "drop", "match", "no match", "match"]
    assert [line.corrected_text for line in lines] == ["", "", "", CORRECTED, "", ""]
    assert {line.annotator for line in lines} == {"小王 =1+1"}
    rows = read_csv(saved)
    asked = {row["id"]: row for row in read_csv(path.parent.parent / "sheet.csv")}
    for row in rows:  # the page writes a text exactly as the sheet has it
        names = ("split", "key", "text", "label")
        assert [row[name] for name in names] == [asked[row["id"]][name] for name in names]
    assert rows[4]["note"] == '\'@note, "quoted"\t; 1'


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_hostile_texts_do_nothing_and_answers_of_other_pages_are_their_own(tmp_path: Path) -> None:
    write_sheet(tmp_path / "out", page=8)
    pages = sorted((tmp_path / "out" / "sheet").iterdir())
    with Browser(tmp_path / "profile", tmp_path / "saved") as browser:
        for number, page in enumerate(pages, 1):
            browser.open(page)
            assert browser.evaluate("document.title").endswith(f" · {number}")
            assert browser.evaluate("document.querySelectorAll('script').length") == 1
            assert browser.evaluate("document.querySelectorAll('svg, p b').length") == 0
            assert browser.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
            assert browser.evaluate("document.getElementById('count').textContent").startswith("0 of")
            browser.key("j")
            browser.key("1")
        browser.evaluate("Storage.prototype.setItem = () => { throw new Error('full') }; 0")
        browser.key("2")
        assert "save the CSV" in browser.evaluate("document.getElementById('message').textContent")
        browser.open(pages[0])
        # what another page put into the store in place of answers is not believed
        browser.evaluate("Object.keys(localStorage).forEach((k) => localStorage.setItem(k, '{'))")
        browser.open(pages[0])
        assert "cannot be read" in browser.evaluate("document.getElementById('message').textContent")
    # a browser that was closed has kept the answers
    with Browser(tmp_path / "other", tmp_path / "saved") as browser:
        browser.open(pages[1])
        browser.key("j")
        browser.key("3")
        time.sleep(1)  # until the store is on the disk
    with Browser(tmp_path / "other", tmp_path / "saved") as browser:
        browser.open(pages[1])
        kept = browser.evaluate("[...document.querySelectorAll('.pair')].map((p) => p.dataset.verdict)")
    assert kept[0] == "drop"
    assert set(kept[1:]) == {""}
