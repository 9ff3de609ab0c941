"""The failures sheet: for every task a sample of its images and some that failed, with what the grader saw."""

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from gobelin.evaluate.measurement_report import SPLIT_TITLES
from gobelin.evaluate.scored_images import ScoredImage, group_by_task
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.scenes import Detection, Prompt
from gobelin.scenes.captions import pluralised
from gobelin.scenes.grader import UNKNOWN
from gobelin.scenes.relations import found_in, relations

FAILURES_COLUMNS = 8
_SIDE = 132  # pixels: eight in a row on a screen, and a scene of 64 pixels twice as large


def failures_sheet(images: Sequence[ScoredImage], title: str = "") -> Image.Image:
    """Lay out, for each task and split, images spread evenly over its prompts, then a row of more that failed.

    Failures have a red frame, and beneath them what the grader saw.
    """
    rows = [row for (task, split), chosen in group_by_task(images).items() for row in _task_rows(task, split, chosen)]
    return captioned_grid(rows, columns=FAILURES_COLUMNS, side=_SIDE, title=title, gap=20, text=13)


def describe_seen(prompt: Prompt, seen: Sequence[Detection]) -> str:
    """Say in few words what the grader saw: the relation where only that is wrong, else the objects."""
    if prompt.relation and found_in(prompt.objects, None, seen):
        first, second = (next(thing for thing in seen if found_in([one], None, [thing])) for one in prompt.objects)
        place = " and ".join(sorted(relations(first, second))) or "level with neither side of"
        return f"{_thing(first)} {place} {_thing(second)}"
    things = Counter(map(_thing, seen))
    return (
        ", ".join(f"{count} {pluralised(name)}" if count > 1 else name for name, count in things.items()) or "nothing"
    )


def _task_rows(task: str, split: str, images: Sequence[ScoredImage]) -> list[TileRow]:
    """Images spread evenly over a task's prompts, then failures that are not among them, spread evenly too."""
    right = sum(image.score.correct for image in images)
    shown = _spread_evenly(images)
    failures = _spread_evenly([p for p in images if not p.score.correct and not any(p is other for other in shown)])
    counted = f"{SPLIT_TITLES[split]}: {right:,} of {len(images):,} correct"
    rows = [TileRow(heading=task.replace("_", " "), note=counted, tiles=[_tile(image) for image in shown])]
    if failures:
        rows.append(TileRow(note="more that failed", tiles=[_tile(image) for image in failures]))
    return rows


def _spread_evenly(images: Sequence[ScoredImage]) -> list[ScoredImage]:
    """Choose at most a row of images, evenly in the order of their prompts."""
    ordered = sorted(images, key=lambda image: (image.request.number, image.request.repeat))
    count = min(FAILURES_COLUMNS, len(ordered))
    return [ordered[place * len(ordered) // count] for place in range(count)]


def _tile(image: ScoredImage) -> Tile:
    failed = not image.score.correct
    note = f"seen: {describe_seen(image.prompt, image.detections)}" if failed else ""
    return Tile(image=image.image, caption=image.prompt.text, note=note, failed=failed)


def _thing(thing: Detection) -> str:
    return f"{thing.colour} {'blob' if thing.shape == UNKNOWN else thing.shape}"
