"""Monitoring of a U-Net while it trains: samples beside true images, word maps, and whether it hears the caption."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from gobelin.data.cached_dataset import CachedDataset
from gobelin.data.encoded import LatentCache
from gobelin.formats.files import write_json
from gobelin.images import tensor_to_images
from gobelin.look.contact_sheet import Tile, TileRow, captioned_grid
from gobelin.look.heatmaps import HeatMaps
from gobelin.painting import Result
from gobelin.pipeline import Pipeline
from gobelin.training.caption_validation import CaptionLosses, caption_losses, wrong_captions
from gobelin.training.config import Precision
from gobelin.training.losses import UNetLoss
from gobelin.training.run_folder import Run

VALIDATION, ATTENTION, NEAREST = "validation.jsonl", "attention.jsonl", "nearest.json"
_SIDES, _COLUMNS = (128, 256), 8  # the fewest and most pixels of an image in a sheet, and images of a row
_TRACED = 3  # prompts whose words are mapped
_WORDS = 6  # of a prompt
_COMPARED = 20_000  # training images that samples are compared with, at most
_COMPARED_TOGETHER = 256
_PAINTED_TOGETHER = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidationPairs:
    """Images and captions that the loss is measured on: scaled latents, each with its caption and a wrong one."""

    latents: Float[Tensor, "pairs channels h w"]
    right: list[str]
    wrong: list[str]

    @classmethod
    def of(cls, dataset: CachedDataset, latents: LatentCache, scaling_factor: float, count: int) -> "ValidationPairs":
        """Take ``count`` images of one bucket, spread over the dataset.

        Raises :class:`DataError` where no two captions differ.
        """
        largest = int(np.bincount(dataset.bucket_index).argmax())
        rows = np.flatnonzero(dataset.bucket_index == largest)
        rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
        captions = [dataset.captions(int(row))[0] for row in rows]
        pairs = wrong_captions(captions)
        means, _ = latents.read(torch.from_numpy(rows[[own for own, _ in pairs]]))
        return cls(
            latents=means * scaling_factor,
            right=[captions[own] for own, _ in pairs],
            wrong=[captions[other] for _, other in pairs],
        )


@dataclass(frozen=True, kw_only=True)
class UNetMonitor:
    """Measure and draw a U-Net in training: called with the loss's module and the step, it returns the sample sheet.

    ``write`` writes the model as it stands, so that it can be used while it trains, and returns its pipeline.
    ``prompts`` are sampled with their own seeds, beside the ``truths`` that are known; ``pairs`` are measured by split
    ("held_out", "training"), encoded by ``texts``.
    """

    write: Callable[[UNetLoss, int], Pipeline]
    prompts: Sequence[str]
    truths: Sequence[Image.Image | None]
    pairs: dict[str, ValidationPairs]
    texts: Callable[[UNetLoss, list[str]], Float[Tensor, "texts length dim"]]
    scaling_factor: float
    last_step: int
    training: tuple[CachedDataset, LatentCache]
    precision: Precision = "float32"
    settings: Callable[[range], dict[str, Any]] = lambda part: {}
    """Further settings of the samples of these prompts: an image and a mask for a U-Net that inpaints."""

    def __call__(self, module: UNetLoss, step: int, run: Run) -> Image.Image | None:
        """Write the model, measure it, and draw it."""
        pipeline = self.write(module, step)
        self._validate(module, step, run)
        if not self.prompts:
            return None
        results = self._paint(pipeline)
        images = [image for result in results for image in result.images]
        traced = [heatmaps for result in results for heatmaps in result.traced or []]
        if traced:
            self._record_attention(traced, step, run)
        if step == self.last_step:
            self._find_nearest(images, torch.cat([result.latents for result in results]), run)
        return self._sheet(images, step)

    def _paint(self, pipeline: Pipeline) -> list[Result]:
        """Sample every prompt, each with a seed of its own; the first are traced."""
        results = []
        starts = [0, *range(_TRACED, len(self.prompts), _PAINTED_TOGETHER)]
        for start, end in pairwise([*starts, len(self.prompts)]):
            prompts, part = list(self.prompts[start:end]), range(start, end)
            results.append(pipeline(prompts, seed=list(part), trace=start == 0, **self.settings(part)))
        return results

    def _validate(self, module: UNetLoss, step: int, run: Run) -> None:
        """Measure the loss with the right caption, a wrong one and none."""
        for split, pairs in self.pairs.items():
            right, wrong, empty = (
                self.texts(module, captions) for captions in (pairs.right, pairs.wrong, [""] * len(pairs.right))
            )
            losses: CaptionLosses = caption_losses(
                module.unet,
                module.schedule,
                pairs.latents,
                right.cpu(),
                wrong.cpu(),
                empty.cpu(),
                seed=run.seed,
                device=run.device,
                precision=self.precision,
            )
            run.log("unet", {"step": step, "split": split, **losses.as_record()}, VALIDATION)

    def _record_attention(self, traced: Sequence[HeatMaps], step: int, run: Run) -> None:
        """Record the entropy of attention and the share of BOS and padding, and draw the words' maps."""
        shares = [heatmaps.shares() for heatmaps in traced]
        mean = {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}
        entropy = sum(heatmaps.entropy() for heatmaps in traced) / len(traced) / float(np.log(2))
        values = {"entropy": entropy, "bos_share": mean["bos"], "padding_share": mean["padding"]}
        run.log("unet", {"step": step, **values}, ATTENTION)
        rows, side = [], _shown_side(traced[0].image)
        for heatmaps in traced:
            maps = [heatmaps[number] for number in range(min(len(heatmaps.words), _WORDS))]
            overlays = [Tile(image=one.overlay(side), caption=one.label) for one in maps]
            rows.append(TileRow(tiles=[Tile(image=_enlarged(heatmaps.image)), *overlays], note=heatmaps.words.text))
        sheet = captioned_grid(rows, columns=1 + _WORDS, side=side, title=f"Words and their patches, step {step:,}")
        run.save_sheet("words", step, sheet)

    def _find_nearest(self, images: Sequence[Image.Image], latents: Tensor, run: Run) -> None:
        """Find the training image nearest to each sample, by its latents, to tell copies from images of their own."""
        dataset, _ = self.training
        bucket = [place for place, size in enumerate(dataset.sizes) if size == images[0].size[::-1]]
        rows = np.flatnonzero(dataset.bucket_index == bucket[0])[:_COMPARED] if bucket else []
        if not len(rows):
            return
        own = latents.float().cpu()
        parts = [torch.from_numpy(part) for part in np.array_split(rows, -(-len(rows) // _COMPARED_TOGETHER))]
        distances = torch.cat([self._distances(own, part) for part in parts], dim=1)
        folder, records = run.folder / "samples" / "nearest", []
        folder.mkdir(parents=True, exist_ok=True)
        for number, (image, distance) in enumerate(zip(images, distances, strict=True)):
            sample, nearest = (folder / f"{kind}-{number:02d}.png" for kind in ("sample", "training"))
            image.save(sample)
            tensor_to_images(dataset.images([int(rows[int(distance.argmin())])]))[0].save(nearest)
            records.append(
                {
                    "sample": sample.relative_to(run.folder).as_posix(),
                    "nearest": nearest.relative_to(run.folder).as_posix(),
                    "distance": float(distance.min()),
                    "median_distance": float(distance.median()),
                }
            )
        write_json(run.folder / NEAREST, records)

    def _distances(
        self, latents: Float[Tensor, "samples channels h w"], rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "samples rows"]:
        """Measure the root mean square distance of latents from those of training images, and of mirrored ones."""
        cache = self.training[1]
        means = [cache.read(rows, torch.full((len(rows),), side))[0] for side in (False, True)[: 1 + cache.flip]]
        squares = [(self.scaling_factor * mean[None] - latents[:, None]).square() for mean in means]
        return torch.stack([square.mean(dim=(2, 3, 4)).sqrt() for square in squares]).amin(dim=0)

    def _sheet(self, images: Sequence[Image.Image], step: int) -> Image.Image:
        """Lay out samples in rows, with the true image of each caption beneath where one is known."""
        rows, side = [], _shown_side(images[0])
        for start in range(0, len(images), _COLUMNS):
            part = range(start, min(start + _COLUMNS, len(images)))
            rows.append(TileRow(tiles=[Tile(image=_enlarged(images[at]), caption=self.prompts[at]) for at in part]))
            truths = [self.truths[at] for at in part]
            if any(truths):
                blank = Image.new("RGB", (side, side), "white")
                rows.append(TileRow(tiles=[Tile(image=_enlarged(one or blank), note="true image") for one in truths]))
        return captioned_grid(rows, columns=_COLUMNS, side=side, title=f"Step {step:,}")


def _shown_side(image: Image.Image) -> int:
    """Choose the longer side of images in a sheet: small ones are enlarged, those of Stable Diffusion halved."""
    return min(max(_SIDES[0], max(image.size)), _SIDES[1])


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarge small images without smoothing, so that pixels are seen as they are."""
    factor = max(1, _SIDES[0] // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
