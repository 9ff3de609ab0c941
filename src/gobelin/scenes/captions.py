"""Captions: templates and wordings, and the objects that each word speaks of.

A template is text with slots: ``{a}`` and ``{b}`` for objects, ``{rel}`` for "left of" (``a`` seen from
``b``), ``{side}`` for "to its left", ``{n}`` and ``{as}`` for a number of like objects, and ``{ground}`` for the
background.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gobelin.scenes.relations import INVERSE, RELATIONS, Wanted
from gobelin.scenes.world import COUNTS, World

TEMPLATES = {
    "single": (
        "{a}",
        "there is {a}",
        "here is {a}",
        "this is {a}",
        "we see {a}",
        "{a} alone",
        "just {a}",
        "{a} and nothing else",
        "an image of {a}",
        "a picture of {a}",
        "a drawing of {a}",
        "a scene with {a}",
    ),
    "two": (
        "{a} and {b}",
        "{a} with {b}",
        "{a}, {b}",
        "both {a} and {b}",
        "{a} as well as {b}",
        "{a} together with {b}",
        "there is {a} and {b}",
        "here are {a} and {b}",
        "two shapes, {a} and {b}",
        "an image of {a} and {b}",
        "a picture of {a} and {b}",
        "a scene with {a} and {b}",
    ),
    "relation": (
        "{a} {rel} {b}",
        "{a} is {rel} {b}",
        "{rel} {b} is {a}",
        "{rel} {b} there is {a}",
        "there is {a} {rel} {b}",
        "here is {a} {rel} {b}",
        "{b} with {a} {side}",
        "{b} has {a} {side}",
        "{b}, and {a} {side}",
        "an image of {a} {rel} {b}",
        "a picture of {a} {rel} {b}",
        "a scene where {a} is {rel} {b}",
    ),
    "count": (
        "{n} {as}",
        "exactly {n} {as}",
        "there are {n} {as}",
        "here are {n} {as}",
        "these are {n} {as}",
        "we see {n} {as}",
        "just {n} {as}",
        "{n} {as} and nothing else",
        "a group of {n} {as}",
        "an image of {n} {as}",
        "a picture of {n} {as}",
        "a drawing of {n} {as}",
        "a scene with {n} {as}",
    ),
}

TEMPLATES["inside"] = TEMPLATES["relation"]

TEST_TEMPLATES = {
    "single": ("a photo of {a}", "look at {a}", "it shows {a}"),
    "two": ("a photo of {a} and {b}", "{a} accompanied by {b}", "it shows {a} plus {b}"),
    "relation": ("a photo of {a} {rel} {b}", "{a} can be seen {rel} {b}", "{b} and, {side}, {a}"),
    "count": ("a photo of {n} {as}", "look at {n} {as}", "it shows exactly {n} {as}"),
}
TEST_TEMPLATES["inside"] = TEST_TEMPLATES["relation"]

# Ways to name the background of a scene.
GROUNDS = (
    "{scene} on a {ground} background",
    "{scene}, against a {ground} background",
    "on a {ground} background, {scene}",
)

ARTICLES = ("a", "a", "a", "a", "a", "the", "the", "", "", "one")
NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "star": ("star", "pentagram"),
    None: ("shape", "object", "thing"),
}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
# Each relation's wordings of {rel}, and beside them those of {side}.
WORDINGS = {
    "left of": (
        ("left of", "on the left"),
        ("to the left of", "to its left"),
        ("on the left of", "on its left"),
    ),
    "right of": (
        ("right of", "on the right"),
        ("to the right of", "to its right"),
        ("on the right of", "on its right"),
    ),
    "above": (("above", "above it"), ("over", "over it"), ("higher than", "higher up")),
    "below": (("below", "below it"), ("under", "under it"), ("lower than", "lower down")),
    "inside": (("inside", "inside it"), ("in the middle of", "in its middle"), ("within", "within it")),
    "around": (("around", "around it"), ("surrounding", "surrounding it"), ("enclosing", "enclosing it")),
}
# Where in the picture an object is, said right after its name; none of these is a wording of a relation.
PLACES = {
    "left": ("at the left", "on the left side", "in the left half"),
    "right": ("at the right", "on the right side", "in the right half"),
    "top": ("at the top", "near the top", "in the upper half"),
    "bottom": ("at the bottom", "near the bottom", "in the lower half"),
}
_SYNONYM_RATE = 0.1
_DIGIT_RATE = 0.25
_NO_REFERENCE = ("the", "its", "it")
_SIDES = ("left", "right", "top", "bottom", "upper", "lower")


def templates(category: str, split: str) -> tuple[str, ...]:
    """Return the templates that a split may use for "single", "two", "relation", "count" or "inside"."""
    return TEMPLATES[category] + (TEST_TEMPLATES[category] if split in ("test", "heldout") else ())


@dataclass(frozen=True, kw_only=True)
class Mention:
    """One object in a caption, or several that are alike. Looks that the caption leaves out are None.

    ``things`` are the objects' places in the scene; ``noun`` picks the synonym. ``place`` is a wording of ``PLACES``.
    """

    things: tuple[int, ...]
    shape: str | None
    colour: str | None
    article: str
    noun: int
    texture: str | None = None
    size: str | None = None
    place: str = ""

    @property
    def wanted(self) -> Wanted:
        """Shape and colour as the words ask for them, and texture and size where one of them is said."""
        looks = (self.shape, self.colour, self.texture, self.size)
        return looks if self.texture or self.size else looks[:2]

    def words(self, *, plural: bool = False) -> list[tuple[str, tuple[int, ...]]]:
        """List the words of the noun phrase, each with the objects that it speaks of; a plural has no article."""
        nouns = NOUNS[self.shape]
        noun = nouns[self.noun % len(nouns)]
        named = (pluralised(noun) if plural else noun).split()
        naming = [word for word in (self.size, self.texture, self.colour, *named) if word]
        article = "an" if self.article == "a" and naming[0][0] in "aeiou" else self.article
        place = [(word, self.things if word in _SIDES else ()) for word in self.place.split()]
        return [(article, ())] * bool(article and not plural) + [(word, self.things) for word in naming] + place


@dataclass(frozen=True, kw_only=True)
class Phrasing:
    """A caption as structure, from which its wording follows.

    ``mentions`` fill ``{a}`` and ``{b}`` in this order; ``relation`` is that of the first to the second. A caption
    with a ``count`` has one mention, of ``count`` objects, and writes the number as digits or as a word. One that
    names the ``background`` does so as ``ground`` says.
    """

    template: str
    mentions: tuple[Mention, ...]
    relation: str | None = None
    wording: int = 0
    count: int | None = None
    digits: bool = False
    background: str | None = None
    ground: str = "{scene}"

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """The looks that the caption asks for, object by object; None where it does not say."""
        return tuple(mention.wanted for mention in self.mentions) * (self.count or 1)

    def words(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """List the words, a comma with the one before it, each with the objects that it speaks of."""
        words: list[tuple[str, tuple[int, ...]]] = []
        everything = tuple(sorted(thing for mention in self.mentions for thing in mention.things))
        for token in self.ground.replace("{scene}", self.template).split():
            slot = token.rstrip(",")
            if slot in ("{a}", "{b}"):
                words += self.mentions[slot == "{b}"].words()
            elif slot == "{as}":
                words += self.mentions[0].words(plural=True)
            elif slot == "{ground}" and self.background:
                words.append((self.background, ()))
            elif slot == "{n}" and self.count:
                words.append((str(self.count) if self.digits else NUMBERS[self.count], everything))
            elif slot in ("{rel}", "{side}") and self.relation:
                phrase = WORDINGS[self.relation][self.wording][slot == "{side}"]
                words += [(word, () if word in _NO_REFERENCE else everything) for word in phrase.split()]
            else:
                words.append((slot, ()))
            if token != slot:
                words[-1] = (words[-1][0] + ",", words[-1][1])
        return tuple(words)

    @property
    def text(self) -> str:
        """The caption."""
        return " ".join(word for word, _ in self.words())


def phrase(
    rng: np.random.Generator,
    wanted: Sequence[Wanted],
    relation: str | None,
    template: str,
    *,
    count: int | None = None,
    background: str | None = None,
    underspecified: float = 0.0,
    colourless: float = 0.0,
) -> Phrasing:
    """Word a caption of ``wanted`` objects at random, in either order: articles, synonyms, inverse relations.

    ``relation`` is that of the first object to the second. With a ``count`` the caption is about ``count``
    objects like the one that is ``wanted``, and with a ``background`` it names that. With probability
    ``underspecified`` something goes unsaid: all colours in the fraction ``colourless`` of such captions, the
    colour or the shape of one object in the rest.
    """
    draw = rng.random(8).tolist()
    said = list(wanted)
    if draw[0] < underspecified * colourless:
        said = [(shape, None, *more) for shape, _, *more in said]
    elif draw[0] < underspecified:
        unsaid = int(draw[1] * len(said))
        shape, colour, *more = said[unsaid]
        said[unsaid] = (None, colour, *more) if draw[2] < 0.5 else (shape, None, *more)
    mentions = [
        Mention(
            things=tuple(range(count)) if count else (index,),
            shape=shape,
            colour=colour,
            article=ARTICLES[int(draw[3 + index] * len(ARTICLES))],
            noun=_noun(draw[5 + index], shape),
            **dict(zip(("texture", "size"), more, strict=False)),
        )
        for index, (shape, colour, *more) in enumerate(said)
    ]
    if draw[7] < 0.5:
        mentions.reverse()
        relation = INVERSE[relation] if relation else None
    wording = int(rng.integers(3)) if relation else 0
    digits = count is not None and bool(rng.random() < _DIGIT_RATE)
    ground = GROUNDS[int(rng.integers(len(GROUNDS)))] if background else "{scene}"
    return Phrasing(
        template=template,
        mentions=tuple(mentions),
        relation=relation,
        wording=wording,
        count=count,
        digits=digits,
        background=background,
        ground=ground,
    )


def pluralised(noun: str) -> str:
    """Form the plural of a noun of ``NOUNS``."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _noun(draw: float, shape: str | None) -> int:
    """Choose the synonym for a number drawn from [0, 1): the usual name nine times in ten; all alike for "thing"."""
    count = len(NOUNS[shape])
    if shape is None:
        return int(draw * count)
    return 0 if draw >= _SYNONYM_RATE else 1


