"""Put a trained run into the package as a model that ships: half precision, with how it was made and its scores.

    python scripts/ship.py tiny runs/tiny
    python scripts/ship.py emoji runs/emoji --data emoji-set

A run has its scores in scores.json, as ``gobelin evaluate scenes`` (or ``emoji``) ``--json`` wrote them; of emoji the
data set says whose pictures they are.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from gobelin.checkpoint.shipped import SHIPPED_MODELS, shipped_model
from gobelin.clip import IMAGE_ENCODER, ImageEncoder
from gobelin.data.emoji import ABOUT, STYLES
from gobelin.evaluate.benchmark import benchmark_report
from gobelin.evaluate.emoji_scores import emoji_report
from gobelin.evaluate.measurement_report import Report
from gobelin.formats.files import read_json, write_text
from gobelin.pipeline import Pipeline
from gobelin.training.recipes.claim import config_file

METRICS = "metrics.jsonl"
EXAMPLES = (
    *("cat with tears of joy, noto", "four leaf clover, glossy", "rocket, twemoji", "tiger face, flat"),
    *("pizza, blob", "hot beverage, noto"),
)
RECIPE = """## The recipe

```
{commands}
```

The configuration that it was trained with is in `training.json`{log}. The weights are stored in half precision.
"""
SCENES = """torchrun --standalone --nproc-per-node 2 -m gobelin train --preset tiny --out runs/tiny
gobelin evaluate scenes runs/tiny --splits test heldout --json runs/tiny/scores.json
python scripts/ship.py tiny runs/tiny"""
EMOJI = """gobelin data emoji --out emoji-set
torchrun --standalone --nproc-per-node 2 -m gobelin train --preset emoji --out runs/emoji
gobelin evaluate emoji emoji-set --model runs/emoji --json runs/emoji/scores.json
python scripts/ship.py emoji runs/emoji --data emoji-set"""
LIMITS_OF_SCENES = """## Limits

It knows one world of flat shapes, at 64×64 pixels: seven shapes, ten colours, numbers up to four, four relations, the
four sides of the image, three backgrounds. Words from elsewhere mean nothing to it. What it gets wrong among what it
does know, the scores below say.
"""
LIMITS_OF_EMOJI = """## Limits

It knows {concepts:,} emoji by the names and keywords that Unicode CLDR gives them, in {styles} styles, at {size}×{size}
pixels, on white: one emoji in an image. Flags, keycaps, skin tones, couples and other sequences of characters were not
among them. It was shown each picture many times, and what it paints of a caption that it was trained on resembles that
picture; the tables below say how often it is the right concept, and how near it comes to copying.

## Whose pictures it learned from

| style | package | version | licence | author |
|---|---|---|---|---|
{credits}

Names and keywords: Unicode CLDR ({names}, {names_licence}). What it paints follows their drawings: where you publish
it, keep this credit.
"""


def ship(name: str, run: Path, note: str, data: Path | None) -> None:
    """Replace a shipped model by a run's result; ``note`` says on its card what was not as the recipe has it."""
    target = shipped_model(name)
    scores = {**read_scores(run / "scores.json", name), "model": name}
    pipeline = Pipeline.from_pretrained(run)
    if name == "emoji":
        pipeline = Pipeline(dataclasses.replace(pipeline.model, examples=EXAMPLES))
    image_encoder = ImageEncoder.from_pretrained(run / IMAGE_ENCODER)
    log = run / "training" / METRICS
    recipe = RECIPE.format(
        commands=EMOJI if name == "emoji" else SCENES,
        log=f", and how it went in `{METRICS}`" if log.is_file() else "",
    )
    parts = [(run / "README.md").read_text(encoding="utf-8"), *([note, ""] if note else []), recipe]
    parts += [_about_emoji(data, pipeline) if name == "emoji" else LIMITS_OF_SCENES, _report(scores, name).markdown(2)]
    config = config_file(run).read_text(encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target, torch.float16)
    image_encoder.save_pretrained(target / IMAGE_ENCODER, torch.float16)
    write_text(target / "README.md", "\n".join(parts))
    write_text(target / "training.json", config)
    if log.is_file():
        write_text(target / METRICS, log.read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


def read_scores(file: Path, name: str) -> dict[str, Any]:
    """Read a run's scores; leaves with a sentence where they are not those that a card wants."""
    scores = read_json(file)
    if name == "emoji":
        if "judge" not in scores:
            sys.exit(f"{file} has no scores of emoji: write them by gobelin evaluate emoji --json")
        return scores
    splits = {row["split"] for row in scores["scores"]}
    if splits != {"test", "heldout"}:
        sys.exit(f"{file} has scores of {', '.join(sorted(splits))}: a card wants --splits test heldout")
    return scores


def _report(scores: dict[str, Any], name: str) -> Report:
    return emoji_report(scores) if name == "emoji" else benchmark_report(scores)


def _about_emoji(data: Path | None, pipeline: Pipeline) -> str:
    """Write what the model of emoji knows, and whose pictures it learned from."""
    if data is None:
        sys.exit("a model of emoji says whose pictures it learned from: give the data set as --data")
    about = read_json(data / ABOUT)
    packages = about["packages"]
    rows = []
    for style in STYLES.values():
        package = packages[style.package]
        row = (style.word, style.package, package["version"], package["licence"], package["author"])
        rows.append(f"| {' | '.join(row)} |")
    names = next(name for name in packages if name not in {style.package for style in STYLES.values()})
    return LIMITS_OF_EMOJI.format(
        concepts=about["concepts"],
        styles=len(STYLES),
        size=pipeline.unet.config.sample_size * pipeline.vae.config.factor,
        credits="\n".join(rows),
        names=f"{names} {packages[names]['version']}",
        names_licence=packages[names]["licence"],
    )


def main() -> None:
    """Read the command line, and ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHIPPED_MODELS)
    parser.add_argument("run", type=Path)
    parser.add_argument("--note", default="", help="what was not as the recipe has it")
    parser.add_argument("--data", type=Path, help="the data set of emoji")
    options = parser.parse_args()
    ship(options.name, options.run, options.note, options.data)


if __name__ == "__main__":
    main()
