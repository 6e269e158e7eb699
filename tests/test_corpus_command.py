"""`tandem corpus`: explain tells each row's fate with its numbers, whatif counts as a new run would."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.log.what_if import counts_under
from stages.filter import Config, run
from tests.data_helpers import make_job, picture, row, write_log
from tests.pipeline_harness import inline, inline_json, tandem, write_recipe

RECIPE = """
name: asked
tracking: {uri: "off"}
stages:
  filter:
    {kind: filter, click_log: log.csv, listed_words: words.txt, best_per_query: 2, subset: {share: 0.999999}}
  crawl:
    kind: crawl
    inputs: {pairs: filter}
    local_site: {url_prefix: "http://site.example/", folder: site}
"""

ROWS: list[dict[str, Any]] = [
    row(url="http://site.example/low.webp", show=1000, click=31),
    row(url="http://site.example/few.webp", show=19, click=19),
    row(url="http://site.example/best.webp", show=100, click=50),
    row(url="http://site.example/second.webp", show=100, click=40),
    row(url="http://site.example/second.webp", show=60, click=40),
    row(url="http://site.example/third.webp", show=100, click=30),
    row(url="http://site.example/small.webp", width=60, height=300),
    row(url="http://site.example/wide.webp", width=900, height=200),
    row(url="http://site.example/word.webp", title="that Blorptox again"),
    row(url="http://site.example/long.webp", content="a " * 129),
    row(url="http://site.example/best.webp", query="panda"),
    row(url="ftp://site.example/x.webp"),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where the recipe's filter ran, and a crawl that fetched nothing but best.webp."""
    place = tmp_path_factory.mktemp("asked")
    write_recipe(place, RECIPE, "asked.yaml")
    sizes = {"width": "", "height": ""}
    write_log(place / "log.csv", [sizes | r for r in ROWS])
    (place / "words.txt").write_text("blorptox\n")
    (place / "site").mkdir()
    tandem("run", "asked.yaml", "--until", "filter", cwd=place)
    return place


DETAILS = {
    "low": ("low_ctr", "ctr 0.031 < min_ctr 0.1"),
    "few": ("few_shows", "show 19 < min_show 20"),
    "third": ("not_among_best", "rank 3 of best_per_query 2"),
    "small": ("too_small", "60 x 300 px: a side < min_side_px 100"),
    "wide": ("bad_aspect", "900 x 200 px: aspect > max_aspect 4"),
    "word": ("listed_word", "title holds 'blorptox'"),
    "long": ("content_too_long", "129 > max_words 128"),
}


def test_each_row_of_a_query_has_its_reason_with_numbers(asked: Path) -> None:
    answer = inline_json("corpus", "explain", "asked.yaml", "red panda", cwd=asked)["answers"][0]
    assert answer["asked"] == ["filter"] and answer["waiting"] == ["crawl"]
    assert len(answer["rows"]) == len([r for r in ROWS if r["query"] == "red panda"])
    told = {(r["url"].rpartition("/")[2].partition(".")[0], r["reason"]): r["detail"] for r in answer["rows"]}
    for name, (reason, detail) in DETAILS.items():
        assert told[name, reason] == detail
    assert told["best", None] == "ctr 0.5 ≥ min_ctr 0.1, rank 1 of best_per_query 2"
    assert told["second", None] == "ctr 0.4 ≥ min_ctr 0.1, rank 2 of best_per_query 2"
    assert "(show 100, click 40)" in told["second", "repeated_pair"]
    assert "bad_url" in {reason for _, reason in told}


def test_a_url_is_told_in_all_its_queries(asked: Path) -> None:
    url = "http://site.example/best.webp"
    rows = inline_json("corpus", "explain", "asked.yaml", url, cwd=asked)["answers"][0]["rows"]
    assert [(r["query"], r["reason"]) for r in rows] == [("panda", "query_too_short"), ("red panda", None)]
    assert rows[0]["detail"] == "1 < min_words 2"
    shown = inline("corpus", "explain", "asked.yaml", url, cwd=asked).stdout
    assert "kept by filter" in shown and "1 < min_words 2" in shown
    nothing = inline_json("corpus", "explain", "asked.yaml", "never asked", cwd=asked)
    assert nothing["answers"][0]["rows"] == []