NOUN_WORDS = frozenset(
    word for nouns in NOUNS.values() for noun in nouns for form in (noun, pluralised(noun)) for word in form.split()
)
"""Every word of a shape's name, in the singular and the plural."""


def world_words(world: World) -> list[str]:
    """List the words that captions of a world may have, in the order of the alphabet."""
    categories = [name for name, _ in world.mix]
    texts = [text for name in categories for text in (*TEMPLATES[name], *TEST_TEMPLATES[name])]
    texts += [*GROUNDS, *world.backgrounds] if world.grounded else []
    texts += [text for places in PLACES.values() for text in places] if world.placed else []
    shapes = (*world.shapes, None) if world.underspecified else world.shapes
    texts += [form for shape in shapes for noun in NOUNS[shape] for form in (noun, pluralised(noun))]
    texts += [*ARTICLES, "an", *world.colours, *(name for name, _ in world.sizes)]
    texts += world.textures if len(world.textures) > 1 else ()
    if "count" in categories:
        texts += [text for number in COUNTS for text in (NUMBERS[number], str(number))]
    said = [*(RELATIONS if "relation" in categories else ()), *(("inside", "around") if "inside" in categories else ())]
    texts += [text for name in said for pair in WORDINGS[name] for text in pair]
    return sorted({word for text in texts for word in re.findall(r"[a-z0-9]+", re.sub(r"\{\w+\}", " ", text))})
