"""A made-up training run, whose files look like those of a real one of 15,000 steps."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from gobelin import scenes
from gobelin.data import SceneDataset
from gobelin.training import find_preset

BINS = [[0, 249], [250, 499], [500, 749], [750, 999]]
STEPS = 15_000


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_run(folder: Path, seed: int = 0, upto: int = STEPS) -> Path:
    """Write a run's files: the caption is heard from step 4,000 on, and the training is at step ``upto``."""
    random = np.random.default_rng(seed)
    training = folder / "training"
    training.mkdir(parents=True)
    config = json.loads(json.dumps(_config()))
    (training / "config.json").write_text(json.dumps(config), encoding="utf-8")
    data = {"description": "scenes of the world core, 64×64, seed 7", "count": 64_000, "fingerprint": "1f"}
    (training / "data.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    write_lines(training / "metrics.jsonl", _metrics(random, upto))
    checks = range(1000, upto + 1, 1000)
    validation = [
        {"stage": "unet", "step": step, "split": split, **record(step, split, random)}
        for step in checks
        for split in ("held_out", "training")
    ]
    write_lines(training / "validation.jsonl", validation)
    fall = [(step, 1 / (1 + math.exp((step - 5000) / 1500))) for step in checks]
    attention = [
        {"step": step, "entropy": 5.1 + 2.7 * x, "bos_share": 0.21 + 0.4 * x, "padding_share": 0.1 + 0.15 * (1 - x)}
        for step, x in fall
    ]
    write_lines(training / "attention.jsonl", attention)
    _sheets(training / "samples", [*checks][::2], random)
    return folder


def record(step: int, split: str, random: np.random.Generator) -> dict[str, Any]:
    """Caption losses whose gains grow with the steps, more with more noise, and a little more on training pairs."""
    heard = 1 / (1 + math.exp(-(step - 6000) / 1800)) * (1.25 if split == "training" else 1.0)
    gains = [gain * heard + random.normal(0, 0.003) for gain in (0.004, 0.03, 0.1, 0.19)]
    wrong = [1.15 * gain * heard + random.normal(0, 0.003) for gain in (0.004, 0.03, 0.1, 0.19)]
    base = [level * (1 + 0.6 * math.exp(-step / 2500)) for level in (0.62, 0.31, 0.22, 0.28)]
    right = [level * (1 - gain) for level, gain in zip(base, gains, strict=True)]
    error = [0.001, 0.003, 0.007, 0.011]
    return {
        "bins": BINS,
        "count": 256,
        "right": right,
        "empty": base,
        "wrong": [one / (1 - gain) for one, gain in zip(right, wrong, strict=True)],
        "empty_gain_error": error,
        "wrong_gain_error": [1.1 * one for one in error],
    }


def _config() -> dict[str, Any]:
    preset = find_preset("tiny")
    return asdict(replace(preset, seed=7, sample_every=2000, recommended=replace(preset.recommended, guidance=4.0)))


def _metrics(random: np.random.Generator, upto: int) -> list[dict[str, Any]]:
    preset, lines = find_preset("tiny"), []
    stages = {
        "text_encoder": (preset.text.optim, 9.0, 2.2, {"contrast": 0.3, "sketch": 0.14}),
        "vae": (preset.vae.optim, 1.9, 0.012, {"mse": 0.2, "coarse_mse": 0.1, "l1": 0.5, "kl": 900.0}),
        "unet": (preset.unet.optim, 1.0, 0.31, {}),
    }
    for stage, (optim, first, least, terms) in stages.items():
        for step in range(50, (upto if stage == "unet" else optim.steps) + 1, 50):
            loss = (least + (first - least) * math.exp(-7 * step / optim.steps)) * random.lognormal(0, 0.06)
            line = {"stage": stage, "step": step, "lr": _rate(optim, step)}
            line |= {"samples_per_s": 71 * random.lognormal(0, 0.08), "loss": loss}
            line |= {name: share * loss * random.lognormal(0, 0.1) for name, share in terms.items()}
            line |= {"grad_norm": 0.4 * random.lognormal(0, 0.3), "data_wait": random.beta(2, 60), "memory_mb": 1900.0}
            lines.append(line)
    return lines


def _rate(optim: Any, step: int) -> float:
    """A learning rate that warms up, holds and falls."""
    fall = max(0.0, step / optim.steps - optim.hold) / (1 - optim.hold)
    return optim.learning_rate * min(1.0, step / optim.warmup_steps) * (0.51 + 0.49 * math.cos(math.pi * fall))


def _sheets(folder: Path, steps: list[int], random: np.random.Generator) -> None:
    """Draw scenes that come out of grey mist, step by step, and blots beside them for the words' maps."""
    folder.mkdir(parents=True)
    pairs = SceneDataset(world=scenes.CORE, count=24, seed=3)
    images = np.stack([pairs[number].image for number in range(24)]).astype(np.float32)
    for step in steps:
        clear = 1 / (1 + math.exp((4500 - step) / 1500))
        misty = images * clear + (1 - clear) * (128 + random.normal(0, 24, images.shape))
        tiles = misty.clip(0, 255).astype(np.uint8)
        rows = [np.concatenate(list(tiles[8 * row : 8 * row + 8]), axis=1) for row in range(3)]
        Image.fromarray(np.concatenate(rows)).save(folder / f"unet-{step:06d}.png")
        words = Image.new("RGB", (1500, 270), "#fbfaf7")
        draw = ImageDraw.Draw(words)
        for place in range(6):
            blot = 110 - 70 * clear
            draw.rectangle((20 + 245 * place, 20, 250 + 245 * place, 250), fill="#30123b")
            x, y = 135 + 245 * place + 40 * (place % 3 - 1), 135
            draw.ellipse((x - blot, y - blot, x + blot, y + blot), fill="#f1a13a")
        words.save(folder / f"words-{step:06d}.png")
    for number in range(3):
        for kind, shift in (("sample", 0), ("nearest", number)):
            Image.fromarray(images[number + shift].astype(np.uint8)).save(folder / f"{kind}{number}.png")
    nearest = [
        {
            "sample": f"samples/sample{number}.png",
            "nearest": f"samples/nearest{number}.png",
            "distance": 0.02 + 0.1 * number,
            "median_distance": 0.31,
        }
        for number in range(3)
    ]
    (folder.parent / "nearest.json").write_text(json.dumps(nearest), encoding="utf-8")
    strip = np.concatenate([np.concatenate(list(images[:8]), axis=1)] * 2).astype(np.uint8)
    Image.fromarray(strip).save(folder / "vae-002400.png")
