"""The list of pictures: what is on it, its seeds, its batches."""

import pytest

from gobelin import scenes
from gobelin.errors import UsageError
from gobelin.evaluate.image_list import ALL_TASKS, request_batches, requested_images


def test_the_list_has_six_tasks_held_in_and_what_can_be_held_out():
    requests = requested_images(scenes.CORE, limit=3, count=2)
    rows = list(dict.fromkeys((each.split, each.prompt.task) for each in requests))
    assert rows == [
        *(("dev", task) for task in scenes.TASKS),
        *(("heldout", task) for task in ("counting", "colours", "position", "attribute_binding", "five")),
    ]
    assert len(requests) == len(rows) * 3 * 2
    assert {each.prompt.task for each in requested_images(scenes.NANO, limit=1)} == set(scenes.tasks(scenes.NANO))


def test_a_seed_depends_on_the_prompt_and_the_picture_alone():
    few, many = (requested_images(scenes.CORE, limit=limit, count=count) for limit, count in ((5, 1), (9, 3)))
    seeds = {(e.split, e.prompt.task, e.number, e.repeat): e.seed for e in many}
    for each in few:
        assert seeds[each.split, each.prompt.task, each.number, each.repeat] == each.seed
    assert len(set(seeds.values())) == len(many) == len({each.file_name for each in many})


@pytest.mark.parametrize("most", [1, 4, 32])
def test_batches_are_even_in_order_and_have_seeds_that_follow(most):
    requests = requested_images(scenes.CORE, ("dev",), ("position", "counting"), limit=9, count=3)
    parts = list(request_batches(requests, most))
    assert [each for part in parts for each in part] == requests
    for part in parts:
        assert 1 <= len(part) <= most
        assert [each.seed for each in part] == list(range(part[0].seed, part[0].seed + len(part)))
    if most == 4:
        assert [len(part) for part in parts] == [3] * 18, "9 pictures are three times 3, not 4, 4 and 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ("juggling",)}, "unknown task 'juggling': the choices are single_object"),
        ({"splits": ("train",)}, "unknown split 'train': the choices are dev, test, heldout"),
        ({"limit": 0}, "limit is 0: give a number from 1 to 1000"),
        ({"limit": 1001}, "limit is 1001"),
        ({"count": 0}, "count is 0"),
        ({"splits": ("heldout",), "only": ("single_object",)}, "has no single_object in heldout: choose other tasks"),
    ],
)
def test_what_cannot_be_asked_for_is_said(arguments, message):
    with pytest.raises(UsageError, match=message):
        requested_images(scenes.CORE, **arguments)
    assert "five" in ALL_TASKS
