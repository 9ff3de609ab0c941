"""Prompt lists: fixed prompts to score a model on, after GenEval's tasks (Ghosh et al. 2023, arXiv 2310.11513)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from zlib import crc32

import numpy as np

from gobelin.errors import UsageError
from gobelin.scenes.captions import phrase, templates
from gobelin.scenes.relations import RELATIONS, Wanted
from gobelin.scenes.world import COUNTS, World

# GenEval's six.
TASKS = ("single_object", "two_objects", "counting", "colours", "position", "attribute_binding")
# Beside them: five objects, one more than training ever shows; and tasks that only some worlds have.
EXTRA_TASKS = ("five", "textures", "sizes", "inside")
PROMPT_SPLITS = ("dev", "test", "heldout")

_TRIES = 20  # to find words that no other prompt of the list has

# Each task's category of captions.
_CATEGORIES = {
    "single_object": "single",
    "two_objects": "two",
    "counting": "count",
    "colours": "single",
    "position": "relation",
    "attribute_binding": "two",
    "five": "count",
    "textures": "single",
    "sizes": "single",
    "inside": "inside",
}


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The contents of a prompt before it is worded; the fields are those of ``Prompt``."""

    objects: tuple[Wanted, ...]
    relation: str | None = None
    count: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt: its text, and the contents that an image of it has to show.

    ``objects`` are (shape, colour) or (shape, colour, texture, size), None being any; ``relation`` is that of the
    first object to the second. With a ``count`` the objects are the same ``count`` times, and the image has to show
    exactly that number.
    """

    text: str
    task: str
    objects: tuple[Wanted, ...]
    relation: str | None = None
    count: int | None = None


def tasks(world: World, split: str = "dev", of: Sequence[str] = TASKS) -> tuple[str, ...]:
    """List the tasks of ``of`` that a world has prompts for in a split.

    A task needs its category in the world's mix and, in the "heldout" split, something that can be held out:
    "a circle" names no combination. Raises UsageError for another task or split.
    """
    return tuple(task for task in of if next(_requests(world, task, split), None))


def prompts(world: World, task: str, split: str = "dev", count: int = 100) -> list[Prompt]:
    """List the first ``count`` prompts of a task, the same each time.

    A task is one of ``TASKS`` or ``EXTRA_TASKS``. A split is "dev", "test" (other prompts, and templates that
    training never saw) or "heldout" (at least one held-out combination a prompt). Shapes or pairs of shape and
    colour, relations, numbers and templates each come up equally often, as far as ``count`` and the held-out
    combinations allow. Raises UsageError for another task or split, and
    for a task that ``tasks`` does not list.
    """
    requests = list(_requests(world, task, split))
    if not requests:
        known = ", ".join(tasks(world, split, TASKS + EXTRA_TASKS))
        raise UsageError(
            f"Expected a task that the world {world.name} has in the split {split}: {known}; got {task}"
            + (", which names nothing that is held out." if split == "heldout" else ".")
        )
    rng = np.random.default_rng(crc32(f"{world.name}/{task}/{split}".encode()))
    wordings = _in_turn(rng, templates(_CATEGORIES[task], split))
    found, texts = [], set()
    for request, template in zip(_balanced(rng, requests, count), wordings, strict=False):
        prompt = _worded(rng, task, request, template)
        for _ in range(_TRIES):
            if prompt.text in texts:
                prompt = _worded(rng, task, request, template)
        found.append(prompt)
        texts.add(prompt.text)
    return found


def _worded(rng: np.random.Generator, task: str, request: _Request, template: str) -> Prompt:
    """Word a request at random."""
    wanted = request.objects[:1] if request.count else request.objects
    said = phrase(rng, wanted, request.relation, template, count=request.count)
    return Prompt(text=said.text, task=task, objects=said.wanted, relation=said.relation, count=said.count)


def _in_turn(rng: np.random.Generator, choices: Sequence[str]) -> Iterator[str]:
    """Yield all choices in random order, then again in another order, without end."""
    while True:
        yield from rng.permutation(choices).tolist()


def _requests(world: World, task: str, split: str) -> Iterator[_Request]:
    """Yield all requests of a task in a split. Raises UsageError for an unknown task or split."""
    if task not in _CATEGORIES or split not in PROMPT_SPLITS:
        known = f"a task of {', '.join(_CATEGORIES)} and a split of {', '.join(PROMPT_SPLITS)}"
        raise UsageError(f"Expected {known}; got {task} and {split}.")
    if _CATEGORIES[task] in world.categories:
        for request in _askable(world, task):
            relation = (request.relation,) if request.relation else ()
            if world.holds_out(request.objects, *relation) == (split == "heldout"):
                yield request


def _askable(world: World, task: str) -> Iterator[_Request]:
    """Yield all requests of a task, held out or not."""
    pairs = list(product(world.shapes, world.colours))
    match task:
        case "single_object":
            yield from (_Request(objects=((shape, None),)) for shape in world.shapes)
        case "two_objects":
            shapes = combinations(world.shapes, 2)
            yield from (_Request(objects=((one, None), (other, None))) for one, other in shapes)
        case "counting" | "five":
            counts = COUNTS if task == "counting" else (COUNTS[-1] + 1,)
            yield from (_Request(objects=(pair,) * count, count=count) for count, pair in product(counts, pairs))
        case "colours":
            yield from (_Request(objects=(pair,)) for pair in pairs)
        case "position":
            asked = product(combinations(pairs, 2), RELATIONS)
            yield from (_Request(objects=objects, relation=relation) for objects, relation in asked)
        case "attribute_binding":
            for one, other in combinations(pairs, 2):
                if one[0] != other[0] and one[1] != other[1]:
                    yield _Request(objects=(one, other))
        case "textures":
            several = world.textures if len(world.textures) > 1 else ()
            yield from (_Request(objects=((*pair, texture, None),)) for pair, texture in product(pairs, several))
        case "sizes":
            yield from (_Request(objects=((*pair, None, size),)) for pair, (size, _) in product(pairs, world.sizes))
        case "inside":
            rings = [("ring", colour) for colour in world.colours]
            for pair, ring in product(pairs, rings):
                if pair[0] != "ring":
                    yield _Request(objects=(pair, ring), relation="inside")


def _parts(request: _Request) -> tuple[object, ...]:
    """Split a request into the parts that are to come up equally often: looks of each object, relation, number."""
    objects = dict.fromkeys(request.objects)
    return (*(one[:2] for one in objects), *(one[2:] for one in objects), request.relation, request.count)


def _balanced(rng: np.random.Generator, requests: list[_Request], count: int) -> Iterator[_Request]:
    """Draw ``count`` requests one after the other, always one whose parts came up least until then."""
    requests = [requests[at] for at in rng.permutation(len(requests))]
    parts = [_parts(request) for request in requests]
    numbers = {part: n for n, part in enumerate(dict.fromkeys(part for row in parts for part in row))}
    rows = np.array([[numbers[part] for part in row] for row in parts])
    used = np.zeros(len(numbers))
    for _ in range(count):
        chosen = int(used[rows].sum(axis=1).argmin())
        used[rows[chosen]] += 1
        yield requests[chosen]
