"""Which split a record is in, and which of its texts may stand there."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.given import given_splits
from data_tools.splits import SplitRule, labels_of, split_of

COLUMNS = ("key", "url", "given")  # of a record (records.py), all that its split depends on


@dataclass(frozen=True)
class RecordSplits:
    """The rules of a corpus, which passed splits.check_rules, on the records of records.py."""

    rules: Sequence[SplitRule]
    seed: int
    labels: re.Pattern[str] | None  # on the URL
    pair_labels: Sequence[str] = ()  # labels of picture and text together

    def of(self, record: Mapping[str, Any]) -> str:
        """The split of a record: by its labels, its key, and the splits that its sources put it into."""
        given: set[str] = set().union(*given_splits(record["given"] or []).values())
        return self._of(record["key"], record["url"], given)

    def belongs(self, record: Mapping[str, Any], split: str) -> Callable[[str, str | None], bool]:
        """Whether a text may stand in the record, by the URL that it came with and its source's own split."""
        of_url = given_splits(record["given"] or [])
        said = self._said_of_pair(record["url"])

        def may(url: str, own: str | None) -> bool:
            given = of_url.get(url, set()) if own is None else {own}  # without its own it goes with its URL
            return self._of(record["key"], url, given) == split and self._said_of_pair(url) == said

        return may

    def _said_of_pair(self, url: str) -> list[str]:
        found = labels_of(url, self.labels) if self.pair_labels else {}
        return [found.get(name, "") for name in self.pair_labels]

    def _of(self, key: str, url: str, given: set[str]) -> str:
        return split_of(key, labels_of(url, self.labels), self.rules, self.seed, given)
