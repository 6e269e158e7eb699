"""Builds the demo's inputs: click logs, the site that serves their pictures, and the truth that only the
report reads.

`python -m demo.corpus [--out demo/built] [--seed 7] [--limit N]` writes, from demo/corpus (drawings, names,
tags):

- click_log.csv: query,url,title,content,show,click,width,height. All but url, width and height are DERIVED
  from names and tags by demo/click_model.py. width and height are empty for about half of the pages, as in
  real logs.
- click_log_zh.csv: another log of the same pictures by the same model, all of whose texts are Chinese.
- truth.parquet and truth_zh.parquet: query, url, right, kind, a row for each row of the log. `right`: the
  picture behind the URL shows what the query asks, and the row breaks no rule that a log can show. `kind`: ""
  for a sound row, `near` or `far` for a wrong drawing, else the defect.
- site/: the pictures as a web server's files, broken ones among them.
- BUILT.json: what it was built from. Unchanged inputs and intact files: nothing is done. It is built aside
  and renamed, so that one killed half-way is built again.

Defects: each on extra pages (about 1 % of the drawings a kind), so that the true drawings stay.
"""

import argparse
import csv
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from demo.click_model import ClickModel, Concept, Impressions, Query, impressions, make_queries

HERE = Path(__file__).parent
HOST = "http://pictures.example/"
COLUMNS = ("query", "url", "title", "content", "show", "click", "width", "height")
VERSION = 1  # raise when the same inputs make something else

PAGE_DEFECTS = ("small", "wide", "title_short", "title_long", "title_listed", "dead", "page", "cut", "copy")
QUERY_DEFECTS = ("query_short", "query_long", "query_listed")
DEFECT_SHARE = 0.01
SIZE_KNOWN = 0.5

BOTH, CHINESE = ("en", "zh"), ("zh",)  # languages of a log's texts; the first is that of its short texts

TITLES = {
    "en": ("{} emoji", "{} emoji picture", "emoji of {}"),
    "zh": ("{}表情", "{}表情图片", "表情符号：{}"),
}
SHORT = {"en": "emoji", "zh": "图"}  # one word
LONG = {
    "en": "free pictures to download and share with your friends",
    "zh": "免费下载高清图片素材大全分享给朋友",
}


@dataclass(frozen=True)
class Page:
    """A picture's page on the web: URL, texts, the drawing behind it and what is wrong with it."""

    url: str
    concept: int
    drawing: str  # vendor/file of the tar
    title: str
    content: str
    defect: str  # "" or one of PAGE_DEFECTS
    width: int | None  # what the log says, if it says anything
    height: int | None


