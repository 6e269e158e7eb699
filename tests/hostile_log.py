"""A made click log that asks for every difference of two engines: ties, nulls, scripts, hostile texts."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PIECES = (
    *("red", "panda", "Blorptox", "BLORPTOXES", "İstanbul", "ſtraße", "K", "ΣΟΦΌΣ", "don’t", "é", "e\u0301"),
    *("红色", "熊猫", "禁词", "，", "。", "…", "パンダ", "ー", "𠀀𠮷", "판다", "ａｂｃ"),
    *("\uff5e", "\ufffd", "\uffee"),  # before emoji as UTF-8, after them as UTF-16
    *("🐼", "👩‍👩‍👧", "🇳🇱", "😀", "\u202eabc\u202c", "\u200f", "\u200b", "\ufeff", "\u2028", "\x85", "\xa0"),
    *(" ", "  ", "\t", "\n", "\r\n", "\0", "\x01", "'", '"', "''", "\\", "\\n"),
    *("$1", "%s", "{}", "[a]", "(", "*", "^", "$"),
    *("-- x", "; DROP TABLE log", "NULL", "nan", ",", "a,b", "", "0x1", "c++", "a.b"),
)  # fmt: skip
WORDS = ("Blorptox", "禁词", "c++", "a.b", "$1", "İstanbul", "σοφός", "'", '"')
URLS = (
    "http://a.example/",
    "HTTPS://a.example/?q=",
    "http:///",
    "ftp://a.example/",
    "http://\n",
    "x http://a/",
)


def hostile_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of few queries and URLs, so that pairs repeat and CTRs, shows and whole rows tie."""
    rng = random.Random(seed)

    def text(pieces: int) -> str | None:
        if rng.random() < 0.03:
            return None
        between = rng.choice(["", " ", " ", "　"])
        return between.join(rng.choice(PIECES) for _ in range(rng.randrange(pieces)))

    queries = [text(6) for _ in range(max(count // 20, 5))]
    titles = [text(8) for _ in range(max(count // 10, 5))]
    urls = [rng.choice(URLS[:2] * 8 + URLS) + (text(3) or "x") for _ in range(max(count // 8, 5))]
    rows = []
    for _ in range(count):
        show = rng.choice([0, 1, 3, 20, 21, 30, 60, 100, 300, 2**53 + 1])
        rows.append(
            {
                "query": rng.choice(queries),
                "url": rng.choice(urls),
                "title": rng.choice(titles),
                "content": rng.choice(titles) if rng.random() < 0.5 else text(30),
                "show": show,
                "click": rng.choice([0, show, show // 3, show // 10, show // 7, show // 14 * 10]),
                "width": rng.choice([None, 99, 100, 300, 400, 401]),
                "height": rng.choice([None, 1, 100, 101, 400]),
            }
        )
    good = {"show": 100, "click": 50, "width": None, "height": None}
    long = {"long words": "word " * 200_000, "long text": "红" * 500_000, "long blank": " " * 300_000 + "x y"}
    rows += [
        {"query": q, "url": f"http://long.example/{q}", "title": q, "content": t, **good}
        for q, t in long.items()
    ]
    return rows


def write_hostile_log(folder: Path, count: int, seed: int, parts: int = 3) -> Path:
    """Parquet parts in `folder`, and words.txt beside it; the folder."""
    folder.mkdir(parents=True)
    texts = dict.fromkeys(("query", "url", "title", "content"), pa.string())
    numbers = dict.fromkeys(("show", "click", "width", "height"), pa.int64())
    table = pa.Table.from_pylist(hostile_rows(count, seed), pa.schema(texts | numbers))
    size = -(-table.num_rows // parts)
    for part in range(parts):
        pq.write_table(table.slice(part * size, size), folder / f"part-{part}.parquet")
    (folder.parent / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder
