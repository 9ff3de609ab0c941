"""The failures sheet: for every task a sample of its images and some that failed, with what the grader saw."""

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from gobelin.evaluate.benchmark import Painted, by_task
from gobelin.evaluate.report import SPLITS
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.scenes import Prompt, Seen
from gobelin.scenes.captions import pluralised
from gobelin.scenes.grader import UNKNOWN
from gobelin.scenes.relations import found_in, relations

FAILURES_COLUMNS = 8
_SIDE = 132  # pixels: eight in a row on a screen, and a scene of 64 pixels twice as large


def failures_sheet(pictures: Sequence[Painted], title: str = "") -> Image.Image:
    """Lay out, for each task and split, images spread evenly over its prompts, then a row of more that failed.

    Failures have a red frame, and beneath them what the grader saw.
    """
    rows = [row for (task, split), chosen in by_task(pictures).items() for row in _task_rows(task, split, chosen)]
    return captioned_grid(rows, columns=FAILURES_COLUMNS, side=_SIDE, title=title, gap=20, text=13)


def describe_seen(prompt: Prompt, seen: Sequence[Seen]) -> str:
    """Say in few words what the grader saw: the relation where only that is wrong, else the objects."""
    if prompt.relation and found_in(prompt.objects, None, seen):
        first, second = (next(thing for thing in seen if found_in([one], None, [thing])) for one in prompt.objects)
        place = " and ".join(sorted(relations(first, second))) or "level with neither side of"
        return f"{_thing(first)} {place} {_thing(second)}"
    things = Counter(map(_thing, seen))
    return (
        ", ".join(f"{count} {pluralised(name)}" if count > 1 else name for name, count in things.items()) or "nothing"
    )


def _task_rows(task: str, split: str, pictures: Sequence[Painted]) -> list[TileRow]:
    """Images spread evenly over a task's prompts, then failures that are not among them, spread evenly too."""
    right = sum(picture.verdict.correct for picture in pictures)
    shown = _spread_evenly(pictures)
    failures = _spread_evenly([p for p in pictures if not p.verdict.correct and not any(p is other for other in shown)])
    counted = f"{SPLITS.get(split, split)}: {right:,} of {len(pictures):,} correct"
    rows = [TileRow(heading=task.replace("_", " "), note=counted, tiles=[_tile(picture) for picture in shown])]
    if failures:
        rows.append(TileRow(note="more that failed", tiles=[_tile(picture) for picture in failures]))
    return rows


def _spread_evenly(pictures: Sequence[Painted]) -> list[Painted]:
    """Choose at most a row of images, evenly in the order of their prompts."""
    ordered = sorted(pictures, key=lambda picture: (picture.asked.number, picture.asked.picture))
    count = min(FAILURES_COLUMNS, len(ordered))
    return [ordered[place * len(ordered) // count] for place in range(count)]


def _tile(picture: Painted) -> Tile:
    failed = not picture.verdict.correct
    note = f"seen: {describe_seen(picture.prompt, picture.seen)}" if failed else ""
    return Tile(image=picture.image, caption=picture.prompt.text, note=note, failed=failed)


def _thing(thing: Seen) -> str:
    return f"{thing.colour} {'blob' if thing.shape == UNKNOWN else thing.shape}"
