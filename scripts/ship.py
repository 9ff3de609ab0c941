"""Put a trained run into the package as the model that ships: half precision, with how it was made and its scores."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from gobelin.clip import IMAGE_ENCODER, ImageEncoder
from gobelin.evaluate.benchmark import benchmark_report
from gobelin.formats.files import read_json, write_text
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.training.recipes.claim import config_file

NOTES = """## The recipe

```
torchrun --standalone --nproc-per-node 2 -m gobelin train --preset tiny --out runs/tiny
gobelin evaluate scenes runs/tiny --splits test heldout --json runs/tiny/scores.json
python scripts/ship.py runs/tiny
```

The configuration that it was trained with is in `training.json`. The weights are stored in half precision.

## Limits

It knows one world of flat shapes, at 64×64 pixels: seven shapes, ten colours, numbers up to four, four relations, the
four sides of the image, three backgrounds. Words from elsewhere mean nothing to it. What it gets wrong among what it
does know, the scores below say.
"""


def ship(run: Path, note: str = "") -> None:
    """Replace the shipped model by a run's result; ``note`` says on its card what was not as the recipe has it."""
    target = shipped_model()
    scores = {**read_scores(run / "scores.json"), "model": target.name}
    pipeline = Pipeline.from_pretrained(run)
    image_encoder = ImageEncoder.from_pretrained(run / IMAGE_ENCODER)
    card = (run / "README.md").read_text(encoding="utf-8")
    card = "\n".join([card, *([note, ""] if note else []), NOTES, benchmark_report(scores).markdown(level=2)])
    config = config_file(run).read_text(encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target, torch.float16)
    image_encoder.save_pretrained(target / IMAGE_ENCODER, torch.float16)
    write_text(target / "README.md", card)
    write_text(target / "training.json", config)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


def read_scores(file: Path) -> dict[str, Any]:
    """Read what ``gobelin evaluate scenes --json`` wrote; leaves with a sentence where it is not of the test list."""
    scores = read_json(file)
    splits = {row["split"] for row in scores["scores"]}
    if splits != {"test", "heldout"}:
        sys.exit(f"{file} has scores of {', '.join(sorted(splits))}: a card wants --splits test heldout")
    return scores


if __name__ == "__main__":
    ship(Path(sys.argv[1]), " ".join(sys.argv[2:]))
