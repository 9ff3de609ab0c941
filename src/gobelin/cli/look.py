"""``gobelin look``: which word painted which pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from gobelin.cli.options import Positional, parse
from gobelin.cli.painting_options import PaintingOptions


@dataclass(frozen=True, kw_only=True)
class Look(PaintingOptions):
    """See which word painted which pixel: of a prompt, of an image that Gobelin painted, or of any captioned image.

    Writes the image, a sheet with the heat map of every word, and an HTML page: point at a word to light up what it
    painted, or at the image to rank the words behind that patch. Heat maps are sharp: cross-attention of the decoder's
    finest level in the second half of the steps, where it agrees with self-attention. With --plain, --per, --sites or
    --animation they are plain averages of cross-attention instead, BOS left out. Words of a negative prompt have maps
    too.

    Some examples:
      gobelin look "a red circle left of a blue square" --seed 3
      gobelin look out/a-red-circle-7.png --words circle "red circle" --per step
      gobelin look photo.jpg --caption "a cat on a chair" --words cat --also dog "a shadow"
      gobelin look "three green rings" --at 20 31 --animation
      gobelin look "a red circle" --sites "up_blocks.*" --json words.json --npz maps.npz
    """

    source: Positional[str]
    """A prompt in quotes; a PNG that Gobelin wrote, which is painted again from its settings; or any image, with
    --caption."""
    caption: str | None = None
    """Text that says what is to be seen in the image: it is not painted again, but noised and predicted."""
    timesteps: tuple[int, ...] = ()
    """With --caption: timesteps, 0 to 999, to which the image is noised; without any, 20."""
    words: tuple[str, ...] = ()
    """Words or phrases to look at; without any, every word. Where the prompt has no such word, bos, eos and padding are
    the tokens around its own."""
    also: tuple[str, ...] = ()
    """Words or phrases that need not be in the prompt: the share of attention that each would take beside it."""
    per: Literal["step", "layer", "head"] | None = None
    """Also write a grid: a row for each word, a column for each step, layer or head."""
    at: tuple[int, int] | None = None
    """Column and row of a pixel: print the words behind it, and write a sheet of the patches it attends to."""
    sites: str | None = None
    """Plain maps of the attention sites that match a pattern, such as "up_blocks.*"."""
    plain: bool = False
    """Plain maps: the mean over all cross-attention and all steps."""
    animation: bool = False
    """Also write an animation over the steps (WebP)."""
    masks: Annotated[float, Interval(ge=0, lt=1)] | None = None
    """Also write a mask of each word, where its map is above this share of its range, such as 0.4: PNGs, and all of
    them in COCO's JSON."""
    json: Path | None = None
    """File for each word's mean and largest value and its place, and the shares of attention on BOS, text, EOS and
    padding."""
    npz: Path | None = None
    """File for the maps as NumPy arrays: "words", "words_to_image" [words, height, width], "image_to_words" [height,
    width, words], "patches_to_patches" [rows, columns, rows, columns] if attn1 was traced, "masks" with --masks; "also"
    with "also_to_image", and "negative" with "negative_to_image"; and each traced site's attention under its name,
    [steps, heads, patches, tokens], or [steps, heads, patches, patches] for attn1."""

    @property
    def sharp(self) -> bool:
        """True for sharp maps: options that show parts of attention show them as they are."""
        return not (self.plain or self.per or self.sites or self.animation)


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = parse(Look, "look", arguments)
    from gobelin.cli.look_at_words import (
        look_at_words,  # PyTorch is imported after the options are read: help and mistakes are quick
    )

    look_at_words(options)