@pytest.mark.slow
def test_a_row_is_followed_through_the_crawl(tmp_path: Path) -> None:
    write_recipe(tmp_path, RECIPE, "asked.yaml")
    write_log(tmp_path / "log.csv", [{"width": "", "height": ""} | r for r in ROWS])
    (tmp_path / "words.txt").write_text("blorptox\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "best.webp").write_bytes(picture())
    tandem("run", "asked.yaml", cwd=tmp_path)
    answer = inline_json("corpus", "explain", "asked.yaml", "red panda", cwd=tmp_path)["answers"][0]
    assert answer["asked"] == ["filter", "crawl"] and answer["waiting"] == []
    fates = {(r["url"].rpartition("/")[2], r["stage"], r["kept"]): r["reason"] for r in answer["rows"]}
    assert fates["best.webp", "crawl", True] is None
    assert fates["second.webp", "crawl", False] == "not_found"
    assert fates["third.webp", "filter", False] == "not_among_best"


def test_later_stages_tell_what_they_dropped(tmp_path: Path) -> None:
    from data_tools.log.explain import dropped_later

    table = pa.table({"url": ["u", "v"], "reason": ["http_404", "duplicate"], "detail": ["gone", None]})
    pq.write_table(table.append_column("kept_url", pa.array([None, "w"])), tmp_path / "dropped.parquet")
    assert dropped_later(tmp_path, ["u", "v", "x"]) == {
        "u": ("http_404", "gone"),
        "v": ("duplicate", "kept_url w"),
    }


def test_whatif_counts_as_a_run_would(asked: Path) -> None:
    changed = ("--set", "filter.min_ctr=0.02", "--set", "filter.best_per_query=null")
    answer = inline_json("corpus", "whatif", "asked.yaml", *changed, cwd=asked)["answers"][0]
    assert answer["changes"]["min_ctr"] == {"now": 0.1, "then": 0.02}
    assert answer["now"]["kept"] == 2 and answer["then"]["kept"] == 4
    assert answer["difference"]["dropped_low_ctr"] == -1
    assert "+2" in inline("corpus", "whatif", "asked.yaml", *changed, cwd=asked).stdout
    real = tandem(
        *("run", "asked.yaml", "--until", "filter", "--root", "other"),
        *(part.replace("filter.", "stages.filter.") for part in changed),
        cwd=asked,
    )
    assert real.returncode == 0
    counts = inline_json(
        "results",
        "asked.yaml",
        "--root",
        "other",
        *(p.replace("filter.", "stages.filter.") for p in changed),
        cwd=asked,
    )["counts"]["filter"]
    assert {name: n for name, n in counts.items() if name != "rows"} == answer["then"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("filter.click_log=other.csv", "do not tell"),
        ("filter.subset={share: 0.5, seed: 1}", "do not tell"),
        ("filter.min_ctr=2", "min_ctr"),
        ("crawl.min_side_px=3", "filter stage"),
    ],
)
def test_what_the_measures_cannot_answer_is_said(asked: Path, setting: str, says: str) -> None:
    assert says in inline("corpus", "whatif", "asked.yaml", "--set", setting, cwd=asked, code=2).stderr


def test_stages_that_are_not_done_are_named(tmp_path: Path) -> None:
    write_recipe(tmp_path, RECIPE, "asked.yaml")
    for command in (("explain", "asked.yaml", "x"), ("whatif", "asked.yaml", "--set", "filter.min_show=1")):
        assert "tandem run" in inline("corpus", *command, cwd=tmp_path, code=2).stderr


def random_rows(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows of few queries and URLs, with ties, repeats, gaps in sizes and texts about the limits."""
    return [
        row(
            query=rng.choice(["红色熊猫", "red panda", "panda", "blue bird in the sky", "a b c"]),
            url=f"http://a.example/{rng.randrange(60)}",
            title=rng.choice(["a b", "a", "blorptox", "红 熊", "one two three four five six"]),
            content=rng.choice(["", "x " * 7, "红" * 6]),
            show=(show := rng.choice([0, 5, 20, 40, 100, 100])),
            click=rng.choice([0, show // 10, show // 5, show // 2]),
            width=rng.choice(["", 50, 100, 300]),
            height=rng.choice(["", 60, 100, 900]),
        )
        for _ in range(count)
    ]


def test_whatif_is_exact_over_random_settings(tmp_path: Path) -> None:
    rng = random.Random(5)
    write_log(tmp_path / "log.csv", random_rows(rng, 400))
    (tmp_path / "words.txt").write_text("blorptox\n")
    first = Config(
        click_log=Path("log.csv"), listed_words=Path("words.txt"), subset={"share": 0.5, "seed": 3}
    )
    job = make_job(tmp_path / "first")
    run(first, job)
    for number in range(12):
        settings = {
            "min_show": rng.choice([0, 5, 20, 50]),
            "min_ctr": rng.choice([0.0, 0.1, 0.2]),
            "ctr_bound": rng.choice(["point", "wilson"]),
            "best_per_query": rng.choice([None, 1, 3]),
            "min_words": rng.choice([0, 1, 2]),
            "max_words": rng.choice([3, 6, 128]),
            "min_side_px": rng.choice([1, 60, 100]),
            "max_aspect": rng.choice([1.5, 3.0, 4.0]),
            "subset": rng.choice([None, {"share": rng.random() / 2 + 0.5, "seed": 3}]),
            "listed_words": rng.choice([None, Path("words.txt")]),
        }
        config = Config(click_log=Path("log.csv"), **settings)
        answer = counts_under(job.out / "measures.parquet", config.rules(tmp_path))
        real = run(config, make_job(tmp_path / f"again{number}")).counts
        assert {name: n for name, n in real.items() if name != "rows"} == answer, settings
