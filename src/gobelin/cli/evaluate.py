"""``gobelin evaluate``: measure a model's scores, its words' attribution, its edits, or its images beside true ones."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from gobelin.cli import evaluate_options as options
from gobelin.cli.options import parse

_HELP = """usage: gobelin evaluate MEASUREMENT [OPTIONS]

Measure a model: on scenes whose truth is known, or by the distance of its images from true ones.

measurements:
  scenes          generate images of six tasks, and score them without a look at their prompts
  images          score a folder of images that another program generated
  prompts         write the list of prompts and seeds for another program
  attribution     compare the heat map of each word with the object that it speaks of
  editing         change one word, and see whether what it is about changes and nothing else
  patching        give some attention another caption's text, and see whether colour, shape, number or place follow
  erasure         erase a colour or a shape, and see whether it is gone and what else broke
  correspondence  find points of objects again in other scenes by the U-Net's features
  heads           fit which heads of attention point, for sharper maps, and keep their weights beside the model
  presence        tell by a score whether what a word names is in an image
  emoji           paint captions of emoji, and tell by networks that saw true ones alone whether they are right
  fidelity        compare images painted from captions with the true ones: FID, KID, CLIP score

  gobelin evaluate MEASUREMENT --help   options and examples

examples:
  gobelin evaluate scenes
  gobelin evaluate scenes runs/mine --limit 25 --json scores.json --report scores.md --sheet sheet.png
  gobelin evaluate prompts --world core --out elsewhere
  gobelin evaluate images elsewhere
  gobelin evaluate attribution --limit 64
  gobelin evaluate editing --limit 50
  gobelin evaluate patching --limit 30
  gobelin evaluate correspondence --limit 32
  gobelin evaluate heads runs/mine --save
  gobelin evaluate presence --limit 64
  gobelin evaluate emoji emoji-set --model runs/emoji --sheet sheet.png
  gobelin evaluate fidelity my-images --model runs/mine --features model
"""

# The options of each measurement, and the module that has its function, ``evaluate_scenes`` and the like.
_MEASUREMENTS: dict[str, tuple[type[Any], str]] = {
    "scenes": (options.EvaluateScenes, "evaluate_scenes"),
    "images": (options.EvaluateImages, "evaluate_scenes"),
    "prompts": (options.EvaluatePrompts, "evaluate_scenes"),
    "attribution": (options.EvaluateAttribution, "evaluate_words"),
    "editing": (options.EvaluateEditing, "evaluate_words"),
    "patching": (options.EvaluatePatching, "evaluate_words"),
    "erasure": (options.EvaluateErasure, "evaluate_words"),
    "correspondence": (options.EvaluateCorrespondence, "evaluate_words"),
    "heads": (options.EvaluateHeads, "evaluate_words"),
    "presence": (options.EvaluatePresence, "evaluate_words"),
    "emoji": (options.EvaluateEmoji, "evaluate_emoji"),
    "fidelity": (options.EvaluateFidelity, "evaluate_fidelity"),
}


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin evaluate``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return
    name, *rest = arguments
    if name not in _MEASUREMENTS:
        from gobelin.validation import refuse_unknown  # imported where it is needed: the help has to be quick

        refuse_unknown([name], _MEASUREMENTS, what="measurement")
    options_of, module = _MEASUREMENTS[name]
    given = parse(options_of, f"evaluate {name}", rest)
    measures = import_module(f"gobelin.cli.{module}")  # after the options are read, so that mistakes are quick
    getattr(measures, f"evaluate_{name}")(given)
