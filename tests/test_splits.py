"""Splits: the first rule that takes a record decides; shares are seeded, and move no other record."""

import pytest

from data_tools.errors import DataError
from data_tools.splits import SplitRule, check_rules, compile_labels, labels_of, split_of, unit_hash

RULES = (
    SplitRule("unseen_concept", by="concept", share=0.125),
    SplitRule("unseen_vendor", by="vendor", values=("noto",)),
    SplitRule("val", share=0.04),
    SplitRule("train"),
)
VENDORS = ("noto", "twemoji", "flat")


def splits(seed: int, concepts: int = 2000) -> dict[tuple[str, str], str]:
    check_rules(RULES, ("vendor", "concept"))
    found = {}
    for vendor in VENDORS:
        for i in range(concepts):
            labels = {"vendor": vendor, "concept": f"c{i}"}
            found[vendor, f"c{i}"] = split_of(f"{vendor}{i}", labels, RULES, seed)
    return found


def test_no_concept_of_unseen_concept_is_in_another_split() -> None:
    found = splits(seed=1)
    unseen = {concept for (_, concept), split in found.items() if split == "unseen_concept"}
    assert all(split == "unseen_concept" for (_, c), split in found.items() if c in unseen)
    assert 0.10 < len(unseen) / 2000 < 0.15


def test_the_held_out_vendor_is_in_no_other_split_but_unseen_concept() -> None:
    found = splits(seed=1)
    assert {split for (vendor, _), split in found.items() if vendor == "noto"} == {
        "unseen_concept",
        "unseen_vendor",
    }
    assert all(vendor == "noto" for (vendor, _), split in found.items() if split == "unseen_vendor")


def test_share_of_keys_is_of_those_that_are_left() -> None:
    found = list(splits(seed=1).values())
    left = found.count("val") + found.count("train")
    assert 0.03 < found.count("val") / left < 0.05


def test_more_data_moves_no_record_and_another_seed_does() -> None:
    small, large = splits(seed=1, concepts=500), splits(seed=1)
    assert all(large[place] == split for place, split in small.items())
    assert splits(seed=2) != large


def test_two_shares_of_the_same_label_are_drawn_apart() -> None:
    first = {v for v in map(str, range(4000)) if unit_hash(0, "a", v) < 0.5}
    second = {v for v in map(str, range(4000)) if unit_hash(0, "b", v) < 0.5}
    assert 0.45 < len(first & second) / len(first) < 0.55


def test_a_record_without_the_label_goes_on_to_the_next_rule() -> None:
    rules = (SplitRule("a", by="concept", share=0.999999), SplitRule("rest"))
    assert split_of("k", {"concept": ""}, rules, 0) == "rest"
    assert split_of("k", {"concept": "x"}, rules, 0) == "a"


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ((), "take all that is left"),
        ((SplitRule("a", share=0.5),), "take all that is left"),
        ((SplitRule("a", by="colour", share=0.5), SplitRule("b")), "no label 'colour'; labels: vendor"),
        ((SplitRule("a", share=1.5), SplitRule("b")), "not between 0 and 1"),
        ((SplitRule("a", values=("x",)), SplitRule("b")), "values need `by`"),
        ((SplitRule("a", by="vendor"), SplitRule("b")), "a share or values"),
        ((SplitRule("a"), SplitRule("b")), "put it last"),
        ((SplitRule("a", share=0.5), SplitRule("a")), "stand once"),
        ((SplitRule("A/b", share=0.5), SplitRule("b")), "a-z"),
    ],
)
def test_rules_that_cannot_be_meant(rules: tuple[SplitRule, ...], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_rules(rules, ("vendor",))


def test_labels_of_a_url() -> None:
    pattern = compile_labels(r"^http://pictures\.example/(?P<vendor>[^/]+)/(?P<concept>[0-9a-f-]+)[._]")
    assert labels_of("http://pictures.example/noto/1f004-200d.webp", pattern) == {
        "vendor": "noto",
        "concept": "1f004-200d",
    }
    assert labels_of("http://pictures.example/noto/1f004_2.webp", pattern)["concept"] == "1f004"
    assert labels_of("http://elsewhere.example/noto/1f004.webp", pattern) == {"vendor": "", "concept": ""}
    assert labels_of("http://pictures.example/", None) == {}
    with pytest.raises(DataError, match="no regular expression"):
        compile_labels("(?P<a")
    with pytest.raises(DataError, match="no named group"):
        compile_labels("(a)")
