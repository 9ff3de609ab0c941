"""The list of images to generate: prompts, the number of images for each, and every image's seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

from gobelin.errors import UsageError
from gobelin.scenes import EXTRA_TASKS, PROMPT_SPLITS, TASKS, Prompt, World, prompts, tasks

ALL_TASKS = TASKS + EXTRA_TASKS
MAX_PROMPTS = 1000  # of a task and split


@dataclass(frozen=True, kw_only=True)
class RequestedImage:
    """One image of the list: ``number`` counts the prompts of its task and split, ``repeat`` the images of a prompt."""

    prompt: Prompt
    split: str
    number: int
    repeat: int

    @property
    def seed(self) -> int:
        """The seed of the image's random numbers, whatever else is on the list."""
        return crc32(f"{self.split}/{self.prompt.task}".encode()) + MAX_PROMPTS * self.repeat + self.number

    @property
    def file_name(self) -> str:
        """The name of the image's file in a folder."""
        return f"{self.split}-{self.prompt.task}-{self.number:03d}-{self.repeat}.png"


def requested_images(
    world: World,
    splits: Sequence[str] = ("dev", "heldout"),
    only: Sequence[str] = ALL_TASKS,
    limit: int = 100,
    count: int = 4,
) -> list[RequestedImage]:
    """List ``count`` images for each of the first ``limit`` prompts of every task that a world has in these splits.

    All first images of a task come before all second ones, so that seeds follow one another. Raises
    :class:`UsageError` for unknown names, for numbers out of range, and where no task is left.
    """
    for kind, chosen, known in (("task", only, ALL_TASKS), ("split", splits, PROMPT_SPLITS)):
        for name in chosen:
            if name not in known:
                raise UsageError(f"unknown {kind} {name!r}: the choices are {', '.join(known)}")
    for name, number, most in (("limit", limit, MAX_PROMPTS), ("count", count, MAX_PROMPTS)):
        if not 1 <= number <= most:
            raise UsageError(f"{name} is {number}: give a number from 1 to {most}")
    rows = [(split, prompts(world, task, split, limit)) for split in splits for task in tasks(world, split, only)]
    requests = [
        RequestedImage(prompt=prompt, split=split, number=number, repeat=repeat)
        for split, listed in rows
        for repeat in range(count)
        for number, prompt in enumerate(listed)
    ]
    if not requests:
        raise UsageError(f"the world {world.name} has no {', '.join(only)} in {', '.join(splits)}: choose other tasks")
    return requests


def request_batches(requests: Sequence[RequestedImage], most: int) -> Iterator[list[RequestedImage]]:
    """Split the list into batches of at most ``most`` images whose seeds follow one another, as even as can be."""
    start = 0
    for end in range(1, len(requests) + 1):
        if end < len(requests) and requests[end].seed == requests[end - 1].seed + 1:
            continue
        run = requests[start:end]
        parts = -(-len(run) // most)
        for part in range(parts):
            yield list(run[part * len(run) // parts : (part + 1) * len(run) // parts])
        start = end
