"""docs/scenes.md repeats numbers of the code: its tables are those that the code gives, and so are its sentences."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from gobelin.evaluate import sanity_checks
from gobelin.scenes import CORE, EXTRA_TASKS, NANO, PROMPT_SPLITS, RICH, TASKS, World, calibration, captions, grader
from gobelin.scenes import sampling as scene_sampling
from gobelin.scenes.blobs import BLOBS
from gobelin.scenes.captions import TEMPLATES, TEST_TEMPLATES, pluralised
from gobelin.scenes.prompt_lists import _requests
from gobelin.scenes.textures import TEXTURE_PERIOD

PAGE = (Path(__file__).parents[2] / "docs" / "scenes.md").read_text(encoding="utf-8")
WORLDS = (CORE, RICH, NANO)
Table = list[tuple[str, ...]]


def tables() -> list[Table]:
    """The page's tables, each as its rows without the line of dashes."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def table(first: str, second: str = "") -> Table:
    """The first table whose heading begins with these cells."""
    return next(rows for rows in tables() if rows[0][0] == first and second in ("", rows[0][1]))


def share(value: float) -> str:
    """Write .25 for 0.25, 8 for 8, and a dash for none."""
    return f"{value:g}".lstrip("0") or "–"


def bounds(low_high: tuple[float, float]) -> str:
    return "{:g}–{:g}".format(*low_high)


def names(values: Sequence[str]) -> str:
    return ", ".join(values)


def radius(world: World, value: tuple[float, float], category: str) -> str:
    """The bounds of a radius, where the world has such scenes and its radii are not those of sizes."""
    return bounds(value) if category in world.categories and not world.sizes else "–"


def test_the_table_of_worlds() -> None:
    rows = {
        "shapes": [names(world.shapes) for world in WORLDS],
        "colours": [names(world.colours) for world in WORLDS],
        "categories, and their shares": [
            names([f"{category} {share(weight)}" for category, weight in world.mix]) for world in WORLDS
        ],
        "most objects": [str(world.max_objects) for world in WORLDS],
        "radius of an object alone": [radius(world, world.radius, "single") for world in WORLDS],
        "radius of one of two": [radius(world, world.radius_crowded, "two") for world in WORLDS],
        "radius of one of several alike": [radius(world, world.radius_count, "count") for world in WORLDS],
        "radius by size": [
            names([f"{size} {bounds(value)}" for size, value in world.sizes]) or "–" for world in WORLDS
        ],
        "radius of a ring, and of the object inside it": [
            f"{bounds(world.radius_ring)}, {bounds(world.radius_inside)}" if "inside" in world.categories else "–"
            for world in WORLDS
        ],
        "textures": [names(world.textures) for world in WORLDS],
        "backgrounds": [names(world.backgrounds) for world in WORLDS],
        "gradient of the background, at most (levels)": [share(world.gradient) for world in WORLDS],
        "σ of the noise (white is 1)": [f"{world.noise:g}" for world in WORLDS],
        "captions that leave something out": [share(world.underspecified) for world in WORLDS],
        "of these, captions without any colour": [share(world.colourless) for world in WORLDS],
        "captions that name the background": [share(world.grounded) for world in WORLDS],
        "captions of one or two objects that say their places": [share(world.placed) for world in WORLDS],
    }
    expected = [("", *(world.name for world in WORLDS)), *((name, *cells) for name, cells in rows.items())]
    assert table("", "core") == expected


def test_the_table_of_what_is_held_out() -> None:
    def spelled(world: World) -> tuple[str, str, str]:
        pairs = [(shape, colour) for shape in world.shapes for colour in world.colours]
        triples = [(a, relation, b) for a in world.shapes for b in world.shapes for relation in ("left of", "above")]
        triples += [(shape, "inside", "ring") for shape in world.shapes]
        return (
            names([f"{colour} {shape}" for shape, colour in pairs if (shape, colour) in world.held_out_pairs]),
            names([" ".join(triple) for triple in triples if triple in world.held_out_relations]),
            names([f"{count} {pluralised(shape)}" for count, shape in sorted(world.held_out_counts)]) or "–",
        )

    expected = [
        ("", *(world.name for world in WORLDS)),
        *zip(
            ("colour and shape", "relation", "number and shape"),
            *(spelled(world) for world in WORLDS),
            strict=True,
        ),
    ]
    assert table("held out", "core")[1:] == expected[1:]
    triples = sum(len(world.held_out_relations) for world in WORLDS)
    listed = sum(cell.count(",") + 1 for cell in table("held out", "core")[2][1:])
    assert triples == 2 * listed, "each stands there from one side"


