"""Global batches from a shard index: position is (seed, epoch, samples consumed) and nothing else.

The order of an epoch is a stateless permutation; rank r of W takes rows r·b … (r + 1)·b - 1 of each global
batch; text choice, augmentation, masks and the replacement of a bad sample are drawn from generators keyed by
(seed, epoch, sample key). So a resume costs no scan, and any number of ranks reads the same global batches.
How they are made ahead of the training is prefetch.py's.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from data_tools.corpus_source import CorpusSource
from data_tools.pictures import EncodedPicture, PictureError
from data_tools.regions.store import PictureRegions
from data_tools.shards import ShardIndex
from learning.evaluation.gallery import TextField, texts_of
from learning.methods.base import Batch, MaskedPatches, Regions, Views
from learning.tokenizer import Tokenizer
from learning.training.augment import ImageTransform, Picture
from learning.training.masking import check_masks, mask_patches
from learning.training.randomness import MixedShards, Permutation, keyed_generator, stable_hash
from learning.training.sample_labels import BadRecord, SampleLabels, SampleLabelSets
from learning.training.split_regions import SplitRegions, joined_regions, stacked
from learning.training.text_views import TextViews
from learning.training.tower_tokens import TowerTokens

CACHE_MARGIN = 1.25  # a cached picture's shorter side, as a multiple of image_px, at most
FETCH_AHEAD = 8  # batches whose shards, where they are at an address, are fetched ahead
ATTEMPTS = 100  # samples that may stand in for one bad sample before the corpus is called unreadable


class DataConfig(CorpusSource):
    """Which samples a training stage reads, and how."""

    split: str = "train"
    texts: tuple[TextField, ...] = Field(
        default=("title", "content", "queries", "captions"),
        min_length=1,
        description="one of a sample's texts is drawn: first a field that it has, then a text of that field",
    )
    positives: str | None = Field(
        default=None,
        description="a label: samples with the same value are each other's positives, where a loss knows of "
        "them; null: each sample is its own alone",
    )
    mix_shards: int | None = Field(
        default=None,
        ge=1,
        description="shards that are read at a time, in an order drawn anew each epoch, their samples mixed; "
        "null: all. For a corpus that is larger than data.cache_gb",
    )
    workers: int = Field(
        default=0, ge=0, description="processes a rank that make each batch together; 0: one thread"
    )
    cache: Literal["none", "memory", "tokens"] = Field(
        default="none",
        description=f"memory: keep decoded pictures, the shorter side at most {CACHE_MARGIN} × image_px; "
        "tokens: also what a frozen image tower gives for the plain view, on disk: it runs once a picture",
    )
    cache_mb: int = Field(default=4096, ge=1, description="a rank's share of memory for the cache, MiB")
    max_pixels: int = Field(
        default=50_000_000, ge=1, description="of a picture; one with more is a bad sample"
    )
    max_bad_share: float = Field(
        default=0.001, ge=0, le=1, description="of the split: more bad samples stop the run"
    )

    @model_validator(mode="after")
    def _one_cache(self) -> "DataConfig":
        if self.cache != "none" and self.workers > 0:
            raise ValueError(
                f"data.cache: {self.cache} is kept by one process; set data.workers: 0, or data.cache: none"
            )
        return self


@dataclass
class Loaded:
    """One rank's part of a global batch, and the samples that were left out of it: key → why."""

    batch: Batch
    skipped: dict[str, str]


@dataclass
class Rows:
    """Consecutive rows of one rank's part of a global batch. Texts are not padded yet, and are numpy's, which
    cross processes cheaply."""

    step: int
    keys: list[str]
    images: dict[str, Tensor]  # by view: (n, 3, p, p), or the frozen tower's tokens (n, t, v)
    texts: dict[str, list[Int64[np.ndarray, " _"]]]
    ids: Int64[np.ndarray, " n"]
    labels: dict[str, Int64[np.ndarray, " n"]]
    label_sets: dict[str, Float32[np.ndarray, "n c"]]
    regions: Regions | None
    skipped: dict[str, str]


@dataclass
class _Sample:
    """What one row is made of, before its text is split into tokens."""

    key: str
    images: dict[str, Tensor]
    text: str
    id: int
    labels: dict[str, int]
    label_sets: dict[str, Float32[np.ndarray, " c"]]
    regions: PictureRegions | None


