"""The report page: numbers where they belong, missing stages said, nothing from the web that could act."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import report
from pipeline.charts import line_chart, short, thinned, ticks
from pipeline.report_data import against_truth, read_metrics, training_section
from pipeline.results import RunView, StageRun
from stages.base import StageError
from tests import tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "<script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "javascript:document.title='pwned'",
    "</title></style></svg><svg/onload=document.title='pwned'>",
    "' onmouseover='document.title=1' x='",
    "{{ 7 * 7 }}{% raw %}",
    "right-to-left \u202e txet",
    "猫 🐈 & <b>bold</b>",
)
KINDS = {
    "filter": "filter",
    "crawl": "crawl",
    "shard": "shard",
    "pretrain_1": "pretrain",
    "pretrain_2": "pretrain",
    "finetune": "finetune",
    "evaluate": "evaluate",
}


def done(
    kind: str, counts: dict[str, int] | None = None, metrics: dict[str, float] | None = None
) -> dict[str, Any]:
    return {
        "kind": kind,
        "counts": counts or {},
        "metrics": metrics or {},
        "seconds": 83.4,
        "finished_at": "2026-01-02T03:04:05Z",
    }


def view(root: Path, finished: dict[str, dict[str, Any]], truth: Path | None = None) -> RunView:
    stages = []
    for name, kind in KINDS.items():
        directory = root / "demo" / name / "0123456789ab"
        if name in finished:
            (directory / "out").mkdir(parents=True, exist_ok=True)
            (directory / "config.yaml").write_text("seed: 41\n")
        stages.append(StageRun(name, kind, directory, finished.get(name)))
    return RunView("demo", root / "demo.yaml", root, stages, truth)


def out(run: RunView, name: str) -> Path:
    return next(stage.directory for stage in run.stages if stage.name == name) / "out"


def write_filter(directory: Path) -> Path:
    """Ten pairs, six right; five kept, four of them right; one repeated row; one that has no truth."""
    rows = [(f"q{i}", f"http://x/{i}") for i in range(10)]
    columns = ("query", "url")
    pq.write_table(
        pa.table([list(c) for c in zip(*rows[:5], strict=True)], names=columns), directory / "pairs.parquet"
    )
    dropped = [*rows[5:], rows[0], ("unknown", "http://x/unknown")]
    reasons = ["low_ctr", "low_ctr", "too_small", "too_small", "low_ctr", "repeated_pair", "low_ctr"]
    table = pa.table(
        [[q for q, _ in dropped], [u for _, u in dropped], reasons], names=["query", "url", "reason"]
    )
    pq.write_table(table, directory / "dropped.parquet")
    truth = directory.parent / "truth.parquet"
    right = [True, True, True, True, False, True, True, False, False, False]
    pq.write_table(
        pa.table([[q for q, _ in rows], [u for _, u in rows], right], names=["query", "url", "right"]), truth
    )
    return truth


FILTER_COUNTS = {
    "rows": 12,
    "kept": 5,
    "dropped_low_ctr": 4,
    "dropped_too_small": 2,
    "dropped_repeated_pair": 1,
}


def example(number: int, right: bool) -> dict[str, Any]:
    return {
        "key": HOSTILE[number % len(HOSTILE)],
        "picture": f"pictures/{number:020x}.webp",
        "title": HOSTILE[(number + 1) % len(HOSTILE)],
        "right": right,
        "cosine": 0.5,
    }


def write_examples(directory: Path) -> None:
    (directory / "pictures").mkdir()
    for number in range(4):
        (directory / f"pictures/{number:020x}.webp").write_bytes(tiny_model.picture_bytes(number, "WEBP"))
    t2i = [
        {
            "query": {"text": text},
            "rank": 2,
            "right_answers": 1,
            "best_right": example(1, True),
            "answers": [example(n, n == 1) for n in range(4)],
        }
        for text in HOSTILE
    ]
    i2t = [
        {
            "query": example(3, True),
            "rank": 11,
            "right_answers": 1,
            "best_right": {"text": HOSTILE[0]},
            "answers": [{"text": text, "right": n == 20, "cosine": 0.1} for n, text in enumerate(HOSTILE)],
        }
    ]
    shown = {"split": "s", "texts": ["title"], "images": 1209, "distinct_texts": 1209, "t2i": t2i, "i2t": i2t}
    (directory / "examples.json").write_text(json.dumps({"unseen_vendor": shown}))


def write_attention(directory: Path) -> None:
    """A map for each hostile text, on the pictures of `write_examples`."""
    maps = [
        {
            "key": HOSTILE[number],
            "title": HOSTILE[(number + 1) % len(HOSTILE)],
            "entity": HOSTILE[(number + 2) % len(HOSTILE)],
            "layer": 3,
            "side": 7,
            "peak": {"row": 0, "column": number % 7, "share": 0.25},
            "picture": f"pictures/{number % 4:020x}.webp",
            "map": f"pictures/{(number + 1) % 4:020x}.webp",
        }
        for number in range(len(HOSTILE))
    ]
    (directory / "attention.json").write_text(json.dumps({"gallery": "unseen_vendor", "maps": maps}))


def evaluated() -> dict[str, float]:
    metrics = {"rsum": 333.25, "r@m": 55.54, "chance_rsum": 3.2, "chance_r@m": 0.53}
    for number, name in enumerate(f"{way}_r@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)):
        metrics |= {name: 41.37 + number, f"chance_{name}": 0.08 * (number + 1)}
    return {f"eval/unseen_vendor/{name}": value for name, value in metrics.items()}


def whole_run(root: Path) -> RunView:
    finished = {name: done(kind) for name, kind in KINDS.items()}
    finished["filter"] = done("filter", FILTER_COUNTS)
    finished["evaluate"] = done(
        "evaluate", {"unseen_vendor_images": 1209, "unseen_vendor_texts": 1209}, evaluated()
    )
    run = view(root, finished)
    truth = write_filter(out(run, "filter"))
    pq.write_table(
        pa.table({"url": ["a", "b", "c", "d"], "status": ["ok", "http_404", "ok", "not_an_image"]}),
        out(run, "crawl") / "pictures.parquet",
    )
    tiny_model.write_corpus(out(run, "shard"), 5)
    for name in ("pretrain_1", "pretrain_2", "finetune"):
        log = out(run, name).parent / "log"
        log.mkdir()
        rows = [
            {
                "step": s,
                "time": 1.0,
                "loss/total": 9 / s,
                "loss/ccl": 8 / s,
                "train/lr": 1e-4 * s,
                "note": "x",
            }
            | (
                {"val/rsum": 100.0 + s, "val/i2t_r@1": 20.0 + s, "val/chance_i2t_r@1": 0.1}
                if s % 10 == 0
                else {}
            )
            for s in range(1, 31)
        ]
        (log / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_examples(out(run, "evaluate"))
    write_attention(out(run, "evaluate"))
    return RunView(run.name, run.recipe_path, run.root, run.stages, truth)


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of style."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside_style = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside_style = tag == "style"
        self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self.inside_style = False

    def handle_data(self, data: str) -> None:
        if not self.inside_style:
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


ALLOWED = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
    ),
    *(
        "p",
        "span",
        "b",
        "i",
        "small",
        "br",
        "bdi",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
    ),
    *("figcaption", "svg", "line", "text", "polyline", "img"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return whole_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(run: RunView) -> str:
    return report.render(run)


def test_no_element_and_no_attribute_comes_from_data(html: str) -> None:
    page = Page(html)
    assert {tag for tag, _ in page.elements} <= ALLOWED
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert not {"href", "srcset", "action", "background"} & attributes.keys()
        if "src" in attributes:
            assert tag == "img"
            assert re.fullmatch(r"data:image/webp;base64,[A-Za-z0-9+/=]+", attributes["src"] or "")
        if "style" in attributes:
            assert re.fullmatch(r"width: \d+\.\d\d%", attributes["style"] or "")
    shown = [a.get("title") for _, a in page.elements]
    for text in HOSTILE:
        assert text in page.text or text in shown  # to be read as text, whole
    assert html.count("<script") == 0


def test_the_page_asks_for_nothing(html: str) -> None:
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import|<link|<iframe|<object|<embed|<base", html)
    addresses = re.findall(
        r"(?:https?:)?//[^\s\"'<]+", re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", html)
    )
    assert addresses == []


def test_the_template_makes_no_exception_to_escaping() -> None:
    template = (Path(report.__file__).parent / "templates" / report.TEMPLATE).read_text()
    code = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    assert not re.search(r"\|\s*safe|autoescape|Markup|\bhref=|<script", code)
    for attribute in re.findall(r"=(\S)?\{\{", code):
        assert attribute in ('"', "'")  # every value in an attribute stands in quotes


def test_the_numbers_stand_where_they_belong(html: str) -> None:
    words = Page(html).words()
    assert "seed 41" in words
    assert report.DERIVED in words
    assert "60.0 → 80.0 %" in words  # 6 of 10 pairs right before, 4 of 5 after
    assert "66.7 % recall: 4 of 6 right pairs kept" in words
    assert "low ctr 4 33.3 % 2 right pairs lost" in words
    assert "repeated pair 1 8.3 % Dropped rows" in words
    assert "1 pairs that the truth does not name are left out" in words
    assert "ok 2 50.0 %" in words
    assert "http 404 1 25.0 %" in words
    assert "test 5 100.0 %" in words
    assert "MIT (5)" in words
    recalls = "41.4 0.08 42.4 0.2 43.4 0.2 44.4 0.3 45.4 0.4 46.4 0.5 333.2 3.2 55.5 0.5"
    assert f"unseen_vendor 1,209 images, 1,209 texts {recalls}" in words
    assert "1 min 23 s" in words


def test_right_and_wrong_are_told_by_more_than_colour(html: str) -> None:
    page = Page(html)
    labels = [a["aria-label"] for tag, a in page.elements if tag == "span" and "aria-label" in a]
    # 8 queries with 4 answers of which one is right, and one with 8 of which none is: its right one is told
    assert (labels.count("right"), labels.count("wrong")) == (8, 32)
    assert page.text.count("✓") == 8 + 1  # the legend
    assert page.text.count("✗") == 32 + 1
    assert [a.get("class") for _, a in page.elements].count("missed") == 1


def test_curves_of_every_training_stage(html: str) -> None:
    page = Page(html)
    lines = [a for tag, a in page.elements if tag == "polyline"]
    assert len(lines) == 3 * 5  # total, ccl, lr, rsum and r@1 of three stages
    assert all(re.fullmatch(r"[\d., ]+", a["points"] or "") for a in lines)
    assert "chance_i2t" not in page.text


def test_where_the_model_looks_stands_beside_the_picture_and_is_told_in_words(
    run: RunView, html: str
) -> None:
    page = Page(html)
    assert "Where the model looks" in page.text
    assert "evaluate: unseen_vendor" in page.words()
    figures = [place for place, (_, a) in enumerate(page.elements) if a.get("class") == "look"]
    assert len(figures) == len(HOSTILE)
    for number, place in enumerate(figures):
        (first, picture), (second, drawn) = page.elements[place + 2 : place + 4]
        assert (first, second) == ("img", "img")
        title, entity = (HOSTILE[(number + step) % len(HOSTILE)] for step in (1, 2))
        assert picture["alt"] == report.shortened(title)
        column = f"row 1, column {number % 7 + 1} of 7 × 7"
        assert drawn["alt"] == f"Attention of “{report.shortened(entity)}”, most in {column} patches"
        for role, image in ((number % 4, picture), ((number + 1) % 4, drawn)):
            data = base64.b64decode((image["src"] or "").partition(",")[2])
            assert data == (out(run, "evaluate") / f"pictures/{role:020x}.webp").read_bytes()


def test_attention_to_cls_is_shown_with_its_spread(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    path = out(run, "evaluate") / "cls_attention.json"
    assert "Attention to [CLS]" not in report.render(run)
    counts = [6, 0, 2] + [0] * 17
    content = {HOSTILE[0]: {"text_to_image": {"mean": 0.1683, "std": 0.1349, "counts": counts}}}
    path.write_text(json.dumps(content))
    page = report.render(run)
    assert "Attention to [CLS]" in page
    assert "mean 0.168, standard deviation 0.135" in page
    assert HOSTILE[0] not in page  # escaped
    [section] = report.context(run)["cls_attention"]
    [row] = section.rows
    assert row.way == "text → image [CLS]"
    assert [(bar.name, bar.count, bar.share) for bar in row.bars] == [
        ("0.00 – 0.05", 6, 0.75),
        ("0.05 – 0.10", 0, 0.0),
        ("0.10 – 0.15", 2, 0.25),
    ]


def test_attention_maps_that_are_damaged_are_named_and_ones_that_are_not_drawn_not_shown(
    tmp_path: Path,
) -> None:
    run = whole_run(tmp_path)
    path = out(run, "evaluate") / "attention.json"
    content = json.loads(path.read_text())
    content["maps"][0]["map"] = "pictures/../x.webp"
    path.write_text(json.dumps(content))
    with pytest.raises(StageError, match=r"attention.json: picture: 'pictures/../x.webp' is not"):
        report.render(run)
    path.unlink()
    assert "Where the model looks" not in report.render(run)
    assert "Where the model looks" not in report.render(view(tmp_path / "empty", {}))


def test_stages_that_have_not_run_are_said_and_are_no_error(tmp_path: Path) -> None:
    run = view(tmp_path, {})
    words = Page(report.render(run)).words()
    for name in KINDS:
        assert f"{name} has not run yet." in words
    assert "Derived data" not in words  # no truth file: not the demo
    assert "seed –" in words
    empty = RunView("demo", Path("r.yaml"), tmp_path, [], None)
    assert "The recipe has no evaluate stage." in Page(report.render(empty)).words()


def test_a_training_stage_under_way_shows_its_curves(tmp_path: Path) -> None:
    stage = view(tmp_path, {}).stages[3]
    log = stage.directory / "log"
    log.mkdir(parents=True)
    (log / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.5}\n{"step": 2, "loss/total": 2.')
    section = training_section(stage)
    assert section.steps == 1
    assert section.charts[0].lines[0].last == "2.5"


def test_write_report_gives_one_file_and_leaves_no_other(run: RunView, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    assert report.write_report(run, path) == path
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="cannot be written"):
        report.write_report(run, tmp_path / "file" / "report.html")


def test_damaged_results_are_named(run: RunView, tmp_path: Path) -> None:
    broken = whole_run(tmp_path)
    examples = out(broken, "evaluate") / "examples.json"
    content = json.loads(examples.read_text())
    picture = next((out(broken, "evaluate") / "pictures").iterdir())
    picture.unlink()
    with pytest.raises(StageError, match=rf"{picture.stem}.webp: No such file"):
        report.render(broken)
    content["unseen_vendor"]["i2t"][0]["query"]["picture"] = "../../../../etc/passwd"
    examples.write_text(json.dumps(content | {"unseen_vendor": content["unseen_vendor"] | {"t2i": []}}))
    with pytest.raises(StageError, match=r"passwd' is not pictures/<hash>\.webp"):
        report.render(broken)
    examples.write_text("{")
    with pytest.raises(StageError, match=r"examples.json: cannot be read"):
        report.render(broken)


def test_a_truth_that_is_none_is_named(tmp_path: Path) -> None:
    write_filter(tmp_path)
    (tmp_path / "wrong.parquet").write_text("query,url,right")
    with pytest.raises(StageError, match=r"wrong.parquet: truth: not a parquet file of query, url, right"):
        against_truth(tmp_path, tmp_path / "wrong.parquet")
    with pytest.raises(StageError, match=r"missing.parquet: truth"):
        against_truth(tmp_path, tmp_path / "missing.parquet")


def test_a_damaged_line_of_metrics_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(StageError, match=r"metrics.jsonl: line 2"):
        read_metrics(path)


# ----------------------------------------------------------------------------------------------- charts


def test_ticks_are_round_and_enclose() -> None:
    assert ticks(0, 10, 5) == [0, 5, 10]
    assert ticks(0.3, 4.1, 5) == [0, 1, 2, 3, 4, 5]
    assert ticks(3, 3, 5)[0] < 3 < ticks(3, 3, 5)[-1]
    assert ticks(0, 2, 5, whole=True) == [0, 1, 2]
    for low, high in ((1e-9, 3e-9), (-5, 12345), (0.999, 1.001), (0, 576)):
        found = ticks(low, high, 5)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 12


def test_numbers_are_short() -> None:
    assert [short(v) for v in (0, 0.5, 2e-5, 1.24e-4, 12345.0, 600.0, 2.5e7, -3.0)] == [
        "0",
        "0.5",
        "2e-5",
        "1.2e-4",
        "12,345",
        "600",
        "2.5e7",
        "-3",
    ]


def test_a_long_curve_is_thinned_by_means_and_keeps_its_ends_near() -> None:
    points = [(float(i), float(i)) for i in range(10_000)]
    found = thinned(points, 100)
    assert len(found) == 100
    assert found[0] == (49.5, 49.5)
    assert found[-1] == (9949.5, 9949.5)


def test_a_chart_stays_inside_its_box_and_names_what_is_not_finite() -> None:
    chart = line_chart("t", {"a": [(0, 1.0), (1, float("nan")), (2, 3.0)], "b": [], "c": [(1, -4.0)]})
    assert [line.name for line in chart.lines] == ["a (1 not finite)", "b", "c"]
    assert [line.last for line in chart.lines] == ["3", "–", "-4"]
    for line in chart.lines:
        for pair in line.points.split():
            x, y = map(float, pair.split(","))
            assert chart.left <= x <= chart.right
            assert chart.top <= y <= chart.bottom
    assert len(set(chart.lines[2].points.split())) == 1
    assert len(chart.lines[2].points.split()) == 2  # a lone point is drawn: a line without length, a dot


# ----------------------------------------------------------------------------------------------- a browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_table_and_runs_no_script(run: RunView, tmp_path: Path) -> None:
    path = report.write_report(run, tmp_path / "report.html")
    assert CHROMIUM is not None
    dumped = subprocess.run(
        [
            CHROMIUM,
            *(
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--dump-dom",
            ),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    page = Page(dumped)
    assert "unseen_vendor" in page.text
    assert "41.4" in page.text
    assert "<title>demo · Tandem report</title>" in dumped  # a script that ran would have changed it
    assert {tag for tag, _ in page.elements} <= ALLOWED
