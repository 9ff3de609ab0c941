from collections import Counter

import pytest

from gobelin.errors import UsageError
from gobelin.scenes import World, prompts
from gobelin.scenes.prompts import PROMPT_SPLITS, TASKS
from gobelin.scenes.relations import RELATIONS


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", PROMPT_SPLITS)
def test_prompts_say_what_they_ask_for(world: World, task, split, read):
    found = prompts(world, task, split)
    assert len(found) == 100
    assert found == prompts(world, task, split)
    assert found[:20] == prompts(world, task, split, 20)
    for prompt in found:
        assert prompt.task == task
        assert read(prompt.text) == (prompt.objects, prompt.relation)
        assert len(prompt.objects) == (1 if task == "single_object" else 2)
        assert (prompt.relation is None) == (task != "position")
        relation = [prompt.relation] if prompt.relation else []
        assert world.holds_out(prompt.objects, *relation) == (split == "heldout")


@pytest.mark.parametrize("task", TASKS)
def test_splits_differ(world: World, task):
    dev, test = ({prompt.text for prompt in prompts(world, task, split)} for split in ("dev", "test"))
    assert len(dev) > 95
    assert len(dev & test) < 20


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_prompts_are_balanced(world: World, task, split):
    found = prompts(world, task, split)
    pairs = Counter(pair for prompt in found for pair in prompt.objects)
    assert len(pairs) == len(world.shapes) * len(world.colours) - len(world.held_out_pairs)
    assert max(pairs.values()) - min(pairs.values()) <= 1
    if task == "position":
        assert all(15 <= sum(prompt.relation == relation for prompt in found) <= 35 for relation in RELATIONS)


def test_held_out_prompts_use_every_held_out_combination(world: World):
    pairs = {pair for prompt in prompts(world, "single_object", "heldout") for pair in prompt.objects}
    assert pairs == world.held_out_pairs


def test_an_unknown_task_or_split_is_refused(world: World):
    with pytest.raises(UsageError, match="Expected a task of"):
        prompts(world, "poetry")
    with pytest.raises(UsageError, match="a split of"):
        prompts(world, "position", "train")