@dataclass
class Failed:
    """A batch that could not be made: told as a value, so that all ranks can stop together."""

    message: str


@dataclass
class BadSamples:
    """Samples that any rank skipped, by key, and how many are too many: the same on all ranks."""

    limit: int
    why: dict[str, str] = field(default_factory=dict)

    def new(self, skipped: dict[str, str]) -> dict[str, str]:
        """What of it is not known yet."""
        return {key: reason for key, reason in skipped.items() if key not in self.why}

    def too_many(self) -> str | None:
        """What to tell the user once there are more than `limit`, else None."""
        if len(self.why) <= self.limit:
            return None
        shown = "; ".join(list(self.why.values())[:5])
        return (
            f"{len(self.why)} bad samples, data.max_bad_share allows {self.limit}: {shown}; "
            "run the shard stage again, or raise data.max_bad_share"
        )


def steps_per_epoch(samples: int, contrastive_batch: int) -> int:
    """Whole global batches in an epoch; the last, incomplete one is dropped (others are, in another epoch).

    Raises ValueError when there is not even one.
    """
    if samples < contrastive_batch:
        raise ValueError(
            f"contrastive_batch: {contrastive_batch}, but the split has {samples} samples; make it smaller"
        )
    return samples // contrastive_batch


class Batches:
    """One rank's part of every global batch, by step. Step s is batch s % S of epoch s // S."""

    def __init__(
        self,
        index: ShardIndex,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        views: Views,
        config: DataConfig,
        *,
        seed: int,
        contrastive_batch: int,
        max_length: int,
        rank: int,
        world_size: int,
        tower: TowerTokens | None = None,
        regions: SplitRegions | None = None,
    ):
        """`max_length` in tokens. `tower`: what the frozen image tower gives, for `data.cache: tokens`.
        `regions`: those of the split's pictures, where `views` asks for them.

        Raises ValueError when the batch does not divide by `world_size`, for views and labels that the
        pictures or the corpus do not have, and where more samples lack regions than data.max_bad_share says.
        """
        if views.regions and regions is None:
            raise ValueError("inputs.regions: missing; the method reads regions: name a regions stage")
        self.regions = regions if views.regions else None
        if self.regions is not None:
            self.regions.check(int(config.max_bad_share * len(index)))
        if config.cache == "tokens" and tower is None:
            raise ValueError(
                "data.cache: tokens needs an image tower that never learns; "
                "set model.vision.trainable: false, or data.cache: memory"
            )
        self.tower = tower if config.cache == "tokens" else None
        if contrastive_batch % world_size:
            raise ValueError(
                f"contrastive_batch: {contrastive_batch} does not divide by {world_size} ranks; "
                f"give a multiple of {world_size}"
            )
        check_masks(views, transform.image_px)
        index.reads(config.mix_shards)
        self._labels = SampleLabels(index, views.labels, config.positives)
        self._label_sets = SampleLabelSets(index, views.label_sets)
        self.index, self.tokenizer, self.transform, self.views = index, tokenizer, transform, views
        self.config, self.seed, self.max_length = config, seed, max_length
        self.contrastive_batch, self.rank, self.world_size = contrastive_batch, rank, world_size
        self.per_epoch = steps_per_epoch(len(index), contrastive_batch)
        self.left_out: frozenset[str] = frozenset()  # keys that are replaced as bad samples are, uncounted
        self._shard_sizes = np.bincount(index.shard_of)  # samples stand shard by shard
        self._token_ids = TextViews(tokenizer, views.texts, max_length, seed)
        self._pictures: dict[int, Tensor] = {}
        self._texts: dict[int, list[list[str]]] = {}
        self._cache_left = config.cache_mb * 2**20 if config.cache != "none" else 0

    def samples(self, step: int) -> tuple[int, Int64[np.ndarray, " b"]]:
        """The epoch of a step, and the index positions of this rank's rows of it."""
        epoch, batch = divmod(step, self.per_epoch)
        each = self.contrastive_batch // self.world_size
        first = batch * self.contrastive_batch + self.rank * each
        return epoch, self._order(epoch)(np.arange(first, first + each))

    def _order(self, epoch: int) -> Permutation | MixedShards:
        if self.config.mix_shards is None:
            return Permutation(len(self.index), self.seed, epoch)
        return MixedShards(self._shard_sizes, self.config.mix_shards, self.seed, epoch)

    def keys(self, step: int) -> list[str]:
        """The keys of this rank's rows of a step, before any is replaced."""
        return [self.index.keys[place] for place in self.samples(step)[1].tolist()]

    def __getitem__(self, step: int) -> Loaded | Failed:
        return self.joined([self.rows(step, 0, 1)])

    def load(self, step: int) -> Loaded:
        """This rank's part of the global batch of `step`. Raises ValueError for an unreadable corpus."""
        made = self[step]
        if isinstance(made, Failed):
            raise ValueError(made.message)
        return made

    def rows(self, step: int, part: int, parts: int) -> Rows | Failed:
        """The rows of one of `parts` equal parts (to one row) of this rank's batch of `step`."""
        try:
            return self._rows(step, part, parts)
        except (ValueError, OSError) as error:
            return Failed(f"step {step}: {error}")

    def _rows(self, step: int, part: int, parts: int) -> Rows:
        epoch, positions = self.samples(step)
        if part == 0:
            self.index.fetch_ahead(self.samples(step + FETCH_AHEAD)[1])
        mine = positions[len(positions) * part // parts : len(positions) * (part + 1) // parts]
        skipped: dict[str, str] = {}
        samples = [self._good_sample(epoch, position, skipped) for position in mine.tolist()]
        keys = [sample.key for sample in samples]
        views = self.views.images if samples else {}  # there is nothing to stack
        return Rows(
            step,
            keys,
            {name: torch.stack([sample.images[name] for sample in samples]) for name in views},
            self._token_ids(epoch, keys, [sample.text for sample in samples]),
            np.array([sample.id for sample in samples], np.int64),
            {name: np.array([s.labels[name] for s in samples], np.int64) for name in self.views.labels},
            {name: np.array([s.label_sets[name] for s in samples]) for name in self.views.label_sets},
            stacked([s.regions for s in samples if s.regions is not None])
            if self.regions and samples
            else None,
            skipped,
        )

    def joined(self, parts: Sequence[Rows | Failed]) -> Loaded | Failed:
        """The batch of all its parts, in their order."""
        rows: list[Rows] = []
        for part in parts:
            if isinstance(part, Failed):
                return part
            if part.keys:  # there may be more parts than rows
                rows.append(part)
        images = {name: _concatenated([part.images[name] for part in rows]) for name in self.views.images}
        texts = {
            name: self.tokenizer.pad([torch.from_numpy(ids) for part in rows for ids in part.texts[name]])
            for name in self.views.texts
        }
        tokens = {name: images.pop(name) for name in list(images) if self._by_tower(name)}
        skipped = {key: why for part in rows for key, why in part.skipped.items()}
        batch = Batch(
            images,
            texts,
            [key for part in rows for key in part.keys],
            tokens,
            ids=torch.from_numpy(np.concatenate([part.ids for part in rows])),
            labels={
                name: torch.from_numpy(np.concatenate([part.labels[name] for part in rows]))
                for name in self.views.labels
            },
            label_sets={
                name: torch.from_numpy(np.concatenate([part.label_sets[name] for part in rows]))
                for name in self.views.label_sets
            },
            regions=joined_regions([part.regions for part in rows if part.regions is not None]),
            draw=stable_hash(self.seed, "draw", rows[0].step),
        )
        return Loaded(batch, skipped)

    def _by_tower(self, view: str) -> bool:
        return self.tower is not None and self.views.images[view] == "plain"

    def _good_sample(self, epoch: int, position: int, skipped: dict[str, str]) -> _Sample:
        """The sample at a position, or the one that stands in for it.

        The stand-in is drawn by the bad sample's own key, epoch and attempt, so no other row of any rank
        changes; it may occur twice in the epoch.
        """
        original = position
        for attempt in range(ATTEMPTS):
            key = self.index.keys[position]
            try:
                if key not in self.left_out:
                    return self._sample(epoch, position, key)
            except (PictureError, BadRecord) as error:
                skipped[key] = str(error)
            drawn = stable_hash(self.seed, epoch, self.index.keys[original], "stand-in", attempt)
            position = drawn % len(self.index)
        last = list(skipped.values())[-1] if skipped else f"{key} is left out"
        raise ValueError(
            f"{ATTEMPTS} samples in a row could not be read; the last: {last}; "
            "the corpus is damaged: run the shard stage again"
        )

    def _sample(self, epoch: int, position: int, key: str) -> _Sample:
        labels = self._labels.numbers(position)  # first: it costs least
        regions = None if self.regions is None else self._regions(self.regions, position)
        sets = self._label_sets.row(position, lambda: self._record(position, key))
        images, text = self._images(epoch, position, key), self._text(epoch, position, key)
        return _Sample(key, images, text, self._labels.id(position), labels, sets, regions)

    def _regions(self, regions: SplitRegions, position: int) -> PictureRegions:
        try:
            return regions.row(position)
        except ValueError as error:
            raise BadRecord(str(error)) from error

    def _images(self, epoch: int, position: int, key: str) -> dict[str, Tensor]:
        """By view: pixels, or the frozen tower's tokens (`_by_tower`)."""
        picture = functools.cache(lambda: self._picture(position, key))  # decoded where a view needs it
        plain = functools.cache(lambda: self.transform.plain(picture()))
        made = {}
        for name, how in self.views.images.items():
            if self.tower is not None and self._by_tower(name):
                made[name] = self.tower.row(position, plain)
            elif how == "plain":
                made[name] = plain()
            else:
                generator = keyed_generator(self.seed, epoch, key, "image", name)
                if isinstance(how, MaskedPatches):
                    made[name] = mask_patches(plain(), how.share, how.patch_px, generator)
                elif how == "randaugment":
                    made[name] = self.transform.randaugmented(picture(), generator)
                else:
                    made[name] = self.transform.augmented(picture(), generator)
        return made

    def plain_pixels(self, position: int) -> Tensor | None:
        """The plain view of a sample, (3, p, p); None when the picture cannot be read."""
        try:
            return self.transform.plain(self._picture(position, self.index.keys[position]))
        except PictureError:
            return None  # it is told when a batch asks for it

    def _picture(self, position: int, key: str) -> Picture:
        """The picture, or its copy in the cache. What is in the cache never changes what is returned."""
        if position in self._pictures:
            return self._pictures[position]
        name = f"{self.index.where(position)}, key {key}"
        data = self.index.image_bytes(position)
        picture = EncodedPicture(data, max_pixels=self.config.max_pixels, name=name)
        if self.config.cache == "none":
            return picture
        pixels = _shrunk(picture, self.transform.image_px)
        if pixels.numel() <= self._cache_left:
            self._cache_left -= pixels.numel()
            self._pictures[position] = pixels
        return pixels

    def _text(self, epoch: int, position: int, key: str) -> str:
        """One text of a sample: a field that it has, evenly, then one of that field's texts, evenly."""
        fields = self._texts.get(position)
        if fields is None:
            fields = self._fields(position, key)
            if self.config.cache != "none":
                self._texts[position] = fields
        generator = keyed_generator(self.seed, epoch, key, "text")
        chosen = fields[int(torch.randint(len(fields), (), generator=generator))]
        return chosen[int(torch.randint(len(chosen), (), generator=generator))]

    def _fields(self, position: int, key: str) -> list[list[str]]:
        where, record = f"{self.index.where(position)}, key {key}", self._record(position, key)
        try:
            fields = [texts for name in self.config.texts if (texts := texts_of(record, name))]
        except (TypeError, KeyError, AttributeError) as error:
            raise BadRecord(f"{where}: its record cannot be read: {error}") from error
        if not fields:
            raise BadRecord(f"{where}: it has no text in {', '.join(self.config.texts)}")
        return fields

    def _record(self, position: int, key: str) -> dict[str, Any]:
        try:
            return self.index.record(position)
        except ValueError as error:
            where = f"{self.index.where(position)}, key {key}"
            raise BadRecord(f"{where}: its record cannot be read: {error}") from error


def _shrunk(picture: EncodedPicture, image_px: int) -> UInt8[Tensor, "3 h w"]:
    """Its shorter side at most CACHE_MARGIN × image_px, the aspect kept."""
    limit = max(1, int(CACHE_MARGIN * image_px))
    image = picture.decoded((limit, limit))
    width, height = image.size
    if min(width, height) > limit:
        scale = limit / min(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
