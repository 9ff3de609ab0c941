"""Anyone's pictures: a folder of captioned PNGs that the scene renderer did not make, trained through all stages."""

import dataclasses
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from gobelin.data import ImageFolderDataset
from gobelin.evaluate.sanity_checks import psnr, vae_round_trip
from gobelin.pipeline import Pipeline
from gobelin.training import TrainConfig, find_preset
from gobelin.training.train_model import train

COPIES = 10
Draw = ImageDraw.ImageDraw


def house(draw: Draw, x: int, y: int, size: int) -> None:
    draw.rectangle((x - size, y, x + size, y + size), fill="#b5651d")
    draw.polygon(((x - size - 3, y), (x + size + 3, y), (x, y - size)), fill="#8b0000")
    draw.rectangle((x - 3, y + size // 3, x + 3, y + size), fill="#fff3b0")


def tree(draw: Draw, x: int, y: int, size: int) -> None:
    draw.rectangle((x - 3, y, x + 3, y + size), fill="#5b3a1e")
    for level in range(3):
        top, width = y - size + level * size // 2, size // 2 + level * size // 5
        draw.polygon(((x, top - 4), (x - width, top + size * 2 // 3), (x + width, top + size * 2 // 3)), fill="#146b3a")


def sun(draw: Draw, x: int, y: int, size: int) -> None:
    for ray in range(12):
        angle = ray * math.tau / 12
        draw.line((x, y, x + 1.5 * size * math.cos(angle), y + 1.5 * size * math.sin(angle)), fill="#ffb703", width=3)
    draw.ellipse((x - size * 0.8, y - size * 0.8, x + size * 0.8, y + size * 0.8), fill="#fb8500")


def fish(draw: Draw, x: int, y: int, size: int) -> None:
    draw.ellipse((x - size, y - size // 2, x + size // 2, y + size // 2), fill="#0077b6")
    draw.polygon(((x + size // 3, y), (x + size + 4, y - size // 2), (x + size + 4, y + size // 2)), fill="#00b4d8")
    draw.ellipse((x - size * 2 // 3, y - 4, x - size * 2 // 3 + 4, y), fill="white")


def flower(draw: Draw, x: int, y: int, size: int) -> None:
    draw.line((x, y, x, y + size + 8), fill="#2d6a4f", width=4)
    for petal in range(6):
        angle = petal * math.tau / 6
        u, v = x + size * 0.6 * math.cos(angle), y + size * 0.6 * math.sin(angle)
        draw.ellipse((u - size * 0.45, v - size * 0.45, u + size * 0.45, v + size * 0.45), fill="#d63384")
    draw.ellipse((x - size * 0.35, y - size * 0.35, x + size * 0.35, y + size * 0.35), fill="#ffd60a")


def boat(draw: Draw, x: int, y: int, size: int) -> None:
    draw.polygon(
        ((x - size, y + 4), (x + size, y + 4), (x + size * 2 // 3, y + size), (x - size * 2 // 3, y + size)),
        fill="#6c2bd9",
    )
    draw.polygon(((x, y - size), (x, y), (x + size, y)), fill="#e5e5e5", outline="#444444")
    draw.line((x, y - size, x, y + 4), fill="#222222", width=3)


MOTIFS: dict[str, tuple[Callable[[Draw, int, int, int], None], str]] = {
    "a little house with a red roof": (house, "#cfe8ff"),
    "a fir tree in the snow": (tree, "#f4f9ff"),
    "the sun in a pale sky": (sun, "#e3f2fd"),
    "a blue fish under water": (fish, "#caf0f8"),
    "one pink flower on a lawn": (flower, "#d8f3dc"),
    "a sailing boat at dusk": (boat, "#ffd8be"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixty PNGs with .txt captions, of six motifs at different places, sizes and shades."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = random.Random(0)
    for caption, (draw_motif, background) in MOTIFS.items():
        for copy in range(COPIES):
            image = Image.new("RGB", (160, 128), background)
            small = Image.new("RGB", (64, 64), background)
            draw_motif(ImageDraw.Draw(small), 32 + rng.randint(-5, 5), 32 + rng.randint(-4, 4), rng.randint(15, 19))
            image.paste(small.resize((128, 128), Image.Resampling.LANCZOS), (16, 0))
            stem = f"{draw_motif.__name__}-{copy}"
            image.save(folder / f"{stem}.png")
            (folder / f"{stem}.txt").write_text(caption)
    return folder


def config(folder) -> TrainConfig:
    preset = find_preset("nano")
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, path=str(folder)),
        text=dataclasses.replace(preset.text, optim=dataclasses.replace(preset.text.optim, steps=60, batch_size=60)),
        vae=dataclasses.replace(preset.vae, optim=dataclasses.replace(preset.vae.optim, steps=500)),
        unet=dataclasses.replace(preset.unet, optim=dataclasses.replace(preset.unet.optim, steps=900)),
    )


@pytest.mark.slow
def test_sixty_pictures_of_six_motifs_are_learned(pictures, tmp_path):
    out = train(config(pictures), tmp_path / "model", console=Console(stderr=True))
    pipe = Pipeline.from_pretrained(out)
    dataset = ImageFolderDataset(pictures, 64)
    images = np.stack([dataset[index].image for index in range(len(dataset))])
    captions = [dataset[index].caption for index in range(len(dataset))]

    decoded = np.stack([np.asarray(image) for image in vae_round_trip(pipe.vae, images)])
    quality = psnr(images, decoded)
    print(f"VAE round trip: {quality:.1f} dB")
    assert quality >= 22

    result = pipe(captions, seed=0)
    result.save(tmp_path / "painted")
    own = 0
    for caption, image in zip(captions, result.images, strict=True):
        distances = np.square(images.astype(float) - np.asarray(image, float)).mean(axis=(1, 2, 3))
        nearest = {motif: min(d for d, c in zip(distances, captions, strict=True) if c == motif) for motif in MOTIFS}
        own += min(nearest, key=lambda motif: nearest[motif]) == caption
    print(f"nearest to their own motif: {own} of {len(captions)}")
    assert own >= 0.8 * len(captions)
