"""``gobelin data``: write scenes as an image folder, check one, encode one for training, calibrate the grader."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gobelin.cli.options import Positional, parse
from gobelin.errors import UsageError

_HELP = """usage: gobelin data scenes --out DIR [--count N --world NAME --seed N --split NAME]
       gobelin data emoji --out DIR [--packages DIR --size N --styles NAME ...]
       gobelin data check PATH [--size N --buckets --fit crop|pad --caption-column NAME --sheet PNG --json FILE]
       gobelin data cache PATH --out DIR [--model MODEL --size N --buckets --flip]
       gobelin data grader [--world NAME --count N --vae MODEL --json FILE]

  scenes   write captioned scenes: PNG images, metadata.jsonl, and for each its scene and masks
  emoji    write emoji of five sets as captioned images, to train on, and pairs of concept and style that are held out
  check    read captioned images, a folder or tars: sizes, captions, duplicates, and what cannot be used, and why
  cache    encode captioned images and their captions by a model, for gobelin train --data.cache DIR
  grader   calibrate the scenes' grader on images whose truth is known

examples:
  gobelin data scenes --out scenes --count 1000
  gobelin data check my-images
  gobelin data cache my-images --model model.safetensors --out cache
  gobelin data grader --world core
"""


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Write captioned scenes as a folder: images, metadata.jsonl, and each image's scene and masks.

    Some examples:
      gobelin data scenes --out scenes --count 1000
    """

    out: Path
    """The folder to write; it must be empty or new."""
    count: int = 1000
    """Number of scenes."""
    world: str = "core"
    """The shapes, colours and captions: core, nano or rich."""
    seed: int = 0
    """Another seed gives other scenes."""
    split: str = "train"
    """train, dev, test or heldout."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """Write emoji as folders of captioned images, from npm's packages: the pictures of five sets, and their names.

    A concept is one character of Unicode; its captions are its name and keywords in English, and the style's word. The
    folder train is to be trained on; a tenth of the pairs of a concept and a style is apart, in heldout. What all of it
    is made of, and whose it is, is in emoji.json. Needs pip install 'gobelin[emoji]', and the packages:
    @iconify-json/noto, noto-v1, twemoji, fluent-emoji-flat and fluent-emoji, and cldr-annotations-full.

    Some examples:
      gobelin data emoji --out emoji-set
      gobelin data emoji --packages elsewhere/node_modules --styles noto twemoji --size 128 --out emoji-set
    """

    out: Path
    """The folder to write; it must be empty or new."""
    packages: Path = Path("node_modules")
    """The folder that npm installed the packages in."""
    size: int = 64
    """Height and width of the images in pixels; their background is transparent."""
    styles: tuple[str, ...] = ()
    """Styles, by their words: noto, blob, twemoji, flat, glossy; without it, all."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read captioned images, a folder or tars: sizes, encodings, captions, duplicates; what is skipped, cropped, cut.

    Some examples:
      gobelin data check my-images
      gobelin data check my-images --size 128 --sheet sheet.png --json report.json
      gobelin data check shards --size 512 --buckets --index shards-index
    """

    folder: Positional[Path]
    """Images with metadata.jsonl, .csv or .parquet, or a .txt caption beside each; or tars of such images."""
    size: int = 64
    """Height and width in pixels that the images are to be trained at."""
    buckets: bool = False
    """Train each image at the nearest of several aspects, with no more pixels than the square."""
    fit: Literal["crop", "pad"] = "crop"
    """Crop what stands over on both sides, or pad what is missing with the background."""
    background: str = "white"
    """The colour behind transparent images and around padded ones."""
    index: Path | None = None
    """A folder that keeps what was found, so that unchanged images are not opened again."""
    caption_column: str | None = None
    """The column of the metadata, or the key of the JSON, with the captions; without it, text, caption or prompt."""
    vocab_size: int = 2048
    """Tokens of the tokenizer that is trained on the captions."""
    max_length: int = 32
    """Tokens of a caption that are learned."""
    sheet: Path | None = None
    """Draw images of the folder, as training sees them, with their captions into this PNG."""
    json: Path | None = None
    """Write the whole report to this file."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Compute what training from a model reads of captioned images: pixels, latents and text embeddings.

    What is in the folder already is not computed again; an interrupted command goes on. Nothing is removed. Training
    finds it where the model, the size and the other settings of the images are the same.

    Some examples:
      gobelin data cache my-images --model model.safetensors --out cache
      gobelin train --preset lora --model model.safetensors --data.path my-images --data.cache cache --out runs/style
    """

    folder: Positional[Path]
    """Images with metadata.jsonl, .csv or .parquet, or a .txt caption beside each; or tars of such images."""
    out: Path
    """The folder of the cache, which several runs and data sets may share."""
    model: str | None = None
    """Diffusers folder, .safetensors file, or Hub name; without it, the model that comes with Gobelin."""
    size: int | None = None
    """Height and width in pixels; without it, the model's own."""
    buckets: bool = False
    """Encode each image at the nearest of several aspects, with no more pixels than the square."""
    fit: Literal["crop", "pad"] = "crop"
    """Crop what stands over on both sides, or pad what is missing with the background."""
    background: str = "white"
    """The colour behind transparent images and around padded ones."""
    flip: bool = False
    """Encode mirrored images too."""
    caption_column: str | None = None
    """The column of the metadata, or the key of the JSON, with the captions; without it, text, caption or prompt."""
    device: str = "auto"
    """Device: auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class Grader:
    """Calibrate the scenes' grader on images whose truth is known.

    True renders, blurred and noisy ones, and round trips through a VAE; blobs; swapped and shuffled prompts.

    Some examples:
      gobelin data grader --world core
      gobelin data grader --world nano --vae runs/mine
    """

    world: str = "core"
    """The shapes, colours and captions: core, nano or rich."""
    count: int = 1000
    """Scenes of each category, and blobs of each kind."""
    vae: Path | None = None
    """A diffusers folder, or one with its VAE alone: each image is also encoded and decoded by it."""
    json: Path | None = None
    """Write the measurements to this file too."""


_ACTIONS = {"scenes": Scenes, "emoji": Emoji, "check": Check, "cache": Cache, "grader": Grader}


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin data``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return
    action, *rest = arguments
    if action not in _ACTIONS:
        raise UsageError(f"unknown action {action!r}: the choices are {', '.join(_ACTIONS)}")
    options = parse(_ACTIONS[action], f"data {action}", rest)
    # PyTorch is imported after the options are read: help and mistakes are quick
    from gobelin.cli.data_actions import (
        calibrate_grader,
        check_images,
        encode_images,
        write_emoji_images,
        write_scenes,
    )

    match options:
        case Scenes():
            write_scenes(options)
        case Emoji():
            write_emoji_images(options)
        case Check():
            check_images(options)
        case Cache():
            encode_images(options)
        case Grader():
            calibrate_grader(options)
