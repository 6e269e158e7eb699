"""Filled-in sheets read back: every line checked, the majority, the kappas, balanced splits after."""

import csv
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from data_tools.benchmark.sheet_csv import (
    COLUMNS,
    VERDICTS,
    defused,
    header,
    line,
    read_sheet,
    restored,
)
from data_tools.benchmark.votes import UNDECIDED, Agreement, decide
from data_tools.errors import DataError
from data_tools.shards import ShardIndex
from stages.base import Report, StageError
from tests.benchmark_case import make, pairs_of, words, write_source

Vote = dict[str, str]


def write_lines(path: Path, rows: Sequence[Vote], separator: str = ",", encoding: str = "utf-8-sig") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def vote(identity: str, verdict: str, text: str = "", annotator: str = "a") -> Vote:
    return {"id": identity, "verdict": verdict, "corrected_text": defused(text), "annotator": annotator}


# ------------------------------------------------------------------------------------------------------ cells


@given(st.text())
def test_every_text_comes_back_and_no_cell_is_a_formula(text: str) -> None:
    cell = defused(text)
    assert restored(cell) == text
    assert not cell.startswith(tuple("=+-@\t\r"))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
@settings(deadline=None)
def test_a_sheet_of_any_texts_is_read_back(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.csv"
        lines = [
            line((f"id-{n}", "val", "k", defused(text), "1", "match", defused(text), "w", ""))
            for n, text in enumerate(texts)
        ]
        path.write_text(header() + "".join(lines), encoding="utf-8", newline="")
        found = list(read_sheet(path))
    assert [one.corrected_text for one in found] == [text.strip() for text in texts]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_what_spreadsheets_save_is_read(tmp_path: Path, separator: str, encoding: str) -> None:
    rows = [
        vote("x-1", "match", '红色, 的; 熊猫\t"好"\nzwei'),
        vote("x-2", " No  Match "),
        vote("x-3", "", annotator=""),
        vote("x-4", "DROP", annotator=""),
    ]
    path = write_lines(tmp_path / "小王.csv", rows, separator, encoding)
    if encoding == "utf-16-be":  # Python writes no mark for it
        path.write_bytes(b"\xfe\xff" + path.read_bytes())
    found = list(read_sheet(path))
    assert [one.verdict for one in found] == ["match", "no match", "", "drop"]
    assert found[0].corrected_text == '红色, 的; 熊猫\t"好"\nzwei'
    assert [one.annotator for one in found] == ["a", "a", "小王", "小王"]
    assert [one.where.rpartition(" ")[2] for one in found] == ["2", "4", "5", "6"]


def good() -> str:
    return header() + line(("x-1", "val", "k", "t", "1", "match", "", "a", ""))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            good().encode() + line(("x-2", *"abcd", "红", "", "", "")).encode("gb18030"),
            "line 3: invalid UTF-8",
        ),
        (good().encode("utf-16-le")[2:], "line 1: a NUL character"),
        (good().encode() + b"x-2,a,b,c,1,match\r\n", "line 3: 6 fields, but 9 columns"),
        (
            good().encode() + line(("x-2", *"abcd", "yes", "", "", "")).encode(),
            "line 3: column verdict: 'yes'",
        ),
        (good().encode() + line(("", *"abcd", "match", "", "", "")).encode(), "line 3: column id is empty"),
        (
            good().encode() + line(("x", *"abcd", "drop", "t", "", "")).encode(),
            "line 3: column corrected_text: 't'",
        ),
        (
            good().encode() + line(("x", *"abcd", "", "t", "", "")).encode(),
            "line 3: column corrected_text: 't'",
        ),
        (b"id,text\nx-1,t\n", "line 1: column verdict missing; it has id, text"),
        (b"", "columns id, verdict missing; it has nothing"),
        (b"id,verdict,id\nx-1,match,x-1\n", "line 1: column id stands twice"),
        (good().encode() + b'x-2,"open', "line 3: unexpected end of data"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "sheet.csv"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        list(read_sheet(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    with pytest.raises(DataError, match="no such sheet"):
        list(read_sheet(tmp_path / "none.csv"))


# -------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("votes", "decision"),
    [
        ([("match", None)], ("match", None)),
        ([("match", None), ("drop", None)], (UNDECIDED, None)),
        ([("match", "x"), ("no match", None), ("match", "x")], ("match", "x")),
        ([("match", "x"), ("match", "y")], (UNDECIDED, None)),
        ([("match", "x"), ("match", None)], (UNDECIDED, None)),
        ([("match", "x"), ("match", None), ("match", None)], ("match", None)),
        ([("match", None), ("no match", None), ("drop", None)], (UNDECIDED, None)),
        ([("drop", None), ("drop", None), ("match", "x")], ("drop", None)),
    ],
)
def test_the_majority_decides_and_a_tie_does_not(
    votes: list[tuple[str, str | None]], decision: tuple[str, str | None]
) -> None:
    for seed in range(4):
        assert decide(random.Random(seed).sample(votes, len(votes))) == decision


@given(st.lists(st.tuples(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS)), min_size=2, max_size=40))
def test_cohens_kappa_is_scikit_learns(judged: list[tuple[str, str]]) -> None:
    agreement = Agreement()
    for one, other in judged:
        agreement.add({"x": one, "y": other})
    (between,) = agreement.summary()["between"]
    ours, theirs = zip(*judged, strict=True)
    if len({*ours, *theirs}) == 1:
        assert between["cohen_kappa"] is None
    else:
        assert between["cohen_kappa"] == pytest.approx(cohen_kappa_score(ours, theirs))
    assert between["agreed"] == sum(a == b for a, b in judged) / len(judged)


def test_fleiss_kappa_of_a_table_that_was_worked_out_by_hand() -> None:
    # 4 pairs, 3 annotators: P = (1 + 1/3 + 1 + 1/3) / 4 = 2/3; the verdicts' shares are 7/12 and 5/12
    agreement = Agreement()
    for row in [("match",) * 3, ("match", "match", "drop"), ("drop",) * 3, ("match", "match", "drop")]:
        agreement.add(dict(zip("abc", row, strict=True)))
    agreement.add({"a": "no match"})  # one vote says nothing of agreement
    found = agreement.summary()
    by_chance = (7 / 12) ** 2 + (5 / 12) ** 2
    assert found["fleiss_kappa"] == pytest.approx((2 / 3 - by_chance) / (1 - by_chance))
    assert found["pairs_judged_twice"] == 4
    assert found["annotators"] == {"a": 5, "b": 4, "c": 4}
    assert Agreement().summary()["fleiss_kappa"] is None


# ----------------------------------------------------------------------------------------- through the stage


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), 260)


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("plain")
    for name in ("icm", "icr"):
        make(root / name, source, set=name)
    return {name: pairs_of(root / name) for name in ("icm", "icr")}