def read_concepts(limit: int | None) -> tuple[list[Concept], list[tuple[int, str]]]:
    """The concepts, and the drawings as (concept index, "vendor/file")."""
    concepts: dict[str, Concept] = {}
    drawings: list[tuple[str, str]] = []
    with (HERE / "corpus" / "pairs.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            code = row["codepoint"].lower()
            if code not in concepts:
                if limit is not None and len(concepts) >= limit:
                    continue
                tags = {lang: tuple(t for t in row[f"tags_{lang}"].split("|") if t) for lang in ("en", "zh")}
                concepts[code] = Concept(
                    code,
                    row["caption_en"],
                    tags["en"],
                    row["caption_zh"],
                    tags["zh"],
                    row["group"],
                    row["subgroup"],
                )
            drawings.append((code, row["image"]))
    index = {code: i for i, code in enumerate(concepts)}
    return list(concepts.values()), [(index[code], image) for code, image in drawings]


def read_drawings() -> dict[str, bytes]:
    """Every drawing's bytes as they are in the tars, by "vendor/file"."""
    found: dict[str, bytes] = {}
    for path in sorted((HERE / "corpus").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member)
                if data is not None:
                    found[f"{path.stem}/{member.name}"] = data.read()
    return found


def make_pages(
    concepts: list[Concept],
    drawings: list[tuple[int, str]],
    pictures: dict[str, bytes],
    rng: np.random.Generator,
) -> list[Page]:
    """A page for every drawing, and the extra pages with one defect each."""
    pages = [_page(concepts, c, drawing, 0, "", pictures, rng) for c, drawing in drawings]
    copies: dict[str, int] = {}
    count = max(1, round(DEFECT_SHARE * len(drawings)))
    for defect in PAGE_DEFECTS:
        for i in rng.choice(len(drawings), min(count, len(drawings)), replace=False):
            concept, drawing = drawings[int(i)]
            copies[drawing] = copies.get(drawing, 1) + 1
            pages.append(_page(concepts, concept, drawing, copies[drawing], defect, pictures, rng))
    return pages


def _page(
    concepts: list[Concept],
    index: int,
    drawing: str,
    copy: int,
    defect: str,
    pictures: dict[str, bytes],
    rng: np.random.Generator,
) -> Page:
    title, content = _texts(concepts[index], defect, BOTH, rng)
    width, height = Image.open(io.BytesIO(pictures[drawing])).size
    if defect == "small":
        width, height = width // 2, height // 2
    elif defect == "wide":
        width = width * 5
    known = rng.random() < SIZE_KNOWN
    stem, dot, ending = drawing.rpartition(".")
    url = f"{HOST}{stem}{f'_{copy}' if copy else ''}{dot}{ending}"
    return Page(
        url, index, drawing, title, content, defect, width if known else None, height if known else None
    )


def in_chinese(pages: list[Page], concepts: list[Concept], rng: np.random.Generator) -> list[Page]:
    """The same pages with titles and contents in Chinese."""
    texts = [_texts(concepts[page.concept], page.defect, CHINESE, rng) for page in pages]
    return [replace(page, title=t, content=c) for page, (t, c) in zip(pages, texts, strict=True)]


def _texts(
    concept: Concept, defect: str, languages: Sequence[str], rng: np.random.Generator
) -> tuple[str, str]:
    """Title and content, both in one of the languages, drawn evenly."""
    lang = languages[int(rng.random() * len(languages))]
    name = concept.name_en if lang == "en" else concept.name_zh
    tags = concept.tags_en if lang == "en" else concept.tags_zh
    title = TITLES[lang][int(rng.integers(len(TITLES[lang])))].format(name)
    if defect == "title_short":
        title = SHORT[languages[0]]
    elif defect == "title_long":
        title = " ".join([title, *[LONG[lang]] * 20])
    elif defect == "title_listed":
        title = f"{title} {_listed(languages, rng)}"
    if lang == "en":
        content = f"{name}: a drawing about {', '.join(tags[:8])}." if tags else f"{name}: a drawing."
    else:
        content = f"{name}：与{'、'.join(tags[:8])}有关的图画。" if tags else f"{name}：图画。"
    return title, content


def _listed(languages: Sequence[str], rng: np.random.Generator) -> str:
    lines = (HERE / "corpus" / "listed_words.txt").read_text(encoding="utf-8").splitlines()
    words = [line for line in lines if line and not line.startswith("#")]
    if "en" not in languages:
        words = [word for word in words if not word.isascii()]
    return words[int(rng.integers(len(words)))]


def make_rows(
    pages: list[Page],
    concepts: list[Concept],
    model: ClickModel,
    rng: np.random.Generator,
    languages: Sequence[str] = BOTH,
) -> tuple[list[tuple[Any, ...]], list[tuple[str, str, bool, str]]]:
    """The log's rows and, at the same place, the truth's. `languages`: of the queries."""
    queries = make_queries(concepts, model, rng, languages)
    shown = impressions(queries, concepts, np.array([page.concept for page in pages]), model, rng)
    count = max(1, round(DEFECT_SHARE * len(shown.query)))
    spoilt = rng.choice(len(shown.query), min(len(QUERY_DEFECTS) * count, len(shown.query)), replace=False)
    defect_of = {int(i): QUERY_DEFECTS[n % len(QUERY_DEFECTS)] for n, i in enumerate(spoilt)}
    rows, truth = [], []
    for i in range(len(shown.query)):
        page, query = pages[int(shown.drawing[i])], queries[int(shown.query[i])]
        text = _spoilt_query(query, concepts, defect_of.get(i, ""), languages, rng)
        right, kind = _truth(shown, i, page, defect_of.get(i, ""))
        size = ("" if page.width is None else page.width, "" if page.height is None else page.height)
        rows.append(
            (text, page.url, page.title, page.content, int(shown.show[i]), int(shown.click[i]), *size)
        )
        truth.append((text, page.url, right, kind))
    return rows, truth


def _truth(shown: Impressions, i: int, page: Page, query_defect: str) -> tuple[bool, str]:
    """Whether a row is right, and its kind. Defects that only a fetch shows leave `right` as it is."""
    if query_defect:
        return False, query_defect
    if page.defect.startswith("title") or (page.defect in ("small", "wide") and page.width is not None):
        return False, page.defect
    if not shown.right[i]:
        return False, "near" if shown.same_subgroup[i] else "far"
    return True, page.defect


def _spoilt_query(
    query: Query, concepts: list[Concept], defect: str, languages: Sequence[str], rng: np.random.Generator
) -> str:
    concept, lang = concepts[query.concept], languages[0]
    if defect == "query_short":
        return concept.name_en.split()[-1] if lang == "en" else concept.name_zh[-1]
    if defect == "query_long":
        return " ".join([query.text, *[LONG[lang]] * 16])
    if defect == "query_listed":
        return f"{query.text} {_listed(languages, rng)}"
    return query.text


def site_file(page: Page, pictures: dict[str, bytes]) -> bytes | None:
    """What the web server has for a page's picture; None for a dead link."""
    data = pictures[page.drawing]
    if page.defect == "dead":
        return None
    if page.defect == "page":
        return f"<!doctype html><title>{page.url}</title><p>This picture has moved.</p>".encode()
    if page.defect == "cut":
        return data[: len(data) * 2 // 5]
    if page.defect in ("small", "wide"):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if page.defect == "small":
            image = image.resize((image.width // 2, image.height // 2))
        else:
            strip = Image.new("RGB", (image.width * 5, image.height), "white")
            strip.paste(image, (0, 0))
            image = strip
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()
    return data


def build(out: Path, seed: int, limit: int | None) -> bool:
    """Build into `out` unless it is there, whole and from the same inputs. Whether anything was done."""
    inputs = _inputs(seed, limit)
    if _is_built(out, inputs):
        return False
    concepts, drawings = read_concepts(limit)
    pictures = read_drawings()
    rng = np.random.default_rng(seed)
    pages = make_pages(concepts, drawings, pictures, rng)
    logs = {"": make_rows(pages, concepts, ClickModel(), rng)}
    own = np.random.default_rng([seed, 1])  # so that neither log hangs on the other
    logs["_zh"] = make_rows(in_chinese(pages, concepts, own), concepts, ClickModel(), own, CHINESE)
    aside = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, (rows, truth) in logs.items():
        _write_log(aside / f"click_log{name}.csv", rows)
        _write_truth(aside / f"truth{name}.parquet", truth)
    for page in pages:
        data = site_file(page, pictures)
        if data is not None:
            path = aside / "site" / page.url.removeprefix(HOST)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    files = {str(p.relative_to(aside)): p.stat().st_size for p in sorted(aside.rglob("*")) if p.is_file()}
    (aside / "BUILT.json").write_text(
        json.dumps({"inputs": inputs, "files": files}, indent=1), encoding="utf-8"
    )
    shutil.rmtree(out, ignore_errors=True)
    aside.replace(out)
    return True


def _write_log(path: Path, rows: list[tuple[Any, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def _write_truth(path: Path, truth: list[tuple[str, str, bool, str]]) -> None:
    names = ("query", "url", "right", "kind")
    columns = zip(*truth, strict=True)
    pq.write_table(pa.table({name: list(column) for name, column in zip(names, columns, strict=True)}), path)


def _inputs(seed: int, limit: int | None) -> dict[str, Any]:
    """What the build depends on: the corpus, this code, the seed and the limit."""
    files = [*(HERE / "corpus").iterdir(), HERE / "corpus.py", HERE / "click_model.py"]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
    return {"version": VERSION, "seed": seed, "limit": limit, "files": hashes}


def _is_built(out: Path, inputs: dict[str, Any]) -> bool:
    try:
        built = json.loads((out / "BUILT.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(built, dict) or built.get("inputs") != inputs:
        return False
    sizes = built.get("files", {})
    return all((out / name).is_file() and (out / name).stat().st_size == size for name, size in sizes.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.corpus", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE / "built", help="where to build (default: demo/built)"
    )
    parser.add_argument("--seed", type=int, default=7, help="of the click model (default: 7)")
    parser.add_argument(
        "--limit", type=int, default=None, help="only the first N concepts (default: all 1,420)"
    )
    arguments = parser.parse_args()
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit {arguments.limit}: at least 1 concept")
    done = build(arguments.out.resolve(), arguments.seed, arguments.limit)
    print(f"demo corpus: {'built' if done else 'is up to date'}: {arguments.out}")


if __name__ == "__main__":
    main()
