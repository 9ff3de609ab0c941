"""The contact sheet: for every task some pictures as they came and some that failed, with what the grader saw."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from gobelin.evaluate.report import SPLIT_TITLES
from gobelin.evaluate.scored_images import ScoredImage, group_by_task
from gobelin.look.drawing import INK, LINEN, PALE, PAPER, RED, font, wrapped
from gobelin.scenes import Detection, Prompt
from gobelin.scenes.captions import pluralised
from gobelin.scenes.grader import UNKNOWN
from gobelin.scenes.relations import found_in, relations

COLUMNS = 8
CELL = 132  # pixels, a picture's side
GAP, MARGIN, FRAME = 20, 36, 4
LINE = 15  # pixels, a line of what is written beneath a picture
LINES = 3  # at most, of a prompt and of what was seen


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What stands above a row, and its pictures, each with the lines of its prompt and of what was seen."""

    heading: str
    more: str
    cells: list[tuple[ScoredImage, list[str], list[str]]]

    @property
    def height(self) -> int:
        """In pixels."""
        lines = max(len(prompt) + len(seen) for _, prompt, seen in self.cells)
        return _above(self) + CELL + 8 + LINE * lines + 12


def contact_sheet(pictures: Sequence[ScoredImage], title: str = "") -> Image.Image:
    """For each task and split a row of pictures spread evenly over its prompts, then a row of more that failed.

    Failures are framed in red, and beneath them stands what the grader saw.
    """
    rows = [row for (task, split), chosen in group_by_task(pictures).items() for row in _rows(task, split, chosen)]
    top = MARGIN + (44 if title else 0)
    size = (2 * MARGIN + COLUMNS * CELL + (COLUMNS - 1) * GAP, top + sum(row.height for row in rows) + MARGIN // 2)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), title, fill=INK, font=font(26))
    y = top
    for row in rows:
        draw.text((MARGIN, y + 6), row.heading, fill=INK, font=font(18))
        beside = MARGIN + (draw.textlength(row.heading, font(18)) + 12 if row.heading else 0)
        draw.text((beside, y + 8 if row.heading else y), row.more, fill=PALE, font=font(15 if row.heading else 13))
        for column, (picture, prompt, seen) in enumerate(row.cells):
            x, below = MARGIN + column * (CELL + GAP), y + _above(row)
            edge, colour = (FRAME, RED) if seen else (1, LINEN)
            draw.rectangle((x - edge, below - edge, x + CELL + edge - 1, below + CELL + edge - 1), fill=colour)
            sheet.paste(picture.image.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, below))
            for number, line in enumerate([*prompt, *seen]):
                fill = INK if number < len(prompt) else RED
                draw.text((x, below + CELL + 8 + number * LINE), line, fill=fill, font=font(12))
        y += row.height
    return sheet


def what_was_seen(prompt: Prompt, seen: Sequence[Detection]) -> str:
    """What the grader saw, in few words: the place where only that is wrong, else the things."""
    if prompt.relation and found_in(prompt.objects, None, seen):
        first, second = (next(thing for thing in seen if found_in([one], None, [thing])) for one in prompt.objects)
        place = " and ".join(sorted(relations(first, second))) or "level with neither side of"
        return f"{_name(first)} {place} {_name(second)}"
    things = Counter(map(_name, seen))
    return (
        ", ".join(f"{count} {pluralised(name)}" if count > 1 else name for name, count in things.items()) or "nothing"
    )


def _rows(task: str, split: str, pictures: Sequence[ScoredImage]) -> list[_Row]:
    """Pictures spread evenly over a task's prompts, then failures that are not among them, spread evenly too."""
    right = sum(picture.score.correct for picture in pictures)
    shown = _spread(pictures)
    failures = _spread([p for p in pictures if not p.score.correct and not any(p is other for other in shown)])
    counted = f"{SPLIT_TITLES[split]}: {right:,} of {len(pictures):,} correct"
    rows = [_Row(heading=task.replace("_", " "), more=counted, cells=[_cell(picture) for picture in shown])]
    if failures:
        rows.append(_Row(heading="", more="more that failed", cells=[_cell(picture) for picture in failures]))
    return rows


def _spread(pictures: Sequence[ScoredImage]) -> list[ScoredImage]:
    """At most a row of pictures, evenly chosen, from as many prompts as there are."""
    ordered = sorted(pictures, key=lambda picture: (picture.request.number, picture.request.repeat))
    count = min(COLUMNS, len(ordered))
    return [ordered[place * len(ordered) // count] for place in range(count)]


def _cell(picture: ScoredImage) -> tuple[ScoredImage, list[str], list[str]]:
    seen = [] if picture.score.correct else _wrapped(f"seen: {what_was_seen(picture.prompt, picture.detections)}")
    return picture, _wrapped(picture.prompt.text), seen


def _wrapped(text: str) -> list[str]:
    """Text in lines as wide as a picture."""
    return wrapped(text, CELL + GAP // 2, 12, LINES)


def _above(row: _Row) -> int:
    """Pixels between the top of a row and its pictures."""
    return 40 if row.heading else 24


def _name(thing: Detection) -> str:
    return f"{thing.colour} {'blob' if thing.shape == UNKNOWN else thing.shape}"
