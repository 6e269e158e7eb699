"""Fingerprints, the search and the verification, on the demo's drawings and on what is hostile to them."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from data_tools.clean import hash_index
from data_tools.clean.fingerprints import BYTES_PER_PICTURE, Fingerprint, fingerprint, mirrored
from data_tools.clean.near_duplicates import Groups, Pictures, group, matches, verify
from data_tools.clean.same_picture import Limits
from data_tools.pictures import open_picture
from tests.crawl_case import cropped, drawing, drawings, jpeg, opened

CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "saved again at quality 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: jpeg(image.resize((image.width // 2, image.height // 2))),
    "half as large again": lambda image: jpeg(image.resize((image.width * 3 // 2, image.height * 3 // 2))),
    "cropped": lambda image: jpeg(cropped(image)),
    "flipped": lambda image: jpeg(ImageOps.mirror(image)),
    "flipped, cropped, quality 50": lambda image: jpeg(cropped(ImageOps.mirror(image)), 50),
}


def of(images: Sequence[Image.Image]) -> Pictures:
    made: list[Fingerprint] = [fingerprint(image.convert("RGB")) for image in images]
    return Pictures(
        np.stack([one.hashes for one in made]),
        np.stack([one.grey for one in made]),
        np.stack([one.colour for one in made]),
    )


def grouped(pictures: Pictures, **options: bool) -> Groups:
    groups = group(pictures, Limits(), **options)
    assert groups is not None
    return groups


def loaded(data: bytes) -> Image.Image:
    return open_picture(data, max_pixels=10**7, name="picture")


@pytest.fixture(scope="module")
def originals() -> list[Image.Image]:
    return [opened(data) for data in drawings()]


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_and_nothing_else(originals: list[Image.Image], change: str) -> None:
    copies = [loaded(CHANGES[change](image)) for image in originals]
    groups = grouped(of([*originals, *copies]))
    n = len(originals)
    assert (groups.kept[:n] == np.arange(n)).all()  # none of the drawings is another one
    right = groups.kept[n:] == np.arange(n)
    assert (right | (groups.kept[n:] == np.arange(n, 2 * n))).all()
    assert right.mean() >= 0.95
    assert groups.mirrored[n:][right].mean() > 0.3 if "flipped" in change else not groups.mirrored.any()


def test_clocks_that_differ_by_a_hand_and_hearts_of_two_colours_are_two() -> None:
    names = [f"twemoji/1f55{n}.webp" for n in "0123456789ab"] + ["twemoji/1f499.webp", "twemoji/1f49a.webp"]
    groups = grouped(of([drawing(name) for name in names]), with_mirrored=False)
    assert (groups.kept == np.arange(len(names))).all()


def test_left_and_right_are_one_only_where_a_mirror_counts() -> None:
    hands = of([drawing("twemoji/1f448.webp"), drawing("twemoji/1f449.webp")])
    assert grouped(hands, with_mirrored=False).kept.tolist() == [0, 1]
    both = grouped(hands)
    assert (both.kept.tolist(), both.mirrored.tolist()) == ([0, 0], [False, True])


def test_a_mirrored_hash_is_the_hash_of_the_mirror_image(originals: list[Image.Image]) -> None:
    for image in originals[:10]:
        turned = fingerprint(ImageOps.mirror(image)).hashes[0]
        assert int(np.bitwise_count(mirrored(fingerprint(image).hashes[0]) ^ turned)) <= 1


def test_the_size_of_a_fingerprint(originals: list[Image.Image]) -> None:
    one = fingerprint(originals[0])
    assert one.hashes.nbytes + one.grey.nbytes + one.colour.nbytes == BYTES_PER_PICTURE


def test_thousands_of_one_colour_are_left_alone_and_cost_no_square() -> None:
    plain = fingerprint(Image.new("RGB", (100, 100), (240, 240, 240)))
    rest = of([drawing("noto/1f600.webp"), loaded(jpeg(drawing("noto/1f600.webp"), 40))])
    n = 5000
    many = Pictures(
        np.concatenate([np.tile(plain.hashes, (n, 1)), rest.hashes]),
        np.concatenate([np.tile(plain.grey, (n, 1, 1)), rest.grey]),
        np.concatenate([np.tile(plain.colour, (n, 1, 1, 1)), rest.colour]),
    )
    groups = grouped(many)
    assert int(groups.plain.sum()) == n
    assert (groups.kept[:n] == np.arange(n)).all()
    assert groups.kept[n:].tolist() == [n, n]


def test_a_crowd_of_copies_becomes_one_group_and_is_never_compared_with_itself_whole() -> None:
    image = drawing("noto/1f600.webp")
    count = 200
    copies = of([loaded(jpeg(image, quality)) for quality in range(40, 80)])
    crowd = Pictures(
        *(np.concatenate([part] * (count // 40)) for part in (copies.hashes, copies.grey, copies.colour))
    )
    found = hash_index.near_pairs(
        crowd.hashes, None, with_mirrored=False, on_progress=lambda n: None, should_stop=lambda: False
    )
    assert found is not None
    assert len(found) < count * (count - 1) / 2
    assert (grouped(crowd).kept == 0).all()


def test_groups_are_no_chains() -> None:
    """Each is like the next, but the last not like the first: the line between them moves on."""
    images = []
    for step in range(8):
        image = drawing("noto/1f600.webp").resize((128, 128))
        ImageDraw.Draw(image).rectangle((10 + 10 * step, 40, 26 + 10 * step, 90), fill=(20, 20, 160))
        images.append(image)
    pictures = of(images)
    groups = grouped(pictures)
    pairs = np.stack([np.arange(8), groups.kept], 1)
    same = verify(pictures, pictures, pairs, Limits())
    assert len(same.pairs) == 8
    assert groups.kept[7] != 0


def test_strange_shapes_and_modes() -> None:
    shapes = [Image.new("RGB", (4, 1), "red"), Image.new("RGB", (1, 4)), Image.effect_noise((1, 400), 80)]
    shapes += [
        Image.effect_noise((400, 100), 80).convert("RGB"),
        drawing("noto/1f600.webp").resize((400, 100)),
    ]
    groups = grouped(of(shapes))
    assert (groups.kept == np.arange(len(shapes))).all()


def test_the_order_of_rows_changes_no_group(originals: list[Image.Image]) -> None:
    """The same pairs are one, whichever way they are numbered; the first of each is kept."""
    pictures = of([*originals[:30], *(loaded(jpeg(image, 40)) for image in originals[:30])])
    order = np.random.default_rng(3).permutation(60)
    shuffled = Pictures(pictures.hashes[order], pictures.grey[order], pictures.colour[order])

    def sets(groups: Groups, names: np.ndarray) -> set[frozenset[int]]:
        return {frozenset(names[groups.kept == k].tolist()) for k in set(groups.kept.tolist())}

    assert sets(grouped(pictures), np.arange(60)) == sets(grouped(shuffled), order)


def test_matches_find_each_of_a_crowd_of_leaks(originals: list[Image.Image]) -> None:
    held = of(originals[:20])
    leak = of([loaded(jpeg(cropped(originals[3]), 60))])
    crowd = Pictures(*(np.concatenate([part] * 300) for part in (leak.hashes, leak.grey, leak.colour)))
    same = matches(crowd, held, Limits())
    assert same is not None
    assert sorted(same.pairs[:, 0].tolist()) == list(range(300))
    assert set(same.pairs[:, 1].tolist()) == {3}
    bigger = matches(held, leak, Limits())  # and the other way round: what is held out is the crop
    assert bigger is not None
    assert bigger.pairs.tolist() == [[3, 0]]


def test_it_stops_when_asked_to(originals: list[Image.Image]) -> None:
    pictures = of(originals[:4])
    assert group(pictures, Limits(), should_stop=lambda: True) is None
    assert matches(pictures, pictures, Limits(), should_stop=lambda: True) is None


def test_progress_counts_to_what_it_says(originals: list[Image.Image]) -> None:
    pictures, done = of(originals[:4]), list[int]()
    group(pictures, Limits(), with_mirrored=False, on_progress=done.append)
    assert sum(done) == hash_index.steps(within=True, with_mirrored=False)
    done.clear()
    matches(pictures, pictures, Limits(), on_progress=done.append)
    assert sum(done) == hash_index.steps(within=False, with_mirrored=True)
