"""The list of pictures to paint: which prompts, how many pictures of each, and each picture's seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

from gobelin.errors import UsageError
from gobelin.scenes import EXTRA_TASKS, PROMPT_SPLITS, TASKS, Prompt, World, prompts, tasks

ALL_TASKS = TASKS + EXTRA_TASKS
MAX_PROMPTS = 1000  # of a task and split


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One picture of the list: the prompt, its ``number`` in its task and split, and which ``picture`` of it."""

    prompt: Prompt
    split: str
    number: int
    picture: int

    @property
    def seed(self) -> int:
        """What the picture's random numbers are drawn with: the same whatever else is painted, and how many."""
        return crc32(f"{self.split}/{self.prompt.task}".encode()) + MAX_PROMPTS * self.picture + self.number

    @property
    def file_name(self) -> str:
        """The picture's name where it lies in a folder."""
        return f"{self.split}-{self.prompt.task}-{self.number:03d}-{self.picture}.png"


def asked_for(
    world: World,
    splits: Sequence[str] = ("dev", "heldout"),
    only: Sequence[str] = ALL_TASKS,
    limit: int = 100,
    count: int = 4,
) -> list[Asked]:
    """``count`` pictures of each of the first ``limit`` prompts of every task that a world has in these splits.

    All first pictures of a task come before all second ones, so that seeds follow one another. Raises
    :class:`UsageError` for unknown names, for numbers that cannot be, and where nothing is left to ask for.
    """
    for kind, chosen, known in (("task", only, ALL_TASKS), ("split", splits, PROMPT_SPLITS)):
        for name in chosen:
            if name not in known:
                raise UsageError(f"unknown {kind} {name!r}: the choices are {', '.join(known)}")
    for name, number, most in (("limit", limit, MAX_PROMPTS), ("count", count, MAX_PROMPTS)):
        if not 1 <= number <= most:
            raise UsageError(f"{name} is {number}: give a number from 1 to {most}")
    rows = [(split, prompts(world, task, split, limit)) for split in splits for task in tasks(world, split, only)]
    asked = [
        Asked(prompt=prompt, split=split, number=number, picture=picture)
        for split, listed in rows
        for picture in range(count)
        for number, prompt in enumerate(listed)
    ]
    if not asked:
        raise UsageError(f"the world {world.name} has no {', '.join(only)} in {', '.join(splits)}: choose other tasks")
    return asked


def batches(asked: Sequence[Asked], most: int) -> Iterator[list[Asked]]:
    """Pictures whose seeds follow one another, at most so many at a time, in parts as even as can be."""
    start = 0
    for end in range(1, len(asked) + 1):
        if end < len(asked) and asked[end].seed == asked[end - 1].seed + 1:
            continue
        run = asked[start:end]
        parts = -(-len(run) // most)
        for part in range(parts):
            yield list(run[part * len(run) // parts : (part + 1) * len(run) // parts])
        start = end