def of(pairs: list[dict[str, Any]], split: str, label: int) -> list[dict[str, Any]]:
    return [pair for pair in pairs if (pair["split"], pair["label"]) == (split, label)]


def reasons_of(directory: Path) -> Counter[str]:
    return Counter(pq.read_table(directory / "out" / "dropped.parquet")["reason"].to_pylist())


def corrected(directory: Path, source: Path, name: str, rows: Sequence[Vote]) -> Report:
    sheet = write_lines(directory / "sheet.csv", rows)
    return make(directory, source, set=name, corrections=str(sheet))


def test_corrections_turn_over_drop_and_rewrite_and_the_labels_balance_again(
    source: Path, plain: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    pairs = plain["icm"]
    val = of(pairs, "val", 1)
    negatives = of(pairs, "val", 0)
    test = of(pairs, "test", 0)
    rows = [
        vote(val[0]["id"], "no match"),
        vote(val[1]["id"], "drop"),
        vote(val[2]["id"], "match", "=一个, 更好的 文本"),
        vote(negatives[0]["id"], "no match"),
        *(vote(pair["id"], "match") for pair in test[:2]),
        vote(test[2]["id"], "match", words("written for this negative")),
        vote(of(pairs, "train", 1)[0]["id"], "match", val[3]["text"] + "!"),  # another pair's text
        vote(of(pairs, "train", 0)[0]["id"], ""),
    ]
    report = corrected(tmp_path / "icm", source, "icm", rows)
    after = pairs_of(tmp_path / "icm")
    by_id = {pair["id"]: pair for pair in after}
    # val: 8 positives, 11 negatives; test: 13 and 7; train: 79 and 80
    counts = Counter((pair["split"], pair["label"]) for pair in after)
    expected = {"train": 79, "val": 8, "test": 7}
    assert counts == {(split, label): n for split, n in expected.items() for label in (0, 1)}
    dropped = {"judged_drop": 1, "corrected_to_repeated": 1, "unbalanced": 1 + 3 + 6}
    assert {reason: n for reason, n in reasons_of(tmp_path / "icm").items() if reason in dropped} == dropped
    assert {reason: report.counts[f"dropped_{reason}"] for reason in dropped} == dropped
    assert val[1]["id"] not in by_id
    assert by_id[val[2]["id"]]["text"] == "=一个, 更好的 文本"
    for pair in after:
        said = next((row for row in rows if row["id"] == pair["id"]), None)
        if said is not None and said["verdict"]:
            assert pair["label"] == (said["verdict"] == "match")
        else:
            before = next(one for one in pairs if one["id"] == pair["id"])
            assert pair == before
    index = ShardIndex.open(tmp_path / "icm" / "out", "val")
    texts = {index.keys[n]: index.record(n)["captions"][0]["text"] for n in range(len(index))}
    assert texts[val[2]["key"]] == "=一个, 更好的 文本"
    assert report.counts["votes"] == 8
    assert report.counts["lines_not_judged"] == 1
    assert report.counts["pairs_judged"] == 8
    assert "benchmark/fleiss_kappa" not in report.metrics


def test_of_a_retrieval_set_no_match_drops(
    source: Path, plain: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    test = of(plain["icr"], "test", 1)
    rows = [vote(test[0]["id"], "no match"), vote(test[1]["id"], "match", words("better"))]
    report = corrected(tmp_path / "icr", source, "icr", rows)
    assert report.counts["pairs"] == 199 == len(ShardIndex.open(tmp_path / "icr" / "out"))
    assert (report.counts["test_positive"], report.counts["corrected_texts"]) == (19, 1)
    assert reasons_of(tmp_path / "icr")["judged_no_match"] == 1
    assert words("better") in {pair["text"] for pair in pairs_of(tmp_path / "icr")}


def test_several_annotators_in_a_folder_and_in_any_order(
    source: Path, plain: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    train = of(plain["icr"], "train", 1)[:6]
    verdicts = {
        "a": ["match", "match", "no match", "match", "drop", "match"],
        "b": ["match", "no match", "no match", "match", "drop", "match"],
        "c": ["match", "drop", "match", "match", "drop"],
    }
    for name, said in verdicts.items():
        rows = [vote(pair["id"], one, annotator="") for pair, one in zip(train, said, strict=False)]
        write_lines(tmp_path / "sheets" / f"{name}.csv", rows, ";" if name == "b" else ",")
    report = make(tmp_path / "one", source, set="icr", corrections=str(tmp_path / "sheets"))
    files = [str(tmp_path / "sheets" / f"{name}.csv") for name in "bca"]
    make(tmp_path / "other", source, set="icr", corrections=files)
    assert pairs_of(tmp_path / "one") == pairs_of(tmp_path / "other")
    assert reasons_of(tmp_path / "one") == reasons_of(tmp_path / "other")
    dropped = {"undecided": 1, "judged_no_match": 1, "judged_drop": 1}
    assert {reason: report.counts[f"dropped_{reason}"] for reason in dropped} == dropped
    assert (report.counts["annotators"], report.counts["votes"]) == (3, 17)
    assert report.counts["pairs_judged_twice"] == 6
    assert 0 < report.metrics["benchmark/fleiss_kappa"] < 1
    assert (tmp_path / "one" / "out" / "agreement.json").is_file()


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_any_corrections_leave_exact_balance_and_no_text_twice(
    source: Path, plain: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    draw = random.Random(seed)
    texts = [words(n) for n in range(5)] + [pair["text"] for pair in plain["icm"][:5]]
    rows = []
    for annotator in "ab":
        for pair in draw.sample(plain["icm"], 90):
            verdict = draw.choice((*VERDICTS, "match", ""))
            text = draw.choice(texts) if verdict == "match" and draw.random() < 0.3 else ""
            rows.append(vote(pair["id"], verdict, text, annotator))
    directory = tmp_path_factory.mktemp("any") / "icm"
    report = corrected(directory, source, "icm", rows)
    after = pairs_of(directory)
    counts = Counter((pair["split"], pair["label"]) for pair in after)
    for split in ("train", "val", "test"):
        assert counts[split, 1] == counts[split, 0] > 0
    for column in ("id", "key", "text"):
        assert len({pair[column] for pair in after}) == len(after)
    assert len(after) == report.counts["pairs"]
    lost = sum(n for name, n in report.counts.items() if name.startswith("dropped_"))
    assert len(after) + lost == report.counts["pictures"]


def test_what_does_not_fit_the_set_is_named(
    source: Path, plain: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    identity = plain["icm"][0]["id"]
    cases = [
        ([vote(identity, "match"), vote("icm-0", "match")], r"line 3: column id: 'icm-0' is of no pair"),
        ([vote(plain["icr"][0]["id"], "drop")], r"line 2: column id: 'icr-.*' is of no pair of this set"),
        (
            [vote(identity, "match"), vote(identity, "drop")],
            rf"line 3: annotator 'a' said something else of {identity}",
        ),
        ([vote(identity, "match", "x")], r"line 2: column corrected_text: 'x' has 1 words; allowed: 2 … 128"),
        ([vote(pair["id"], "drop") for pair in plain["icm"]], r"they leave no positive pair in train"),
    ]
    for number, (rows, says) in enumerate(cases):
        directory = tmp_path / str(number)
        with pytest.raises(StageError, match=says):
            corrected(directory, source, "icm", rows)
        assert not (directory / "out").exists()
    again = [vote(identity, "match"), vote(identity, "match")]  # the same twice is one vote
    assert corrected(tmp_path / "again", source, "icm", again).counts["votes"] == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match=r"empty: no \*\.csv in this folder"):
        make(tmp_path / "none", source, set="icm", corrections=str(tmp_path / "empty"))
