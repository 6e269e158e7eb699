"""What a split asks and what is right: its images, its distinct texts, and the right answers both ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_tools.shards import ShardIndex
from learning.evaluation.retrieval import RightAnswers

TextField = Literal["title", "content", "queries", "captions"]


@dataclass(frozen=True)
class Gallery:
    """Images by position in the index; texts equal as strings are one entry, right for all their labels."""

    images: list[int]  # positions in the index
    labels: list[str]  # of each image
    texts: list[str]  # in the order in which the images first name them
    owners: list[set[int]]  # of each text: the indices into `images` whose records have it

    def right_texts(self) -> RightAnswers:
        """The right texts of each image: those of an image with the same label."""
        of_label: dict[str, set[int]] = {}
        for text, owners in enumerate(self.owners):
            for image in owners:
                of_label.setdefault(self.labels[image], set()).add(text)
        return RightAnswers.of([of_label.get(label, set()) for label in self.labels])

    def right_images(self) -> RightAnswers:
        """The right images of each text: those with the label of an image that has the text."""
        of_label: dict[str, list[int]] = {}
        for image, label in enumerate(self.labels):
            of_label.setdefault(label, []).append(image)
        return RightAnswers.of(
            [
                {i for label in {self.labels[o] for o in owners} for i in of_label[label]}
                for owners in self.owners
            ]
        )

    def folds(self, count: int) -> list[tuple["Gallery", list[int], list[int]]]:
        """`count` parts of consecutive images with their texts (COCO's 1K protocol: five of 1,000 images).

        Each part comes with the indices of its images and of its texts in this gallery. Sizes differ by 1
        at most.
        """
        if not 1 <= count <= len(self.images):
            raise ValueError(f"folds: {count}; allowed: 1 … {len(self.images)}, the number of images")
        parts = []
        for fold in range(count):
            first, last = (fold * len(self.images)) // count, ((fold + 1) * len(self.images)) // count
            own = [{o - first for o in owners if first <= o < last} for owners in self.owners]
            texts = [t for t, owners in enumerate(own) if owners]
            part = Gallery(
                self.images[first:last],
                self.labels[first:last],
                [self.texts[t] for t in texts],
                [own[t] for t in texts],
            )
            parts.append((part, list(range(first, last)), texts))
        return parts


def gallery_of(index: ShardIndex, texts: Sequence[TextField], relevance: str | None = None) -> Gallery:
    """The gallery of a split.

    texts: the fields that are asked for. relevance: the label by which image and text match; None for the
    sample key, an image and its own texts (Flickr30K then has one right image a text).

    Raises ValueError for an empty split, an image without such a text or without the label: it names the key.
    """
    if len(index) == 0:
        raise ValueError("the split is empty: there is nothing to evaluate")
    labels = index.keys if relevance is None else index.labels(relevance)
    positions: dict[str, int] = {}
    owners: list[set[int]] = []
    for i, key in enumerate(index.keys):
        if not labels[i]:
            raise ValueError(f"relevance: sample '{key}' has no label '{relevance}'")
        own = [t for field in texts for t in texts_of(index.record(i), field)]
        if not own:
            raise ValueError(
                f"texts: sample '{key}' has no {' and no '.join(texts)}: its image has no right answer"
            )
        for text in own:
            if text not in positions:
                positions[text] = len(owners)
                owners.append(set())
            owners[positions[text]].add(i)
    return Gallery(list(range(len(index))), list(labels), list(positions), owners)


def texts_of(record: dict[str, Any], field: TextField) -> list[str]:
    """The texts in one field of a sample's record, without outer blanks; none that are empty."""
    value = record.get(field)
    if field in ("queries", "captions"):
        found = [entry["text"] if isinstance(entry, dict) else entry for entry in value or []]
    else:
        found = [value or ""]
    return [text.strip() for text in found if text.strip()]
