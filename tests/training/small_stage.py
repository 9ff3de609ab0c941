"""Two blocks of a U-Net on made-up latents, in float64: sums in another order agree to twelve digits."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gobelin.clip import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from gobelin.data.batches import Order, normals
from gobelin.layers import ResnetBlock2D
from gobelin.tokenizer import Tokenizer
from gobelin.training import distributed, trainer
from gobelin.training.config import OptimConfig
from gobelin.training.losses import TextBatch, TextLoss
from gobelin.training.presets import find_preset
from gobelin.training.run_folder import Run
from gobelin.unet import BasicTransformerBlock, Conditioning
from gobelin.unet_config import UNetConfig

STEPS = 3


@dataclass(frozen=True)
class Samples:
    latents: Tensor
    noise: Tensor
    texts: Tensor

    def to(self, device):
        return self


class SmallLoss(nn.Module):
    """A residual block and a transformer block between two convolutions: the units that FSDP gathers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = UNetConfig.nano()
        self.enter, self.leave = nn.Conv2d(4, 16, 1), nn.Conv2d(32, 4, 1)
        self.resnet = ResnetBlock2D(16, 32, groups=4, eps=1e-5)
        self.transformer = BasicTransformerBlock(32, replace(config, cross_attention_dim=16))
        self.double()

    def forward(self, batch):
        hidden = self.resnet(self.enter(batch.latents + batch.noise))
        conditioning = Conditioning(hidden.new_zeros(len(hidden), 1), batch.texts)
        hidden = hidden + self.transformer(hidden.flatten(2).mT, conditioning).mT.view_as(hidden)
        return {"loss": (self.leave(hidden) - batch.noise).square().mean(dim=(1, 2, 3)).mean()}


def text_gradients(rows: slice) -> dict[str, Tensor]:
    """The losses and gradients of the text stage, on some rows of a batch with made-up images: means over processes.

    Of its captions two are one, and not every row has a hard negative.
    """
    captions = ["a ring", "a red star", "a ring", "two blue stars", "a cross", "a red ring"]
    hard = {0: "a star", 3: "two blue rings", 4: "a ring", 5: "a blue ring"}
    tokenizer = Tokenizer.train(captions, vocab_size=530, max_length=8)
    torch.manual_seed(0)
    images = torch.rand(len(captions), 3, 64, 64) * 2 - 1
    text = TextEncoder(TextEncoderConfig.of(32, layers=1, heads=2, vocab_size=530, max_position_embeddings=8)).init_()
    image = ImageEncoder(ImageEncoderConfig(text_width=32, projection_dim=16, block_out_channels=(16, 16, 16)))
    module = TextLoss(text, image, find_preset("nano").text)
    mine = list(range(len(captions)))[rows]
    texts = [*(captions[row] for row in mine), *(hard[row] for row in mine if row in hard)]
    losses = module(TextBatch(images=images[mine], token_ids=tokenizer(texts)))
    losses["loss"].backward()
    found = {**losses, **{name: value.grad for name, value in module.named_parameters() if value.grad is not None}}
    found = {name: value.detach().clone() for name, value in found.items()}
    distributed.all_reduce_mean_(found.values())
    return found


class Interrupted(Exception):
    pass


class SmallStage:
    """Eight samples a step; ``until`` is the step at which a run is interrupted."""

    name, is_divisible = "small", True
    lr_ratios: ClassVar[dict[str, float]] = {}

    def __init__(self, optimizer="adamw", accumulate=1, until=None):
        self.optim = OptimConfig(
            steps=STEPS,
            batch_size=8,
            accumulate=accumulate,
            optimizer=optimizer,
            learning_rate=1e-3,
            warmup_steps=2,
            weight_decay=0.01,
            ema=0.5,
            precision="float32",
        )
        self.module = SmallLoss()
        self.until = until
        self.order = Order(seed=0, stage=self.name, batch_size=8, dataset_size=20)
        self.evaluated = {}

    def batch(self, step, rows):
        if step == self.until:
            raise Interrupted
        randoms = self.order.randoms(step, rows)
        return Samples(*(normals(randoms, *shape).double() for shape in [(4, 4, 4), (4, 4, 4), (3, 16)]))

    def describe(self, step):
        return f"images of step {step}"

    def evaluate(self, module, step, run):
        """Keep the weights that are drawn with, and run them."""
        latents, texts = torch.ones(1, 4, 4, 4).double(), torch.ones(1, 3, 16).double()
        assert module(Samples(latents, latents, texts))["loss"].isfinite()
        self.evaluated[step] = {name: value.clone() for name, value in module.state_dict().items()}


def make_run(folder: Path, parallelism="ddp", sample_every=99) -> Run:
    return Run(
        folder=folder,
        seed=0,
        device=torch.device("cpu"),
        save_every=1,
        sample_every=sample_every,
        console=Console(quiet=True),
        parallelism=parallelism,
    )


def fit(stage: SmallStage, run: Run) -> dict[str, Tensor]:
    """Train, with a line of metrics for each step; returns the averaged weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 1)
        return {name: value.clone() for name, value in trainer.fit(stage, run).state_dict().items()}
