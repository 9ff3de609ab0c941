"""Folders of images that another program generates: write their list as metadata, and read the images back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gobelin.data import find_world
from gobelin.data.captioned_files import METADATA
from gobelin.data.image_folder import read_image, unreadable
from gobelin.errors import DataError, UsageError
from gobelin.evaluate.image_list import ALL_TASKS, MAX_PROMPTS, RequestedImage
from gobelin.formats.files import write_text
from gobelin.scenes import PROMPT_SPLITS, Prompt, World, prompts, tasks


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """A folder's images, in the size of their world, and the request behind each.

    ``resized`` counts the images that came in another size.
    """

    world: World
    requests: list[RequestedImage]
    images: list[Image.Image]
    resized: int


def write_image_list(folder: Path, requests: Sequence[RequestedImage], world: World, seed: int = 0) -> None:
    """Write the list of images as ``metadata.jsonl``, one line an image: file name, text, task, split and seed.

    ``seed`` is added to every image's own, as :func:`gobelin.evaluate.benchmark.generate_images` does. Raises
    :class:`DataError` for a folder with anything in it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: choose another folder")
    lines = [
        {
            "file_name": each.file_name,
            "text": each.prompt.text,
            "world": world.name,
            "split": each.split,
            "task": each.prompt.task,
            "seed": seed + each.seed,
        }
        for each in requests
    ]
    write_text(folder / METADATA, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_gallery(folder: Path, world: World | None = None) -> Gallery:
    """Read a folder of images and the ``metadata.jsonl`` that names each one's prompt.

    A line needs ``file_name`` and ``text``, the text of a prompt of Gobelin's lists. Where it has ``split`` and
    ``task``, the text has to be in that list. ``world`` None takes the one that the lines name. Raises
    :class:`DataError` for the first line or image that cannot be used.
    """
    entries = _entries(folder / METADATA)
    world = world or _world(entries, folder / METADATA)
    listed = _Lists(world)
    requests, images, resized = [], [], 0
    named: dict[str, int] = {}
    counts: dict[tuple[str, str, int], int] = {}
    for line, entry in entries.items():
        where, name = f"{folder / METADATA}, line {line}", entry["file_name"]
        if entry.get("world", world.name) != world.name:
            raise DataError(f"{where}: generated for the world {entry['world']}, not {world.name}")
        if name in named:
            raise DataError(f"{where}: {name} is named in line {named[name]} already")
        named[name] = line
        split, number, prompt = listed.find(entry, where)
        repeat = counts.get((split, prompt.task, number), 0)
        counts[split, prompt.task, number] = repeat + 1
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{where}: {name} lies outside the folder")
        if reason := unreadable(file):
            raise DataError(f"{file} cannot be scored: {reason}")
        with Image.open(file) as opened:
            width, height = opened.size
        if width != height:
            raise DataError(f"{file} is {width}×{height} pixels: expected a square, best {world.size}×{world.size}")
        resized += width != world.size
        requests.append(RequestedImage(prompt=prompt, split=split, number=number, repeat=repeat))
        images.append(Image.fromarray(read_image(file, world.size)))
    return Gallery(world=world, requests=requests, images=images, resized=resized)


class _Lists:
    """The prompts of a world by their texts, list by list as they are needed."""

    def __init__(self, world: World):
        self._world = world
        self._lists: dict[tuple[str, str], dict[str, tuple[int, Prompt]]] = {}

    def find(self, entry: dict[str, Any], where: str) -> tuple[str, int, Prompt]:
        """Find the (split, number, prompt) of a line, in the first list that has its text."""
        splits, names = [entry.get("split", PROMPT_SPLITS)], [entry.get("task", ALL_TASKS)]
        for split in PROMPT_SPLITS if "split" not in entry else splits:
            for task in ALL_TASKS if "task" not in entry else names:
                if found := self._list(split, task, where).get(entry["text"]):
                    return split, *found
        raise DataError(
            f"{where}: {entry['text']!r} is not a prompt of the world {self._world.name}'s lists, and only theirs can "
            "be scored: gobelin evaluate prompts --out DIR writes them"
        )

    def _list(self, split: str, task: str, where: str) -> dict[str, tuple[int, Prompt]]:
        """List the prompts of a task and split by their texts, with their numbers; empty where the world has none."""
        if (split, task) not in self._lists:
            try:
                there = tasks(self._world, split, (task,))
            except UsageError as error:
                raise DataError(f"{where}: {error}") from error
            listed = prompts(self._world, task, split, MAX_PROMPTS) if there else []
            # the first of equal texts
            self._lists[split, task] = {p.text: (n, p) for n, p in reversed(list(enumerate(listed)))}
        return self._lists[split, task]


def _entries(metadata: Path) -> dict[int, dict[str, Any]]:
    """Read the lines of the metadata by their number, from 1."""
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{metadata} cannot be read: expected the list that gobelin evaluate prompts writes") from error
    entries = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file_name", "text")):
            raise DataError(
                f'{metadata}, line {number}: expected an object like {{"file_name": "a.png", "text": "a red circle"}}'
            )
        entries[number] = entry
    if not entries:
        raise DataError(f"{metadata} is empty: expected a line for each image")
    return entries


def _world(entries: dict[int, dict[str, Any]], metadata: Path) -> World:
    """Find the world that the first line names."""
    first = next(iter(entries.values()))
    if "world" not in first:
        raise DataError(f"{metadata} does not name the world of its prompts: say --world NAME")
    return find_world(str(first["world"]))
