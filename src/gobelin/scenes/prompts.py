"""Fixed lists of prompts to score a model on, after GenEval's tasks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from zlib import crc32

import numpy as np

from gobelin.errors import UsageError
from gobelin.scenes.captions import phrase, templates
from gobelin.scenes.relations import RELATIONS, Wanted
from gobelin.scenes.world import World

# Each task's category of captions.
TASKS = {"single_object": "single", "two_objects": "two", "position": "relation"}
PROMPT_SPLITS = ("dev", "test", "heldout")

_Request = tuple[tuple[tuple[str, str], ...], str | None]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text, and what an image of it has to show.

    ``objects`` are (shape, colour), None being any; ``relation`` is that of the first object to the second.
    """

    text: str
    task: str
    objects: tuple[Wanted, ...]
    relation: str | None = None


def prompts(world: World, task: str, split: str = "dev", count: int = 100) -> list[Prompt]:
    """The first ``count`` prompts of a task, the same each time.

    A task is "single_object", "two_objects" or "position". A split is "dev", "test" (other prompts, and
    templates that training never saw) or "heldout" (at least one held-out combination a prompt). Pairs of
    shape and colour, relations and templates all come up equally often, as far as ``count`` and the held-out
    combinations allow. Raises UsageError for another task or split.
    """
    if task not in TASKS or split not in PROMPT_SPLITS:
        known = f"a task of {', '.join(TASKS)} and a split of {', '.join(PROMPT_SPLITS)}"
        raise UsageError(f"Expected {known}; got {task} and {split}.")
    rng = np.random.default_rng(crc32(f"{world.name}/{task}/{split}".encode()))
    choices = templates(TASKS[task], split)
    found = []
    for number, (objects, relation) in enumerate(_balanced(rng, list(_requests(world, task, split)), count)):
        phrasing = phrase(rng, objects, relation, choices[(number + number // len(choices)) % len(choices)])
        found.append(Prompt(text=phrasing.text, task=task, objects=phrasing.wanted, relation=phrasing.relation))
    return found


def _requests(world: World, task: str, split: str) -> Iterator[_Request]:
    """All that a task can ask for in a split."""
    pairs = list(product(world.shapes, world.colours))
    groups = combinations(pairs, 1 if task == "single_object" else 2)
    for objects, relation in product(groups, RELATIONS if task == "position" else (None,)):
        if world.holds_out(objects, *([relation] if relation else [])) == (split == "heldout"):
            yield objects, relation


def _balanced(rng: np.random.Generator, requests: list[_Request], count: int) -> Iterator[_Request]:
    """Draw requests one after the other, always one whose pairs and relation came up least so far."""
    requests = [requests[at] for at in rng.permutation(len(requests))]
    parts = [(*objects, relation) for objects, relation in requests]
    numbers = {part: n for n, part in enumerate(dict.fromkeys(part for row in parts for part in row))}
    rows = np.array([[numbers[part] for part in row] for row in parts])
    used = np.zeros(len(numbers))
    for _ in range(count):
        chosen = int(used[rows].sum(axis=1).argmin())
        used[rows[chosen]] += 1
        yield requests[chosen]
