"""What a corpus holds, and how it looks: figures, a contact sheet, one sample in full."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.shards import ShardWriter
from data_tools.shards.files import CorpusError
from data_tools.shards.info import describe, drawn, one_sample
from data_tools.shards.sheet import write_sample, write_sheet
from tests.shard_case import change, image, record, rows, write_corpus

HOSTILE = [
    "<script>document.title='run'</script>",
    '"><img src=http://site.example/x onerror=alert(1)>',
    "{{ 7 * 7 }} {% raw %} </pre><iframe src='//site.example'>",
    "javascript:alert(1)",
    "\u202eright to left\u0000",
    "half a pair \ud83d",
    "<!-- --><style>body{display:none}</style>",
]

OWN = {"html", "head", "meta", "title", "style", "body", "h1", "p", "main", "figure", "div", "img"} | {
    "figcaption",
    "b",
    "bdi",
    "ul",
    "li",
    "small",
    "pre",
}  # the elements of the template


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "out")


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_corpus(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its records are in ASCII, as other writers have them: half of a surrogate pair is valid JSON so."""
    monkeypatch.setattr("data_tools.shards.writer.record_bytes", lambda record: json.dumps(record).encode())
    out.mkdir()
    writer = ShardWriter(out, 1 << 20, ["train"], [])
    for number, text in enumerate(HOSTILE):
        texts = {"title": text, "content": text, "captions": [text], "labels": {text: text}}
        writer.write(image(number), "png", record(number) | texts | {"queries": [{"text": text}]})
    writer.close()
    return out


@pytest.mark.parametrize("whole", [False, True])
def test_hostile_texts_are_texts(tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = hostile_corpus(tmp_path / "corpus", monkeypatch), tmp_path / "sheet.html"
    for number in range(len(HOSTILE)):
        if whole:
            write_sample(corpus, out, f"{number:04d}")
        else:
            write_sheet(corpus, out, "train", 10, 0)
        page = Page(out.read_text(encoding="utf-8"))
        tags = {tag for tag, _ in page.elements}
        assert tags <= OWN
        assert [tag for tag, _ in page.elements].count("style") == 1
        for tag, attributes in page.elements:
            assert not any(name.startswith("on") or name == "href" for name in attributes)
            if tag == "img":
                assert str(attributes["src"]).startswith("data:image/jpeg;base64,")
        policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
        assert "default-src 'none'" in str(policy)
        if not whole:
            assert all(
                text.encode("utf-8", "replace").decode() in page.text for text in HOSTILE if "\0" not in text
            )


def test_a_sheet_is_drawn_by_its_seed_and_shows_texts(corpus: Path, tmp_path: Path) -> None:
    def sheet(seed: int) -> str:
        assert write_sheet(corpus, tmp_path / "sheet.html", "train", 5, seed) == 5
        return (tmp_path / "sheet.html").read_text(encoding="utf-8")

    assert sheet(1) == sheet(1) != sheet(2)
    assert "5 of 12 samples of train, drawn by seed 1" in sheet(1)
    assert sheet(1).count("data:image/jpeg") == 5
    shown = [key for key in rows(corpus) if f"<small>{key}</small>" in sheet(1)]
    assert len(shown) == 5
    assert f"红色 {int(shown[0])}" in sheet(1)
    assert write_sheet(corpus, tmp_path / "sheet.html", None, 100, 0) == 12


def test_a_sheet_as_a_picture(corpus: Path, tmp_path: Path) -> None:
    write_sheet(corpus, tmp_path / "sheet.png", None, 9, 0)
    with Image.open(tmp_path / "sheet.png") as shown:
        assert shown.size[0] == 3 * 200
        assert len(shown.getcolors(1 << 20)) > 20
    write_sample(corpus, tmp_path / "one.png", "0003")
    with pytest.raises(CorpusError, match=r"sheet.pdf: a sheet is a .html or a .png file"):
        write_sheet(corpus, tmp_path / "sheet.pdf", None, 9, 0)
    with pytest.raises(CorpusError, match=r"cannot be written: No such file"):
        write_sheet(corpus, tmp_path / "none" / "sheet.html", None, 9, 0)


def test_a_damaged_sample_has_its_place_and_says_so(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    row = rows(corpus)
    change(corpus / row["0001"]["shard"], row["0001"]["image_offset"], b"<html>")
    change(corpus / row["0002"]["shard"], row["0002"]["json_offset"], b"????")
    write_sheet(corpus, tmp_path / "sheet.html", None, 12, 0)
    text = Page((tmp_path / "sheet.html").read_text(encoding="utf-8")).text
    assert "not_an_image" in text
    assert "sample 0002: the record is damaged" in text


def test_one_sample_by_its_key(corpus: Path, tmp_path: Path) -> None:
    found, data, where = one_sample(corpus, "0007")
    assert (found, data) == (record(7), image(7))
    assert where.endswith("sample 0007")
    with pytest.raises(CorpusError, match="no sample has the key 'none'"):
        one_sample(corpus, "none")


def test_figures_of_a_corpus(corpus: Path) -> None:
    found = describe(corpus, 1000, 0)
    assert (found["samples"], found["splits"]) == (12, {"train": 12})
    assert found["licences"] == {"CC-BY-4.0": 6, "MIT": 6}
    assert found["labels"] == {"colour": {"values": 1, "most": {"red": 12}}}
    assert found["bytes"] == sum(path.stat().st_size for path in corpus.rglob("*.tar"))
    assert (found["pictures"]["width"]["0%"], found["pictures"]["width"]["100%"]) == (100, 111)
    assert found["pictures"]["image_bytes"]["mean"] == np.mean([len(image(n)) for n in range(12)])
    assert found["records"]["languages"] == {"en": 12}
    assert found["records"]["characters"]["query"]["100%"] == len("红色 11")
    assert found["records"]["queries_a_sample"]["50%"] == 1
    assert describe(corpus, 3, 0)["records"]["read"] == 3
    assert describe(corpus, 0, 0)["records"]["read"] == 0


def test_drawn_numbers_are_different_and_in_order() -> None:
    for total, count in ((10, 10), (10, 3), (5, 100), (10_000_000, 50)):
        found = drawn(total, count, 4)
        assert len(found) == min(total, count) == len(set(found.tolist()))
        assert (np.diff(found) > 0).all()
        assert (found == drawn(total, count, 4)).all()
