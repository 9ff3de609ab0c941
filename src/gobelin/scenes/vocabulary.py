"""The vocabulary of a world: what its captions can say, by what it is about, and every word of them."""

from gobelin.scenes.captions import (
    ARTICLES,
    GROUNDS,
    NOUNS,
    NUMBERS,
    PLACES,
    TEMPLATES,
    WORDINGS,
    pluralised,
)
from gobelin.scenes.relations import RELATIONS
from gobelin.scenes.world import COUNTS, World


def vocabulary(world: World) -> dict[str, list[str]]:
    """List what captions of training say of objects: names of shapes, colours and so on, each a word or a phrase."""
    relations = [*RELATIONS] * ("relation" in world.categories)
    relations += ["inside", "around"] * ("inside" in world.categories)
    counts = COUNTS if "count" in world.categories else ()
    said = {
        "shapes": [noun for shape in (*world.shapes, None) for noun in NOUNS[shape]],
        "colours": [*world.colours],
        "numbers": [word for count in counts for word in (NUMBERS[count], str(count))],
        "relations": [wording for relation in relations for wording, _ in WORDINGS[relation]],
        "places": [place for side in PLACES if world.placed for place in PLACES[side]],
        "textures": [*world.textures] * (len(world.textures) > 1),
        "sizes": [size for size, _ in world.sizes],
        "backgrounds": [*world.backgrounds] * bool(world.grounded),
    }
    return {kind: phrases for kind, phrases in said.items() if phrases}


def caption_words(world: World) -> frozenset[str]:
    """Collect every word of the captions that a model of this world is trained on, in lower case."""
    said = vocabulary(world)
    texts = [phrase for phrases in said.values() for phrase in phrases]
    texts += [template for category in world.categories for template in TEMPLATES[category]]
    texts += [
        side for relation in WORDINGS for wording, side in WORDINGS[relation] if wording in said.get("relations", [])
    ]
    texts += [pluralised(noun) for noun in said["shapes"] if "count" in world.categories]
    texts += GROUNDS if world.grounded else ()
    words = {word.strip(",") for text in (*texts, *ARTICLES, "an") for word in text.split()}
    return frozenset(word for word in words if not word.startswith("{"))
