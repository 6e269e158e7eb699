"""Pictures that people described: COCO and Flickr30K by Karpathy, Flickr30k-CN and -CNA, COCO-CN, AIC-ICC.

Captions of several sets on the same pictures meet by the picture's URL: give these sources the same `images`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora.json_stream import entries
from data_tools.corpora.source import Dropped, Row, Source, member, names_in, sure_lines
from data_tools.errors import DataError

COCO_LICENCE = "CC-BY-4.0 (COCO's annotations); pictures: their owners' terms at Flickr"
SPLIT_LISTS = ("train", "val", "test")


def karpathy(source: Source) -> Iterator[Row | Dropped]:
    """dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json: images[] of filename, split (train,
    restval, val, test), sentences[].raw, and for COCO filepath (train2014, val2014) and cocoid."""
    path = source.file("annotations")
    for number, image in entries(path, "images"):
        where = f"{path.name}: images[{number}]"
        name = member(image, "filename", str, f"{path}: images[{number}]")
        folder = image.get("filepath") or ""
        url = source.url(f"{folder}/{name}")
        sentences = member(image, "sentences", list, f"{path}: images[{number}]")
        texts = [
            member(sentence, "raw", str, f"{path}: images[{number}].sentences[{place}]").strip()
            for place, sentence in enumerate(sentences)
        ]
        split = member(image, "split", str, f"{path}: images[{number}]")
        licence = COCO_LICENCE if "cocoid" in image else None
        yield from described(url, texts, where, split=split, licence=licence)


def described(
    url: str, texts: list[str], where: str, *, split: str | None = None, licence: str | None = None
) -> Iterator[Row | Dropped]:
    """One row for a picture's captions, and each empty one as dropped."""
    for place, text in enumerate(texts):
        if not text:
            yield Dropped("no_text", f"{where}: caption {place}", url=url)
    captions = tuple(text for text in texts if text)
    if captions:
        yield Row(url, captions=captions, split=split, licence=licence)


def flickr30k_cn(source: Source) -> Iterator[Row | Dropped]:
    """Flickr30k-CN's and Flickr30k-CNA's caption files: `<id>[.jpg][#zhb#<n>]`, a blank or tab, the caption.

    The split is that of the lists of ids that are given (roles train, val, test), else the source's.
    """
    splits = _split_lists(source)
    for path in source.files["captions"]:
        for where, picture, text in _sentences(path):
            yield _in_lists(source, splits, where, picture, source.url(f"{picture}.jpg"), text)


def coco_cn(source: Source) -> Iterator[Row | Dropped]:
    """imageid.human-written-caption.txt and its fellows: `COCO_val2014_000000000042#<n>`, a tab, the caption;
    the lists coco-cn_train.txt, coco-cn_val.txt, coco-cn_test.txt."""
    splits = _split_lists(source)
    for path in source.files["captions"]:
        for where, picture, text in _sentences(path):
            yield _in_lists(source, splits, where, picture, source.url(coco_path(picture, where)), text)


def coco_path(name: str, where: str) -> str:
    """Where COCO's pictures lie by their own names: val2014/COCO_val2014_000000000042.jpg."""
    found = re.fullmatch(r"COCO_([a-z]+\d{4})_\d{12}(?:\.jpg)?", name)
    if not found:
        raise DataError(f"{where}: {name!r} is no name of a COCO picture, as COCO_val2014_000000000042.")
    return f"{found[1]}/{name.removesuffix('.jpg')}.jpg"


def _sentences(path: Path) -> Iterator[tuple[str, str, str]]:
    """Where it stands, the picture's id, and the caption ("" where there is none) of each line."""
    for number, line in sure_lines(path):
        if not line.strip():
            continue
        where = f"{path.name}: line {number}"
        name, text = re.fullmatch(r"(\S*)\s*(.*)", line.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        yield where, name.partition("#")[0].removesuffix(".jpg"), text


def _split_lists(source: Source) -> dict[str, str] | None:
    """The split of each picture's id; None where no list is given. DataError for a picture in two lists."""
    if not any(source.files.get(name) for name in SPLIT_LISTS):
        return None
    splits: dict[str, str] = {}
    for split in SPLIT_LISTS:
        for path in source.files.get(split, ()):
            for name in names_in(path):
                picture = name.partition("#")[0].removesuffix(".jpg")
                if splits.setdefault(picture, split) != split:
                    raise DataError(f"{path}: {picture!r} stands in the list of {splits[picture]} too.")
    return splits


def _in_lists(
    source: Source, splits: dict[str, str] | None, where: str, picture: str, url: str, text: str
) -> Row | Dropped:
    if not picture:
        return Dropped("no_picture", where, text=text)
    if not text:
        return Dropped("no_text", where, url=url)
    if splits is not None and picture not in splits:
        return Dropped("no_split", where, url=url, text=text)
    return Row(url, captions=(text,), split=splits[picture] if splits is not None else source.split)


def aic_icc(source: Source) -> Iterator[Row | Dropped]:
    """caption_train_annotations_20170902.json, caption_validation_annotations_20170910.json: a list of
    image_id (the file's name), url, caption (five). `first: 10000` of the validation file is the usual test
    set."""
    path, limit = source.file("annotations"), source.options.first
    for number, image in entries(path):
        where = f"{path.name}: [{number}]"
        name = member(image, "image_id", str, f"{path}: [{number}]").strip()
        texts = member(image, "caption", list, f"{path}: [{number}]")
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{path}: [{number}]: 'caption' is not a list of texts. Is it the file of this format?"
            )
        if limit is not None and int(number) >= limit:
            yield Dropped("beyond_first", where, url=source.url(name))
        elif not name:
            yield Dropped("no_picture", where)
        else:
            yield from described(source.url(name), [text.strip() for text in texts], where)
