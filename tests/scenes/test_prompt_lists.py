from collections import Counter
from functools import cache

import pytest

from gobelin.errors import UsageError
from gobelin.scenes import CORE, EXTRA_TASKS, NANO, PROMPT_SPLITS, RICH, TASKS, WORLDS, Prompt, World, prompts, tasks
from gobelin.scenes.relations import RELATIONS
from gobelin.scenes.world import COUNTS

LISTS = [
    (world, task, split)
    for world in WORLDS.values()
    for split in PROMPT_SPLITS
    for task in tasks(world, split, TASKS + EXTRA_TASKS)
]
IDS = [f"{world.name}-{task}-{split}" for world, task, split in LISTS]


@cache
def listed(world: World, task: str, split: str) -> list[Prompt]:
    return prompts(world, task, split)


def held_out(prompt: Prompt, world: World) -> bool:
    return world.holds_out(prompt.objects, *([prompt.relation] if prompt.relation else []))


def test_tasks_are_those_that_a_world_can_be_asked_for():
    assert tasks(CORE) == tasks(CORE, "test") == TASKS
    assert tasks(CORE, "heldout") == ("counting", "colours", "position", "attribute_binding")
    assert tasks(CORE, "heldout", EXTRA_TASKS) == ("five",)
    assert tasks(CORE, "dev", EXTRA_TASKS) == ()
    assert tasks(RICH) == TASKS
    assert tasks(RICH, "dev", EXTRA_TASKS) == ("textures", "sizes", "inside")
    assert tasks(RICH, "heldout", EXTRA_TASKS) == EXTRA_TASKS
    assert tasks(NANO) == ("single_object", "two_objects", "colours", "position", "attribute_binding")
    assert tasks(NANO, "heldout") == ("colours", "position", "attribute_binding")


@pytest.mark.parametrize(("world", "task", "split"), LISTS, ids=IDS)
def test_prompts_say_what_they_ask_for(world: World, task, split, read):
    found = listed(world, task, split)
    assert len(found) == 100
    assert len({prompt.text for prompt in found}) > 95
    assert found[:20] == prompts(world, task, split, 20)
    for prompt in found:
        assert prompt.task == task
        assert read(prompt.text) == (prompt.objects, prompt.relation, prompt.count)
        assert held_out(prompt, world) == (split == "heldout")


@pytest.mark.parametrize(("world", "task", "split"), LISTS, ids=IDS)
def test_each_task_asks_in_its_own_way(world: World, task, split):
    for prompt in listed(world, task, split):
        shapes, colours, textures, sizes = zip(*((*one, None, None)[:4] for one in prompt.objects), strict=True)
        assert (prompt.relation is not None) == (task in ("position", "inside"))
        assert {texture is None for texture in textures} == {task != "textures"}
        assert {size is None for size in sizes} == {task != "sizes"}
        assert (prompt.count is not None) == (task in ("counting", "five"))
        assert None not in shapes
        assert {colour is None for colour in colours} == {task in ("single_object", "two_objects")}
        if prompt.count:
            assert len(shapes) == prompt.count
            assert len(set(prompt.objects)) == 1
            assert prompt.count == 5 if task == "five" else prompt.count in COUNTS
        else:
            assert len(shapes) == (1 if task in ("single_object", "colours", "textures", "sizes") else 2)
        if task == "inside":
            assert prompt.relation in ("inside", "around")
            assert shapes[prompt.relation == "inside"] == "ring" != shapes[prompt.relation == "around"]
        if task in ("two_objects", "attribute_binding"):
            assert len(set(shapes)) == 2
        if task == "attribute_binding":
            assert len(set(colours)) == 2


@pytest.mark.parametrize("task", TASKS)
def test_splits_differ(world: World, task):
    if task in tasks(world):
        dev, test = ({prompt.text for prompt in listed(world, task, split)} for split in ("dev", "test"))
        assert len(dev & test) < 40


@pytest.mark.parametrize(("world", "task", "split"), LISTS, ids=IDS)
def test_prompts_are_balanced(world: World, task, split):
    found = listed(world, task, split)
    asked = Counter(thing[:2] for prompt in found for thing in set(prompt.objects))
    if task in ("textures", "sizes"):
        said = Counter(prompt.objects[0][2:] for prompt in found)
        assert len(said) == (len(world.textures) if task == "textures" else len(world.sizes))
        assert max(said.values()) - min(said.values()) <= 2
    if split != "heldout" and task != "inside":
        # At most as often as it is their turn, and once more where the other parts need it.
        assert max(asked.values()) - min(asked.values()) <= 2
        kinds = len(world.shapes) * (1 if task in ("single_object", "two_objects") else len(world.colours))
        assert len(asked) == kinds - (0 if task in ("single_object", "two_objects") else len(world.held_out_pairs))
    if task == "position":
        assert all(15 <= sum(prompt.relation == relation for prompt in found) <= 35 for relation in RELATIONS)
    if task == "counting":
        assert all(30 <= sum(prompt.count == count for prompt in found) <= 37 for count in COUNTS)


def test_held_out_prompts_use_every_held_out_combination(world: World):
    pairs = {pair for prompt in listed(world, "colours", "heldout") for pair in prompt.objects}
    assert pairs == world.held_out_pairs
    if "counting" in tasks(world):
        counted = {(prompt.count, prompt.objects[0][0]) for prompt in listed(world, "counting", "heldout")}
        assert world.held_out_counts <= counted


def test_an_unknown_task_or_split_is_refused(world: World):
    with pytest.raises(UsageError, match="Expected a task of"):
        prompts(world, "poetry")
    with pytest.raises(UsageError, match="a split of"):
        prompts(world, "position", "train")
    with pytest.raises(UsageError, match="Expected a task of"):
        tasks(world, "dev", ("poetry",))


@pytest.mark.parametrize(
    ("world", "task", "split", "message"),
    [
        (NANO, "counting", "dev", "Expected a task that the world nano has in the split dev: single_object, two_obj"),
        (CORE, "two_objects", "heldout", "five; got two_objects, which names nothing that is held out"),
    ],
)
def test_a_task_that_a_world_lacks_is_refused(world, task, split, message):
    with pytest.raises(UsageError, match=message):
        prompts(world, task, split)