def test_the_table_of_tasks(read) -> None:
    rows = table("task", "for example")[1:]
    assert [row[0].split()[0] for row in rows] == [*TASKS, *EXTRA_TASKS]
    for name, example, _ in rows:
        task = name.split()[0]
        world = RICH if task in EXTRA_TASKS else CORE
        known = set()
        for split in PROMPT_SPLITS:
            known |= {(asked.objects, asked.relation, asked.count) for asked in _requests(world, task, split)}
        assert read(example) in known, example


@pytest.mark.parametrize(
    "sentence",
    [
        f"All images are {CORE.size}×{CORE.size}, with anti-aliased shapes and gaps of {CORE.gap:g} pixels or more",
        f"stripes or dots that repeat every {TEXTURE_PERIOD} pixels",
        f"At least {min(map(len, TEMPLATES.values()))} templates a category, and "
        f"{max(map(len, TEST_TEMPLATES.values()))} more that only",
        f"{share(captions._SYNONYM_RATE)} of the nouns are synonyms",
        f"{share(captions._DIGIT_RATE)} of the numbers are digits",
        f"{share(scene_sampling._SIZE_RATE)} of the sizes and {share(RICH.grounded)} of the backgrounds",
        f"{share(scene_sampling._ASIDE)} of the image's side from its middle",
        f"the offset along one axis is {scene_sampling._CLEAR:g} times that along the other, or more",
        f"differs from the background by {grader._FOREGROUND:g} ΔE or more",
        f"of {grader._LEAST_AREA} pixels or more",
        f"the overlap (IoU) is {share(grader._LEAST_IOU)} or more",
        f"within {share(grader._MOST_STRAY)} pixels of each other on average",
        f"a correlation of {share(grader._LEAST_CORRELATION)} or more",
        f"The gates are {share(sanity_checks._MIN_RENDERS)} for true renders and "
        f"{share(sanity_checks._MIN_ROUND_TRIPS)} for round trips",
    ],
)
def test_numbers_in_sentences(sentence: str) -> None:
    assert sentence in " ".join(PAGE.split())


def test_one_gap_and_one_size_for_all_worlds() -> None:
    assert {(world.gap, world.size) for world in WORLDS} == {(CORE.gap, CORE.size)}
    assert {len(listed) for listed in TEST_TEMPLATES.values()} == {3}


def test_the_table_of_calibration_has_every_category_and_holds_the_gates() -> None:
    heading, *rows = table("world", "scenes")
    blur, noise = f"blur {calibration._BLUR:g} px", f"noise {calibration._NOISE:g}"
    assert heading[2:] == ("true renders", blur, noise, "VAE round trip", "parts swapped")
    assert [row[:2] for row in rows] == [(world.name, category) for world in WORLDS for category in world.categories]
    for row in rows:
        assert float(row[2]) >= sanity_checks._MIN_RENDERS
        assert row[5] == "–" or float(row[5]) >= sanity_checks._MIN_ROUND_TRIPS
        assert row[6] in ("–", "0.000")


def test_the_table_of_ladders_has_every_rung_and_kind_of_blob() -> None:
    rows = [row for row in tables()[-1] if row[0]]
    assert [row[0] for row in rows] == [
        *(f"read exactly, blurred by {sigma:g} px" for sigma in calibration._BLURS),
        *(f"read exactly, with noise {sigma:g}" for sigma in calibration._NOISES),
        *(f"called a shape: {kind}" for kind in BLOBS),
        "right for other captions (in truth)",
        "ms for an image (one core)",
    ]
    for ladder in (rows[: len(calibration._BLURS)], rows[len(calibration._BLURS) :][: len(calibration._NOISES)]):
        for column in (1, 2, 3):
            values = [float(row[column]) for row in ladder]
            assert values == sorted(values, reverse=True)
