"""Put a trained run into the package as the model that ships: half precision, with its scores on its card.

gobelin train --preset nano --out runs/nano
gobelin evaluate runs/nano --json runs/nano/scores.json
python scripts/ship.py runs/nano
"""

import shutil
import sys
from pathlib import Path

import torch

from gobelin.clip import ImageEncoder
from gobelin.formats.files import read_json, write_text
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.training.run import IMAGE_ENCODER


def ship(run: Path) -> None:
    """Replace the shipped model by a run's result."""
    scores = read_json(run / "scores.json")
    pipeline = Pipeline.from_pretrained(run)
    image_encoder = ImageEncoder.from_pretrained(run / IMAGE_ENCODER)
    target = shipped_model()
    shutil.rmtree(target, ignore_errors=True)
    pipeline.save_pretrained(target, torch.float16)
    image_encoder.save_pretrained(target / IMAGE_ENCODER, torch.float16)
    card = (run / "README.md").read_text(encoding="utf-8")
    write_text(target / "README.md", f"{card}\n## Scores\n\n{score_table(scores)}")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")


def score_table(scores: dict) -> str:
    """The scores of ``gobelin evaluate --json`` as Markdown."""
    lines = [
        "| task | split | correct | colour right | shape right | exact scene | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*scores["scores"], *scores["shuffled"]]:
        shares = [row[name] for name in ("correct", "colour", "shape", "exact")]
        cells = [f"{s['value']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in shares]
        lines.append(f"| {row['task']} | {row['split']} | {' | '.join(cells)} | {shares[0]['n']} |")
    instruments = scores["instruments"]
    lines += [
        "",
        f"The grader finds the exact scene in {instruments['renders']['value']:.1%} of true renders and in "
        f"{instruments['round_trips']['value']:.1%} of VAE round trips ({instruments['psnr']:.1f} dB). "
        "95 % intervals; `shuffled` is chance: the same pictures judged by each other's prompts.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
