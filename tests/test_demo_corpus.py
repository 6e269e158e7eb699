"""The demo's inputs: derived from a seed, built whole or not at all, with all defects and a fitting truth."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_tools.log.rules import count_words
from data_tools.pictures import PictureError, open_picture
from demo import corpus
from demo.click_model import ClickModel, Concept, impressions, make_queries
from demo.corpus import HOST, PAGE_DEFECTS, QUERY_DEFECTS, build, read_concepts
from learning.tokenizer import load_tokenizer, train_wordpiece

LIMIT = 120
LOGS = ("", "_zh")
VENDORS = {"fluent-3d", "fluent-emoji-flat", "noto", "twemoji"}
CJK = "\u4e00-\u9fff"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "built"
    assert build(out, seed=7, limit=LIMIT)
    return out


def log_and_truth(built: Path, which: str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    path = built / f"click_log{which}.csv"
    log = pd.read_csv(path, keep_default_na=False, dtype={"width": str, "height": str})
    return log, pq.read_table(built / f"truth{which}.parquet").to_pandas()


@pytest.mark.parametrize("which", LOGS)
def test_log_and_truth_are_row_by_row_the_same_pairs(built: Path, which: str) -> None:
    log, truth = log_and_truth(built, which)
    assert list(log.columns) == ["query", "url", "title", "content", "show", "click", "width", "height"]
    assert list(truth.columns) == ["query", "url", "right", "kind"]
    assert (log[["query", "url"]] == truth[["query", "url"]]).all(axis=None)
    assert ((log["click"] >= 0) & (log["click"] <= log["show"])).all()
    assert 0.65 <= truth["right"].mean() <= 0.75
    assert set(truth["kind"]) == {"", "near", "far", *PAGE_DEFECTS, *QUERY_DEFECTS}
    assert 0.2 < (log["width"] == "").mean() < 0.8
    assert not truth.loc[truth["kind"].isin(["near", "far"]), "right"].any()


def code_of(url: object) -> str:
    return str(url).rpartition("/")[2].partition(".")[0].partition("_")[0]


@pytest.mark.parametrize("which", LOGS)
def test_right_rows_show_what_the_query_asks(built: Path, which: str) -> None:
    concepts, _ = read_concepts(LIMIT)
    by_code = {concept.codepoint: concept for concept in concepts}
    _, truth = log_and_truth(built, which)
    for row in truth[truth["kind"] == ""].sample(300, random_state=0).itertuples():
        assert any(word in str(row.query) for word in by_code[code_of(row.url)].words())


@pytest.mark.parametrize("which", LOGS)
def test_sound_rows_obey_the_text_rules_and_spoilt_ones_do_not(built: Path, which: str) -> None:
    log, truth = log_and_truth(built, which)
    sound = log[truth["kind"] == ""]
    assert (sound["query"].map(count_words).between(2, 128)).all()
    assert (sound["title"].map(count_words).between(2, 128)).all()
    assert (log["content"].map(count_words) <= 128).all()
    assert (log.loc[truth["kind"] == "query_short", "query"].map(count_words) < 2).all()
    assert (log.loc[truth["kind"] == "query_long", "query"].map(count_words) > 128).all()
    assert (log.loc[truth["kind"] == "title_short", "title"].map(count_words) < 2).all()
    assert (log.loc[truth["kind"] == "title_long", "title"].map(count_words) > 128).all()


def test_the_chinese_log_shows_the_same_pictures_in_chinese_alone(built: Path) -> None:
    (both, _), (chinese, truth) = log_and_truth(built), log_and_truth(built, "_zh")
    sizes = [log.drop_duplicates("url").set_index("url")[["width", "height"]] for log in (both, chinese)]
    shown = sizes[0].index.intersection(sizes[1].index)
    assert len(shown) > 0.95 * len(sizes[0])
    assert sizes[0].loc[shown].equals(sizes[1].loc[shown])
    concepts, _ = read_concepts(LIMIT)
    latin = {
        part for c in concepts for word in (c.name_zh, *c.tags_zh) for part in re.findall("[a-zA-Z]+", word)
    }
    for column in ("query", "title", "content"):
        assert both[column].str.fullmatch("[ -~]*").any()
        spelled = chinese[truth["kind"] != "query_short"][column].drop_duplicates()
        assert spelled.str.contains(f"[{CJK}]").all()
        assert {part for text in spelled for part in re.findall("[a-zA-Z]+", text)} <= latin


def test_chinese_titles_name_what_is_drawn_whoever_drew_it(built: Path) -> None:
    concepts, _ = read_concepts(None)
    names = {concept.codepoint: concept.name_zh for concept in concepts}
    assert len(set(names.values())) == len(concepts)  # so a title tells one concept from another
    log, truth = log_and_truth(built, "_zh")
    sound = log[truth["kind"].isin(["", "near", "far"])].drop_duplicates("url")
    assert {url.removeprefix(HOST).partition("/")[0] for url in sound["url"]} == VENDORS
    for url, title, content in zip(sound["url"], sound["title"], sound["content"], strict=True):
        assert names[code_of(url)] in title
        assert content.startswith(f"{names[code_of(url)]}：")


def test_a_tokenizer_of_the_chinese_log_splits_by_character_and_loses_nothing(
    built: Path, tmp_path: Path
) -> None:
    log, _ = log_and_truth(built, "_zh")
    texts = pd.concat([log["query"], log["title"], log["content"]]).drop_duplicates().tolist()
    tokenizer = train_wordpiece(texts, 3000)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    vocabulary = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    rows = tokenizer.encode_each(texts, 10_000)
    for text, row, reread in zip(texts, rows, again.encode_each(texts, 10_000), strict=True):
        assert row.tolist() == reread.tolist()
        tokens = [vocabulary[number] for number in row.tolist()]
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "[UNK]" not in tokens
        assert not any(len(token) > 1 and re.search(f"[{CJK}]", token) for token in tokens[1:-1])
        assert "".join(token.removeprefix("##") for token in tokens[1:-1]) == text.lower().replace(" ", "")


def test_every_defect_is_on_the_site(built: Path) -> None:
    _, truth = log_and_truth(built)
    kinds = truth[truth["right"]].drop_duplicates("url").set_index("url")["kind"]

    def found(kind: str) -> str:
        url = kinds[kinds == kind].index[0]
        path = built / "site" / url.removeprefix(HOST)
        if not path.is_file():
            return "dead"
        try:
            width, height = open_picture(path.read_bytes(), max_pixels=10**7, name=url).size
        except PictureError as error:
            return error.reason
        return (
            "small"
            if min(width, height) < 100
            else "wide"
            if max(width, height) > 4 * min(width, height)
            else "ok"
        )

    expected = {"": "ok", "copy": "ok", "dead": "dead", "page": "not_an_image", "cut": "truncated"}
    assert {kind: found(kind) for kind in expected} == expected
    seen = truth[truth["kind"].isin(["small", "wide"])]
    for kind, url in seen.drop_duplicates("kind")[["kind", "url"]].to_numpy():
        image = open_picture(
            (built / "site" / url.removeprefix(HOST)).read_bytes(), max_pixels=10**7, name=url
        )
        assert min(image.size) < 100 if kind == "small" else image.width > 4 * image.height


def test_the_seed_decides_and_nothing_else(built: Path, tmp_path: Path) -> None:
    build(tmp_path / "same", seed=7, limit=LIMIT)
    build(tmp_path / "other", seed=8, limit=LIMIT)
    for name in ("click_log.csv", "click_log_zh.csv", "truth_zh.parquet"):
        data = (built / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == data
        assert (tmp_path / "other" / name).read_bytes() != data


def test_the_first_log_does_not_hang_on_the_chinese_one(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHINESE", corpus.BOTH)
    build(tmp_path / "changed", seed=7, limit=LIMIT)
    names = ("click_log.csv", "truth.parquet", "click_log_zh.csv")
    same = [(tmp_path / "changed" / name).read_bytes() == (built / name).read_bytes() for name in names]
    assert same == [True, True, False]


@pytest.mark.slow
def test_unchanged_does_nothing_and_any_damage_is_repaired(built: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "built"))
    assert not build(out, seed=7, limit=LIMIT)
    picture = next((out / "site").rglob("*.webp"))
    data = picture.read_bytes()
    for spoil in (picture.unlink, lambda: picture.write_bytes(b""), (out / "BUILT.json").unlink):
        spoil()
        assert build(out, seed=7, limit=LIMIT)
        assert picture.read_bytes() == data
    (out / "BUILT.json").write_text("{")
    assert build(out, seed=7, limit=LIMIT)
    assert build(out, seed=7, limit=LIMIT - 1)
    (tmp_path / "built.tmp").mkdir()  # a build that was killed half-way
    (tmp_path / "built.tmp" / "click_log.csv").write_text("query")
    assert build(out, seed=7, limit=LIMIT)
    assert not (tmp_path / "built.tmp").exists()
    files = json.loads((out / "BUILT.json").read_text())["files"]
    assert set(files) == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {"BUILT.json"}


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo.corpus", "--out", str(tmp_path / "built"), "--limit", "10"]
    root = Path(__file__).parent.parent
    said = [
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout for _ in range(2)
    ]
    assert "built:" in said[0]
    assert "up to date" in said[1]
    assert subprocess.run([*command, "--limit", "0"], capture_output=True, cwd=root).returncode == 2


def test_click_model_relevance_on_a_small_world() -> None:
    def concept(name: str, zh: str, tags: tuple[str, ...]) -> Concept:
        return Concept(name, name, tags, zh, (), "group", "subgroup")

    concepts = [
        concept("bat", "蝙蝠", ("animal", "night")),
        concept("cricket", "板球", ("ball", "bat")),
        concept("owl", "猫头鹰", ("animal", "night")),
    ]
    drawings = np.repeat(np.arange(3), 2)
    rng = np.random.default_rng(0)
    queries = make_queries(concepts, ClickModel(), rng)
    shown = impressions(queries, concepts, drawings, ClickModel(wrong_per_query=20.0), rng)
    right: dict[str, set[str]] = {query.text: set() for query in queries}
    wrong: dict[str, set[str]] = {query.text: set() for query in queries}
    for i, number in enumerate(shown.query):
        side = right if shown.right[i] else wrong
        side[queries[int(number)].text].add(concepts[drawings[int(shown.drawing[i])]].name_en)
    text = next(query.text for query in queries if query.parts == ("bat",))
    assert right[text] == {"bat"}
    assert wrong[text] == {"owl"}  # a cricket bat is neither right nor wrong
    assert right["animal night"] == {"bat", "owl"}
    assert wrong["animal night"] == {"cricket"}
    assert shown.click[shown.right].sum() / shown.show[shown.right].sum() > 0.2
    assert shown.click[~shown.right].sum() / shown.show[~shown.right].sum() < 0.08
