"""One layout for every sheet: each image stands in its place, at its size, with its text."""

import numpy as np
import pytest
from PIL import Image
from tests.look.conftest import holds

from gobelin.look.colour_map import colour_map
from gobelin.look.contact_sheet import LINEN, RED, SHEET_MARGIN, Tile, TileRow, captioned_grid

COLOURS = ("#204060", "#602040", "#406020", "#604020", "#202060", "#206020", "#602020")


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def tiles(count: int, size: tuple[int, int] = (32, 32), **more) -> list[Tile]:
    return [Tile(image=Image.new("RGB", size, colour), **more) for colour in COLOURS[:count]]


def places(sheet: Image.Image, count: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each image."""
    found = []
    for colour in COLOURS[:count]:
        rows, columns = np.nonzero((np.asarray(sheet) == rgb(colour)).all(axis=-1))
        found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return found


@pytest.mark.parametrize("size", [(32, 32), (32, 16), (16, 32)], ids=["square", "wide", "tall"])
def test_images_stand_in_rows_at_their_size(size: tuple[int, int]) -> None:
    sheet = captioned_grid([TileRow(tiles=tiles(7, size))], columns=3, side=64, gap=10)
    found = places(sheet, 7)
    width, height = (2 * side for side in size)
    assert {(right - left, bottom - top) for left, top, right, bottom in found} == {(width, height)}
    lefts = [left for left, *_ in found]
    assert lefts == [SHEET_MARGIN + n % 3 * (width + 10) for n in range(7)]
    tops = [top for _, top, *_ in found]
    assert tops == [SHEET_MARGIN + n // 3 * (height + 10) for n in range(7)]
    assert sheet.size == (2 * SHEET_MARGIN + 3 * width + 20, 2 * SHEET_MARGIN + 3 * height + 20)


def test_text_makes_room_and_never_covers_an_image() -> None:
    plain = captioned_grid([TileRow(tiles=tiles(4))], columns=2, side=64)
    text = {"caption": "a long caption that goes on", "note": "up to 20 %"}
    rows = [TileRow(tiles=tiles(4, **text), label="row", heading="heading", note="beside it")]
    full = captioned_grid(rows, columns=2, side=64, title="a title", headings=("one", "two"), scale=("low", "high"))
    assert {(right - left, bottom - top) for left, top, right, bottom in places(full, 4)} == {(64, 64)}
    assert full.height > plain.height + 100
    for place, other in zip(places(full, 4), places(plain, 4), strict=True):
        assert place[0] > other[0]
        assert place[1] > other[1]
    bar = Image.fromarray(np.repeat(colour_map()[None], 12, axis=0)).resize((128, 12))
    assert holds(full, bar)
    edge = np.asarray(full)[:, -SHEET_MARGIN // 2 :]
    assert (edge == edge[0, 0]).all(), "nothing is cut off at the right"
    assert (np.asarray(full)[-SHEET_MARGIN // 2 :] == edge[0, 0]).all(), "nor below"


def test_failures_alone_are_framed_in_red() -> None:
    good, bad = tiles(2)
    sheet = np.asarray(captioned_grid([TileRow(tiles=[good, Tile(image=bad.image, failed=True)])], columns=2, side=64))
    (left, top, *_), (wrong, *_) = places(Image.fromarray(sheet), 2)
    assert tuple(sheet[top + 5, left - 1]) == rgb(LINEN)
    assert tuple(sheet[top + 5, wrong - 1]) == rgb(RED)
    assert tuple(sheet[top + 5, wrong - 3]) == rgb(RED)
    assert (sheet[:, : left + 64] != rgb(RED)).any(axis=-1).all()


def test_rows_keep_apart_and_labels_stand_at_the_left() -> None:
    rows = [TileRow(tiles=[tile], label="a label") for tile in tiles(3)]
    found = places(captioned_grid(rows, columns=1, side=40, gap=6), 3)
    assert [top for _, top, *_ in found] == [SHEET_MARGIN + n * 46 for n in range(3)]
    assert all(left > SHEET_MARGIN + 30 for left, *_ in found)
    with_headings = [TileRow(tiles=[tile], heading="a heading") for tile in tiles(3)]
    below = places(captioned_grid(with_headings, columns=1, side=40, gap=6), 3)
    assert below[2][1] - below[1][1] > 46 + 20


def test_letters_beyond_latin_one_leave_ink() -> None:
    def ink(caption: str) -> int:
        sheet = np.asarray(
            captioned_grid([TileRow(tiles=[Tile(image=Image.new("RGB", (8, 8)), caption=caption)])], columns=1, side=80)
        )
        return int((sheet[SHEET_MARGIN + 82 :].astype(int).sum(axis=-1) < 400).sum())

    assert ink("") == 0
    assert ink("żółw") > 20
    assert ink("жук") > 20
