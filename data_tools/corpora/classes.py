"""Pictures with several classes each: COCO's 80 categories, NUS-WIDE's 81 concepts, MIRFlickr-25K's 24
labels.

A row has the picture's classes, and its tags as one text where they are given.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.corpora.captions import coco_path
from data_tools.corpora.json_stream import entries
from data_tools.corpora.source import Dropped, Row, Source, member, names_in, sure_lines
from data_tools.errors import DataError


def coco_instances(source: Source) -> Iterator[Row | Dropped]:
    """instances_train2014.json, instances_val2014.json: the categories of each picture that has an object.

    Rows have no captions and no split: they join Karpathy's by the URL. Memory grows with the pictures of a
    file.
    """
    for path in source.files["instances"]:
        found = _categories(path)
        for number, image in entries(path, "images"):
            where = f"{path}: images[{number}]"
            url = source.url(coco_path(member(image, "file_name", str, where), where))
            own = found.get(member(image, "id", int, where))
            if own:
                yield Row(url, classes=tuple(sorted(own)))
            else:
                yield Dropped("no_class", f"{path.name}: images[{number}]", url=url)


def _categories(path: Path) -> dict[int, set[str]]:
    """The names of the categories of each picture, by its id."""
    names: dict[int, str] = {}
    for number, one in entries(path, "categories"):
        where = f"{path}: categories[{number}]"
        names[member(one, "id", int, where)] = member(one, "name", str, where)
    found: dict[int, set[str]] = {}
    for number, one in entries(path, "annotations"):
        where = f"{path}: annotations[{number}]"
        category = member(one, "category_id", int, where)
        if category not in names:
            raise DataError(f"{where}: 'category_id' {category} is none of its categories. Fetch it again.")
        found.setdefault(member(one, "image_id", int, where), set()).add(names[category])
    return found


# ------------------------------------------------------------------------------------------------- NUS-WIDE


def nus_wide(source: Source) -> Iterator[Row | Dropped]:
    """ImageList/Imagelist.txt (actor\\0001_2124494179.jpg), Groundtruth/AllLabels/Labels_<concept>.txt (0 or
    1 a line, in the order of the list), NUS_WID_Tags/All_Tags.txt (photo id, then its tags),
    NUS-WIDE-urls.txt.

    Without `urls` a picture's URL is `images` and its path in the list. TrainImagelist.txt with
    TrainTestLabels/Labels_<concept>_Train.txt reads alike; `split` then says what they are.

    `most_frequent: 21` keeps the 21 classes that most pictures have. Memory grows with the pictures
    (270,000).
    """
    pictures = [name.replace("\\", "/") for name in names_in(source.file("pictures"))]
    names, has = _label_files(source.file("labels"), len(pictures), source.file("pictures"))
    kept = _most_frequent(names, has, source.options.most_frequent)
    tags = _tags(source.file("tags")) if source.files.get("tags") else {}
    urls = _urls(source.file("urls")) if source.files.get("urls") else None
    list_name = source.file("pictures").name
    for number, (picture, row) in enumerate(zip(pictures, has, strict=True), 1):
        where = f"{list_name}: line {number}"
        photo = Path(picture).stem.rpartition("_")[2]
        url = source.url(picture) if urls is None else urls.get(photo, "")
        own = tuple(names[place] for place in kept if row[place])
        if not url:
            yield Dropped("no_picture", where, text=picture)
        elif not own:
            yield Dropped("no_class", where, url=url)
        else:
            text = tags.get(photo, "")
            yield Row(url, captions=(text,) if text else (), classes=own)


def _label_files(folder: Path, pictures: int, list_path: Path) -> tuple[list[str], np.ndarray]:
    """The concepts in the order of their names, and a table of pictures × concepts."""
    files = sorted(folder.glob("Labels_*.txt"))
    if not files:
        raise DataError(f"{folder}: no file Labels_<concept>.txt. Check `files.labels` in the recipe.")
    has = np.zeros((pictures, len(files)), dtype=bool)
    for place, path in enumerate(files):
        number = 0
        for number, line in sure_lines(path):
            if line.strip() not in ("0", "1") or number > pictures:
                problem = (
                    f"{line.strip()[:20]!r} is not 0 or 1" if number <= pictures else "one line too many"
                )
                raise DataError(f"{path}: line {number}: {problem}; {list_path} has {pictures} pictures.")
            has[number - 1, place] = line.strip() == "1"
        if number != pictures:
            raise DataError(f"{path}: it has {number} lines, {list_path} has {pictures} pictures.")
    names = [re.sub(r"_(Train|Test)$", "", path.stem.removeprefix("Labels_")) for path in files]
    if len(set(names)) != len(names):
        raise DataError(
            f"{folder}: it holds labels of several lists (_Train and _Test): give a folder of each."
        )
    return names, has


def _most_frequent(names: list[str], has: np.ndarray, count: int | None) -> list[int]:
    """Places of the `count` classes that most pictures have, by name; ties go to the earlier name. None:
    all."""
    frequency = has.sum(axis=0)
    order = sorted(range(len(names)), key=lambda place: (-int(frequency[place]), names[place]))
    return sorted(order[:count])


def _tags(path: Path) -> dict[str, str]:
    """Photo id → its tags, blanks between."""
    tags = {}
    for _, line in sure_lines(path):
        photo, _, words = line.strip().partition(" " if "\t" not in line else "\t")
        tags[photo] = " ".join(words.split())
    return tags


def _urls(path: Path) -> dict[str, str]:
    """Photo id → its URL of medium size, else large, small, original; "" where all are `null`."""
    urls = {}
    for number, line in sure_lines(path):
        fields = line.split()
        if number == 1 or not fields:
            continue  # the header: Photo_file Photo_id url_Large url_Middle url_Small url_Original
        if len(fields) != 6:
            raise DataError(f"{path}: line {number}: {len(fields)} fields, not 6. Is it NUS-WIDE-urls.txt?")
        _, photo, large, middle, small, original = fields
        urls[photo] = next((url for url in (middle, large, small, original) if url != "null"), "")
    return urls


# ------------------------------------------------------------------------------------------------ MIRFlickr


def mirflickr(source: Source) -> Iterator[Row | Dropped]:
    """mirflickr25k_annotations_v080/<label>.txt, numbers of the pictures im<n>.jpg that have the label, and
    meta/tags/tags<n>.txt, a tag a line.

    <label>_r1.txt lists those in which it is prominent: `narrow_classes: true` makes classes `<label>_r1` of
    them (38 in place of 24). Without tags (a folder) a row has classes alone.
    """
    folder = source.file("labels")
    files = [path for path in sorted(folder.glob("*.txt")) if path.stem.lower() != "readme"]
    if not source.options.narrow_classes:
        files = [path for path in files if not path.stem.endswith("_r1")]
    if not files:
        raise DataError(f"{folder}: no file <label>.txt. Check `files.labels` in the recipe.")
    classes: dict[int, list[str]] = {}
    for path in files:
        for number, line in sure_lines(path):
            if line.strip():
                classes.setdefault(_number(path, number, line.strip()), []).append(path.stem)
    tags = source.file("tags") if source.files.get("tags") else None
    numbers = set(classes) | (_tagged(tags) if tags else set())
    for picture in sorted(numbers):
        url = source.url(f"im{picture}.jpg")
        if picture not in classes:
            yield Dropped("no_class", f"tags{picture}.txt", url=url)
            continue
        text = " ".join(_tags_of(tags / f"tags{picture}.txt")) if tags else ""
        yield Row(url, captions=(text,) if text else (), classes=tuple(classes[picture]))


def _number(path: Path, line: int, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise DataError(f"{path}: line {line}: {text[:20]!r} is no number of a picture.")
    return int(text)


def _tagged(folder: Path) -> set[int]:
    found = (re.fullmatch(r"tags(\d+)\.txt", path.name) for path in folder.iterdir())
    return {int(match[1]) for match in found if match}


def _tags_of(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(
            f"{path}: missing, though a label names its picture. Check `files.tags` in the recipe."
        )
    return names_in(path)
