"""The order of a crawl: every URL once, hosts interleaved, none in two lanes; what a new plan leaves."""

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.pictures import PictureRules
from data_tools.web.opener import host_of
from data_tools.web.plan import NO_LANE, Plan, keep, make_plan
from data_tools.web.reuse import Terms


def own(url: str) -> bool:
    return url.startswith("http://own.example/")


def plan_of(counts: dict[str, int], per_piece: int) -> tuple[list[str], Plan]:
    urls = sorted(f"http://{host}.example/{i}" for host, count in counts.items() for i in range(count))
    return urls, make_plan(pa.array(urls, pa.large_string()), own, per_piece)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["own", *"abcdefghij"]), st.integers(1, 30)),
    st.integers(2, 20),
)
def test_every_url_is_in_one_piece_and_every_host_in_one_lane(counts: dict[str, int], per_piece: int) -> None:
    urls, plan = plan_of(counts, per_piece)
    pieces = [plan.piece(i).to_pylist() for i in range(len(plan))]
    assert sorted(url for piece in pieces for url in piece) == urls
    assert all(0 < len(piece) == plan.size(i) <= per_piece for i, piece in enumerate(pieces))
    lanes = defaultdict(set)
    for lane, piece in zip(plan.lanes.tolist(), pieces, strict=True):
        for url in piece:
            lanes[host_of(url)].add(lane)
    assert all(len(found) == 1 for found in lanes.values())
    assert lanes.get("own.example", {NO_LANE}) == {NO_LANE}
    assert NO_LANE not in {lane for host, found in lanes.items() if host != "own.example" for lane in found}
    assert plan.identity() == plan_of(counts, per_piece)[1].identity()


def test_in_a_lane_the_first_of_each_host_come_first() -> None:
    _, plan = plan_of({"crowd": 10_000} | {f"h{i}": 3 for i in range(200)}, 500)
    by_lane = defaultdict(list)
    for i, lane in enumerate(plan.lanes.tolist()):
        by_lane[lane] += plan.piece(i).to_pylist()
    for found in by_lane.values():
        seen: Counter[str] = Counter()
        ranks = []
        for url in found:
            ranks.append(seen[host_of(url)])
            seen[host_of(url)] += 1
        assert all(later >= earlier for earlier, later in pairwise(ranks))


def test_another_plan_removes_pieces_and_not_what_was_taken_over(tmp_path: Path) -> None:
    _, plan = plan_of({"a": 10}, 5)
    names = ("00000.tar", "00000.parquet", "00000_stats.json", "reused-00000.tar", "reused.parquet")
    for name in names:
        (tmp_path / name).touch()
    keep(plan, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.txt", *names[3:]}
    (tmp_path / "00000.tar").touch()
    (tmp_path / ".piece-00000-17").mkdir()
    keep(plan, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.txt", "00000.tar", *names[3:]}


def test_terms_are_read_as_they_were_written_or_not_at_all(tmp_path: Path) -> None:
    terms = Terms("tandem True False False", PictureRules(120, 3.5), 1000, "http://own.example/")
    assert Terms.read(tmp_path) is None
    terms.write(tmp_path)
    assert Terms.read(tmp_path) == terms
    (tmp_path / "fetched_under.json").write_text('{"access": "x", "rules": {"unknown": 1}}')
    assert Terms.read(tmp_path) is None
