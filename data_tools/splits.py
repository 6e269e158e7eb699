"""Labels from a URL, and the split of each record: rules tried in order, the first that takes a record
decides.

Shares are drawn by a seeded hash of the value or key, so a record's split depends on nothing but itself: more
data, or another order, moves none.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from data_tools.errors import DataError


@dataclass(frozen=True)
class SplitRule:
    """One split. `by` + `share`: that share of the label's values, whole; `by` + `values`: those values of
    the label;
    `share` alone: that share of the keys; `given`: records that a source puts into one of these splits; none
    of them: all records that are left."""

    name: str
    by: str | None = None
    share: float | None = None
    values: tuple[str, ...] | None = None
    given: tuple[str, ...] | None = None


def check_rules(rules: Sequence[SplitRule], labels: Sequence[str]) -> None:
    """DataError for rules that cannot be meant: no last split for the rest, unknown labels, a name twice …"""
    names = [rule.name for rule in rules]
    if not rules or rules[-1] != SplitRule(rules[-1].name):
        raise DataError("splits: the last one must take all that is left: give it a name and nothing else")
    for place, rule in enumerate(rules):
        where = f"splits[{place}] '{rule.name}'"
        if not re.fullmatch("[a-z0-9_]+", rule.name) or names.count(rule.name) > 1:
            raise DataError(f"{where}: names are of a-z, 0-9, _ and stand once")
        if rule.by is not None and rule.by not in labels:
            raise DataError(f"{where}: by: no label '{rule.by}'; labels: {', '.join(labels) or 'none'}")
        if rule.share is not None and not 0 < rule.share < 1:
            raise DataError(f"{where}: share: {rule.share} is not between 0 and 1")
        if rule.values is not None and (rule.by is None or rule.share is not None):
            raise DataError(f"{where}: values need `by`, and no share")
        if rule.by is not None and rule.values is None and rule.share is None:
            raise DataError(f"{where}: by: give a share or values with it")
        if rule.given is not None and (not rule.given or rule.by is not None or rule.share is not None):
            raise DataError(
                f"{where}: given: name at least one split of a source, and no by or share with it"
            )
        if rule == SplitRule(rule.name) and place < len(rules) - 1:
            raise DataError(f"{where}: it takes all, so nothing is left for the splits after it; put it last")


def split_of(
    key: str, labels: Mapping[str, str], rules: Sequence[SplitRule], seed: int, given: Collection[str] = ()
) -> str:
    """The name of the split of one record; `given`: the splits that sources put it into. `rules` passed
    check_rules."""
    for rule in rules:
        if rule.given is not None:
            if not set(rule.given).isdisjoint(given):
                return rule.name
            continue
        value = key if rule.by is None else labels.get(rule.by, "")
        if rule.by is not None and not value:
            continue  # without the label the rule says nothing of the record
        if rule.values is not None:
            taken = value in rule.values
        elif rule.share is not None:
            taken = unit_hash(seed, rule.name, value) < rule.share
        else:
            taken = True
        if taken:
            return rule.name
    raise DataError("splits: the last one must take all that is left")


def unit_hash(seed: int, salt: str, value: str) -> float:
    """A number in [0, 1) that looks random but depends on the arguments alone."""
    digest = hashlib.blake2b(f"{seed}\0{salt}\0{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def compile_labels(pattern: str | None) -> re.Pattern[str] | None:
    """The regular expression whose named groups are the labels; DataError where it is wrong."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"labels: '{pattern}' is no regular expression: {error}") from error
    if not compiled.groupindex:
        raise DataError(f"labels: '{pattern}' has no named group; write (?P<name>...) for each label")
    return compiled


def labels_of(url: str, pattern: re.Pattern[str] | None) -> dict[str, str]:
    """The labels of a URL; empty strings where the expression does not match."""
    if pattern is None:
        return {}
    found = pattern.search(url)
    return {name: (found[name] or "") if found else "" for name in pattern.groupindex}
