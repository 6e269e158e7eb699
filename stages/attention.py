"""Part of the evaluate stage: pictures of where a model looks when it is given an entity (R2D2, Sec. 4.4).

The choice of pictures knows nothing of the maps: it shows what the model is like, not its best.
"""

import hashlib
import heapq
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32
from PIL import Image
from pydantic import Field, StringConstraints

from data_tools.log.listed_words import listed_pattern
from data_tools.pictures import open_picture
from data_tools.shards import ShardIndex
from learning.evaluation.attention_maps import attention_map
from learning.evaluation.embed import plain_pixels
from learning.evaluation.gallery import TextField, texts_of
from learning.model_files import RetrievalModel
from learning.training import distributed
from learning.training.randomness import stable_hash
from stages.base import Frozen, Job

PICTURE_PX = 224  # longer side of what is drawn
HEAT = 0.6  # share of the colours in a map; the rest is the picture in grey,
GREY = 0.5  # as bright as this: brightness is to tell of the map, not of a white background
COLOURS = "viridis"  # even steps look even, in grey and to the colour-blind too


class AttentionMapsConfig(Frozen):
    """Which pictures and entities to draw attention maps of."""

    gallery: str = Field(description="a name of `galleries`: its pictures and its texts")
    entities: list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]] | None = Field(
        default=None,
        min_length=1,
        description="each is shown in pictures with a text that has it (in Latin letters: as whole words); "
        "null: pictures of the gallery, each with its shortest text",
    )
    count: int = Field(
        default=8, ge=1, le=100, description="pictures, drawn by the seed, of each entity; of all where null"
    )
    layer: int = Field(
        default=3, ge=1, description="of the text-image cross encoder; R2D2 shows the third of six"
    )


def write_attention_maps(
    config: AttentionMapsConfig,
    texts: Sequence[TextField],
    model: RetrievalModel,
    index: ShardIndex,
    job: Job,
    max_pixels: int,
) -> None:
    """Draw the maps into out/pictures and list them in out/attention.json.

    texts: the gallery's fields. Every process computes them, so that all meet an error alike; rank 0 writes.
    Reads each record of the split once where `entities` are given; holds the chosen ones alone.

    Raises ValueError that names the field for what the model or the gallery cannot give.
    """
    writes = distributed.rank() == 0
    if writes:
        (job.out / "pictures").mkdir(parents=True, exist_ok=True)
    maps = []
    try:
        chosen = _chosen(config, texts, index, job.seed)
        with job.progress.task("attention maps", len(chosen)) as task:
            for entity, i in chosen:
                shares = attention_map(
                    model.method,
                    model.tokenizer,
                    plain_pixels(index, i, model.transform, max_pixels),
                    entity,
                    layer=config.layer,
                    max_length=model.max_length,
                    device=model.device,
                )
                if writes:
                    maps.append(_written(job.out, index, i, entity, shares, config.layer, max_pixels))
                task.advance()
    except ValueError as error:
        raise ValueError(f"attention_maps: {error}") from error
    if writes:
        path = job.out / "attention.json"
        temporary = path.with_name(f"{path.name}.tmp")
        content = {"gallery": config.gallery, "maps": maps}
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)


def _chosen(
    config: AttentionMapsConfig, texts: Sequence[TextField], index: ShardIndex, seed: int
) -> list[tuple[str, int]]:
    """Entities and samples by their place in the index: the `count` samples of the smallest hashes."""
    if config.entities is None:
        drawn = heapq.nsmallest(
            config.count, range(len(index)), key=lambda i: stable_hash(seed, "attention", index.keys[i])
        )
        return [(_shortest(texts, index, i), i) for i in sorted(drawn)]
    found = _containing(config.entities, config.count, texts, index, seed)
    for entity, samples in found.items():
        if not samples:
            raise ValueError(
                f"entities: '{entity}' stands in no {' and no '.join(texts)} of the gallery "
                f"'{config.gallery}'; give one that does, or a gallery with other texts"
            )
    return [(entity, i) for entity, samples in found.items() for i in samples]


def _containing(
    entities: Sequence[str], count: int, texts: Sequence[TextField], index: ShardIndex, seed: int
) -> dict[str, list[int]]:
    """Of each entity the samples with a text that has it, as a word list would find it; at most `count`."""
    patterns = {entity: re.compile(str(listed_pattern((entity,)))) for entity in entities}
    heaps: dict[str, list[tuple[int, int]]] = {entity: [] for entity in patterns}
    for i in range(len(index)):
        own = list(_texts(texts, index.record(i)))
        for entity, pattern in patterns.items():
            if any(pattern.search(text) for text in own):
                heap = heaps[entity]
                heapq.heappush(heap, (-stable_hash(seed, "attention", entity, index.keys[i]), i))
                if len(heap) > count:
                    heapq.heappop(heap)
    return {entity: sorted(i for _, i in heap) for entity, heap in heaps.items()}


def _shortest(texts: Sequence[TextField], index: ShardIndex, i: int) -> str:
    found = min(_texts(texts, index.record(i)), key=lambda text: (len(text), text), default=None)
    if found is None:
        raise ValueError(f"{index.where(i)} has no {' and no '.join(texts)}: there is no entity to ask for")
    return found


def _texts(texts: Sequence[TextField], record: dict[str, Any]) -> Iterator[str]:
    return (text for field in texts for text in texts_of(record, field))


def _written(
    out: Path,
    index: ShardIndex,
    i: int,
    entity: str,
    shares: Float32[np.ndarray, "side side"],
    layer: int,
    max_pixels: int,
) -> dict[str, Any]:
    """The entry of attention.json; its picture and its map are written."""
    key = index.keys[i]
    picture = _sized(open_picture(index.image_bytes(i), max_pixels=max_pixels, name=f"key {key}"))
    paths = {}
    for role, image in (("picture", picture), ("map", overlay(picture, shares))):
        # keys and entities are anybody's: their hash is a safe file name
        name = hashlib.sha256(json.dumps(["attention", role, key, entity]).encode()).hexdigest()[:20]
        image.save(out / "pictures" / f"{name}.webp", "WEBP", quality=80)
        paths[role] = f"pictures/{name}.webp"
    row, column = np.unravel_index(int(shares.argmax()), shares.shape)
    return {
        "key": key,
        "title": index.record(i).get("title") or "",
        "entity": entity,
        "layer": layer,
        "side": len(shares),
        "peak": {"row": int(row), "column": int(column), "share": round(float(shares.max()), 6)},
        **paths,
    }


def _sized(picture: Image.Image) -> Image.Image:
    scale = PICTURE_PX / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def overlay(picture: Image.Image, shares: Float32[np.ndarray, "side side"]) -> Image.Image:
    """A picture in grey with the colours of a map over it, the least share dark, the most bright.

    The model sees the picture squeezed to a square, so the map is stretched to the picture's own shape.
    """
    from matplotlib import colormaps  # a plan or a submission that reads the config need not wait for it

    span = float(shares.max() - shares.min())
    values = (shares - shares.min()) / (span or 1.0)
    smooth = Image.fromarray(values.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    colours = Image.fromarray(colormaps[COLOURS](np.asarray(smooth), bytes=True)[..., :3].copy())
    grey = picture.convert("L").point(lambda value: round(value * GREY))
    return Image.blend(grey.convert("RGB"), colours, HEAT)
