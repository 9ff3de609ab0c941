"""Measure whether a thing goes into its box: regional attention and box guidance, of its noun or of its whole phrase.

python scripts/benchmarks/regions.py [PROMPTS]     # 20: a quarter of an hour on one core
"""

import argparse
import random
from collections.abc import Callable

from gobelin import Pipeline
from gobelin.control import AnyControl, Region, box_guidance, regional_attention
from gobelin.control.attention_control import Regions
from gobelin.scenes import grade

SHAPES = ("circle", "square", "star", "ring", "cross", "triangle", "diamond")
COLOURS = ("red", "blue", "green", "yellow", "purple", "black")
QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))
SIDE = 64  # pixels of the shipped model's images

WAYS: dict[str, Callable[[Regions, Regions], list[AnyControl]]] = {
    "none": lambda noun, phrase: [],
    "regional attention, noun": lambda noun, phrase: [regional_attention(noun)],
    "box guidance, noun": lambda noun, phrase: [box_guidance(noun)],
    "regional attention, phrase": lambda noun, phrase: [regional_attention(phrase)],
    "box guidance, phrase": lambda noun, phrase: [box_guidance(phrase)],
    "both, phrase": lambda noun, phrase: [regional_attention(phrase), box_guidance(phrase)],
}


def main(count: int) -> None:
    """Paint two things, the second of which has a quarter of the image as its box, in every way."""
    pipe, draw = Pipeline.from_pretrained(), random.Random(5)
    inside, right = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0)
    for number in range(count):
        first, noun = draw.sample(SHAPES, 2)
        colour, other = draw.sample(COLOURS, 2)
        left, top, far, low = draw.choice(QUARTERS)
        box = Region.box(left, top, far, low)
        for way, controls in WAYS.items():
            control = controls({noun: box}, {f"{other} {noun}": box})
            prompt = f"a {colour} {first} and a {other} {noun}"
            found = grade(pipe(prompt, seed=100 + number, control=control).images[0])
            placed = [one for one in found if (one.shape, one.colour) == (noun, other)]
            inside[way] += any(left <= one.x / SIDE <= far and top <= one.y / SIDE <= low for one in placed)
            seen = {(one.shape, one.colour) for one in found}
            right[way] += len(found) == 2 and seen == {(first, colour), (noun, other)}
    print(f"of {count} prompts: the thing is in its box; both things, and nothing else, are there")
    for way in WAYS:
        print(f"{way:28} {inside[way]:3} {right[way]:3}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=20, help="pictures of each kind")
    main(parser.parse_args().count)
