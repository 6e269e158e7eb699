"""A recipe whose evaluation sets were not checked against its training corpora is refused, unless it says
why.

Looks at the values of a recipe alone, no stage is imported: quick on a login node. A manifest is read where a
corpus was made elsewhere.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.remote import Remote, RemoteError, is_address
from pipeline.recipe_source import Source
from stages.base import StageError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class _Corpus:
    """Where samples come from: a stage of the recipe, or a directory or address."""

    stage: str | None
    place: str | None

    def __str__(self) -> str:
        return f"stage '{self.stage}'" if self.stage else str(self.place)


def check(source: Source, stages: Mapping[str, Values | None]) -> None:
    """Raise StageError with a line for each evaluation set that a training corpus was not checked against.

    `stages`: the values of a valid recipe. A corpus whose manifest is not there yet says nothing: the plan
    tells that it is missing.
    """
    present = {name: values for name, values in stages.items() if values is not None}
    lines = [line for name in present for line in _of_stage(name, present, source)]
    if lines:
        raise StageError("\n".join(lines))


def notes(stages: Mapping[str, Values | None]) -> list[str]:
    """One sentence for each evaluate stage that goes unchecked, with the reason that the recipe gives."""
    return [
        f"{name}: not checked for leaks: {values['unchecked']}"
        for name, values in stages.items()
        if values is not None and values.get("kind") == "evaluate" and values.get("unchecked")
    ]


def _of_stage(name: str, stages: Mapping[str, Values], source: Source) -> Iterator[str]:
    values = stages[name]
    if values.get("kind") != "evaluate" or values.get("unchecked"):
        return
    held = _corpus(values, source)
    for number, gallery in enumerate(values.get("galleries") or ()):
        where = source.where(["stages", name, "galleries", number])
        for trained in _trained_on(name, stages):
            problem = _problem(stages, trained, held, gallery, source)
            if problem:
                gallery_of = f"split '{gallery.get('split')}' of {held}"
                yield (
                    f"{where}: stages.{name}.galleries.{number}: {gallery_of}: {problem}, "
                    f'or say `unchecked: "<why>"` in stages.{name}'
                )


def _trained_on(name: str, stages: Mapping[str, Values]) -> Iterator[str]:
    """The stages that made the weights that a stage reads, the last one first."""
    weights = (stages[name].get("inputs") or {}).get("weights")
    while weights in stages:
        yield str(weights)
        weights = (stages[str(weights)].get("inputs") or {}).get("weights")


def _corpus(values: Values, source: Source) -> _Corpus:
    elsewhere = (values.get("data") or {}).get("corpus")
    if elsewhere is None:
        return _Corpus((values.get("inputs") or {}).get("corpus"), None)
    return _Corpus(None, _resolved(str(elsewhere), source))


def _resolved(place: str, source: Source) -> str:
    """A directory's full path; an address as it is."""
    return place.rstrip("/") if is_address(place) else str((source.path.resolve().parent / place).resolve())


def _problem(
    stages: Mapping[str, Values], trained: str, held: _Corpus, gallery: Values, source: Source
) -> str | None:
    """What is missing between a training stage and a gallery, and the remedy; None: nothing."""
    own = _corpus(stages[trained], source)
    if own.stage is None and own.place is None:
        return None  # a stage of one's own that reads no corpus
    split = str((stages[trained].get("data") or {}).get("split", "train"))
    if own == held and split == gallery.get("split"):
        return f"'{trained}' trains on it; evaluate on another split"
    if own == held and _is_benchmark(stages, own):
        return None  # that stage lets no picture and no text into two of its splits
    own, split = _made_of(stages, own, split)
    held, held_split = _made_of(stages, held, str(gallery.get("split")))
    gallery = {**gallery, "split": held_split}
    if own == held and split == held_split:
        return f"'{trained}' trains on what was made of the same split, whose texts may stand in both"
    of = f"what '{trained}' trains on (split '{split}' of {own})"
    if own.stage is None:
        checked = _manifest_checked(str(own.place))
        if checked is None or any(_manifest_names(one, own, held, gallery, split) for one in checked):
            return None
        return f"{of} was not checked against it: make that corpus again with `decontaminate`"
    making = stages[own.stage]
    if making.get("kind") != "shard":
        return f"{of} was not checked against it, as '{own.stage}' is no shard stage: check it there"
    if _stage_names(making, own, held, gallery, split, source):
        return None
    return f"{of} is not checked against it: {_remedy(own, held, gallery)}"


def _is_benchmark(stages: Mapping[str, Values], corpus: _Corpus) -> bool:
    return corpus.stage in stages and stages[str(corpus.stage)].get("kind") == "benchmark"


def _made_of(stages: Mapping[str, Values], corpus: _Corpus, split: str) -> tuple[_Corpus, str]:
    """Whose samples a split's are: those of a benchmark stage are of the split that it was made from."""
    if not _is_benchmark(stages, corpus):
        return corpus, split
    values = stages[str(corpus.stage)]
    return _Corpus((values.get("inputs") or {}).get("corpus"), None), str(values.get("split"))


def _stage_names(
    making: Values, own: _Corpus, held: _Corpus, gallery: Values, split: str, source: Source
) -> bool:
    """Whether the shard stage of the training corpus checks `split` against the gallery's set."""
    wanted = making.get("decontaminate") or {}
    against = wanted.get("against") or ()
    splits = wanted.get("from", wanted.get("sources"))
    own_splits = [one.get("split") for one in against if not one.get("role") and not one.get("corpus")]
    if split in own_splits if splits is None else split not in splits:
        return False
    for one in against:
        if one.get("split") not in (None, gallery.get("split")):
            continue
        if one.get("role"):
            found = _Corpus((making.get("inputs") or {}).get(one["role"]), None)
        elif one.get("corpus"):
            found = _Corpus(None, _resolved(str(one["corpus"]), source))
        else:
            found = own
        if found == held:
            return True
    return False


def _remedy(own: _Corpus, held: _Corpus, gallery: Values) -> str:
    split = gallery.get("split")
    if held == own:
        return f"add `decontaminate: {{against: [{{split: {split}}}]}}` to stages.{own.stage}"
    if held.stage is not None:
        return (
            f"add `decontaminate: {{against: [{{role: held_out, split: {split}}}]}}` and `inputs.held_out: "
            f"{held.stage}` to stages.{own.stage}"
        )
    return (
        f"add `decontaminate: {{against: [{{corpus: {held.place}, split: {split}}}]}}` to stages.{own.stage}"
    )


def _manifest_checked(place: str) -> list[Values] | None:
    """What a corpus made elsewhere was checked against; None where its manifest is not there."""
    try:
        if is_address(place):
            text = Remote(place).read("manifest.json")
        else:
            text = (Path(place) / "manifest.json").read_bytes()
        manifest = json.loads(text)
    except (OSError, RemoteError, ValueError):
        return None
    found = manifest.get("checked") if isinstance(manifest, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _manifest_names(one: Values, own: _Corpus, held: _Corpus, gallery: Values, split: str) -> bool:
    """Whether an entry of `checked` is of the gallery's set.

    A split of the same corpus is known by its name. Another corpus is known by the name that it was
    registered under, which has to be the gallery's: its samples are in no stage's directory yet when a plan
    is made.
    """
    if split not in (one.get("in_splits") or ()) or one.get("split") not in (None, gallery.get("split")):
        return False
    if own == held:
        return bool(one.get("corpus") == "itself")
    return bool(one.get("name") == gallery.get("name"))
