from gobelin.scenes import World, hard_negatives, sample
from gobelin.scenes.relations import found_in
from gobelin.scenes.world import COUNTS, SPLITS


def test_negatives_are_false_in_one_respect(world: World, read):
    for split in SPLITS:
        for index in range(60):
            made = sample(4, index, world, split)
            wanted, relation, count = read(made.caption)
            negatives = hard_negatives(made, index)
            assert made.caption not in negatives
            assert len(set(negatives)) == len(negatives)
            for text in negatives:
                objects, turned, other_count = read(text)
                assert not found_in(objects, turned, made.scene.objects, count=other_count)
                if count:
                    assert other_count in COUNTS
                    changed = sum(a != b for a, b in zip(objects[0], wanted[0], strict=True))
                    assert (abs(other_count - count), changed) in [(1, 0), (0, 1)]
                    continue
                changed = sum(x != y for a, b in zip(wanted, objects, strict=True) for x, y in zip(a, b, strict=True))
                swapped = sorted(colour or "" for _, colour in wanted) == sorted(colour or "" for _, colour in objects)
                assert (relation != turned, changed) in [(True, 0), (False, 1), (False, 2)]
                assert changed < 2 or swapped


def test_negatives_say_nothing_that_is_held_out(world: World, read):
    for split in ("train", "dev", "test"):
        for index in range(100):
            for text in hard_negatives(sample(6, index, world, split), index):
                objects, relation, _ = read(text)
                assert not world.holds_out(objects, *([relation] if relation else []))


def test_every_kind_of_negative_occurs(world: World, read):
    kinds = set()
    for index in range(100):
        made = sample(4, index, world)
        wanted, relation, count = read(made.caption)
        assert hard_negatives(made, 0)
        assert hard_negatives(made, 0) == hard_negatives(made, 0)
        for text in hard_negatives(made, 0):
            objects, turned, other_count = read(text)
            if other_count != count:
                kinds.add("count")
            elif turned != relation:
                kinds.add("relation")
            elif [shape for shape, _ in objects] != [shape for shape, _ in wanted]:
                kinds.add("shape")
            elif len(set(wanted)) == 2 and all(a != b for a, b in zip(objects, wanted, strict=True)):
                kinds.add("swap")
            else:
                kinds.add("colour")
    assert kinds == {"relation", "shape", "swap", "colour"} | ({"count"} if "count" in world.categories else set())
