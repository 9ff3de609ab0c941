import re

from gobelin.scenes import World, hard_negatives
from gobelin.scenes.relations import found_in
from gobelin.scenes.world import COUNTS, SPLITS


def ground(caption: str) -> str | None:
    """The background that a caption names."""
    found = re.search(r"(\w+) background", caption)
    return found[1] if found else None


def test_negatives_are_false_in_one_respect(world: World, read, drawn):
    for split in SPLITS:
        for index, made in enumerate(drawn(world, split, 25)):
            wanted, relation, count = read(made.caption)
            negatives = hard_negatives(made, index)
            assert negatives == hard_negatives(made, index)
            assert made.caption not in negatives
            assert len(set(negatives)) == len(negatives)
            for text in negatives:
                objects, turned, other_count = read(text)
                true = found_in(objects, turned, made.scene.objects, count=other_count)
                assert not true or ground(text) != ground(made.caption)
                if objects == wanted and turned == relation and other_count == count:
                    assert ground(text) not in (None, ground(made.caption), made.scene.background)
                    continue
                assert ground(text) == ground(made.caption)
                if count:
                    assert other_count in COUNTS
                    changed = sum(a != b for a, b in zip(objects[0], wanted[0], strict=True))
                    assert (abs(other_count - count), changed) in [(1, 0), (0, 1)]
                    continue
                changed = sum(x != y for a, b in zip(wanted, objects, strict=True) for x, y in zip(a, b, strict=True))
                swapped = sorted(one[1] or "" for one in wanted) == sorted(one[1] or "" for one in objects)
                assert (relation != turned, changed) in [(True, 0), (False, 1), (False, 2)]
                assert changed < 2 or swapped


def test_negatives_say_nothing_that_is_held_out(world: World, read, drawn):
    for split in ("train", "dev", "test"):
        for index, made in enumerate(drawn(world, split, 60)):
            for text in hard_negatives(made, index):
                objects, relation, _ = read(text)
                assert not world.holds_out(objects, *([relation] if relation else []))


def test_every_kind_of_negative_occurs(world: World, read, drawn):
    kinds = set()
    for made in drawn(world, "train", 80):
        wanted, relation, count = read(made.caption)
        negatives = hard_negatives(made, 0)
        assert negatives
        for text in negatives:
            objects, turned, other_count = read(text)
            if other_count != count:
                kinds.add("count")
            elif ground(text) != ground(made.caption):
                kinds.add("background")
            elif turned != relation:
                kinds.add("relation")
            elif [one[0] for one in objects] != [one[0] for one in wanted]:
                kinds.add("shape")
            elif [one[2:3] for one in objects] != [one[2:3] for one in wanted]:
                kinds.add("texture")
            elif [one[3:] for one in objects] != [one[3:] for one in wanted]:
                kinds.add("size")
            elif len(set(wanted)) == 2 and all(a != b for a, b in zip(objects, wanted, strict=True)):
                kinds.add("swap")
            else:
                kinds.add("colour")
    more = {"core": {"count"}, "nano": set(), "rich": {"count", "background", "texture", "size"}}[world.name]
    assert kinds == {"relation", "shape", "swap", "colour"} | more
