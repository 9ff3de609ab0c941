"""Optimizer steps of the shipped model's U-Net: gobelin's ``fit`` beside a loop on diffusers' own network.

    python scripts/benchmarks/training_steps.py --json runs/benchmarks/training_steps.json      # all: some 25 minutes
    python scripts/benchmarks/training_steps.py --threads 1 --precision float32 --rounds 8 --only gobelin diffusers

Latents of 4×16×16, text embeddings of 32×192, batch 64; forward, backward, clipping, AdamW and the moving average of
the weights. The other loop is the step of diffusers' ``examples/text_to_image/train_text_to_image.py`` without
accelerate, in one process, on the same weights and the same ready batches; it draws no noise and encodes nothing,
as gobelin's does not here. Loops take turns in one process; printed are seconds a step, and medians and quartiles of
the ratios of neighbours in a round. Each number of threads, and each precision, is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from paired import (
    Loop,
    MadeStage,
    NoAverage,
    TakingTurns,
    machine,
    print_machine,
    print_table,
    quiet_run,
    ratios,
    take_turns,
    write_results,
    written,
)
from torch import Tensor, nn

from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.training import trainer
from gobelin.training.config import OptimConfig
from gobelin.training.losses import UNetBatch, UNetLoss
from gobelin.training.precision import has_fast_bfloat16
from gobelin.unet import UNet, UNetConfig

BASE, AGAIN = "gobelin", "gobelin again"
_BATCHES = 8
_RATE, _DECAY, _CLIP, _WEIGHT_DECAY, _BETAS = 1e-4, 0.999, 1.0, 0.01, (0.9, 0.99)
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss of two networks with the same weights

Run = Callable[[Callable[[], None]], object]


class DiffusersUNet(nn.Module):
    """diffusers' network with the call of gobelin's."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text_embeddings: Tensor) -> Tensor:
        """Predict."""
        return self.network(noisy_latents, timesteps, text_embeddings).sample


class Made:
    """The networks and batches that all loops share: each loop trains a network of its own, from the same weights."""

    def __init__(self, batch_size: int, precision: str, folder: Path):
        self.precision, self.folder = precision, folder
        self.schedule = NoiseSchedule(ScheduleConfig.zero_terminal_snr())
        torch.manual_seed(0)
        UNet(UNetConfig.tiny()).save_pretrained(folder / "unet")
        self.batches = [make_batch(UNetConfig.tiny(), batch_size, 32) for _ in range(_BATCHES)]
        self.optim = OptimConfig(
            steps=10**9,
            batch_size=batch_size,
            learning_rate=_RATE,
            warmup_steps=0,
            hold=0.5,
            weight_decay=_WEIGHT_DECAY,
            betas=_BETAS,
            clip_norm=_CLIP,
            ema=_DECAY,
            precision=precision,  # type: ignore[arg-type]
        )

    def ours(self) -> UNet:
        """Open the weights as gobelin's U-Net."""
        return UNet.from_pretrained(self.folder / "unet")

    def theirs(self) -> DiffusersUNet:
        """Open the weights as diffusers' U-Net."""
        return DiffusersUNet(UNet2DConditionModel.from_pretrained(self.folder / "unet"))

    def loss(self, network: nn.Module) -> UNetLoss:
        """Put gobelin's loss around a network."""
        return UNetLoss(cast(UNet, network), None, self.schedule)

    def first_loss(self, network: nn.Module) -> float:
        """Compute the first batch's loss, before any step."""
        with torch.no_grad(), self.autocast():
            return self.loss(network)(self.batches[0])["loss"].item()

    def autocast(self) -> torch.autocast:
        """Make the context of the forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16")


def make_batch(config: UNetConfig, count: int, length: int, side: int | None = None) -> UNetBatch:
    """Make a batch of random latents, noise, timesteps and text embeddings."""
    shape = (count, config.in_channels, side or config.sample_size, side or config.sample_size)
    return UNetBatch(
        latents=torch.randn(shape),
        noise=torch.randn(shape),
        timesteps=torch.randint(0, 1000, (count,)),
        texts=torch.randn(count, length, config.cross_attention_dim),
    )


def fit_loop(
    made: Made, network: Callable[[], nn.Module], turn: Callable[[], None], average: bool = True, **changes: Any
) -> None:
    """Train with gobelin's ``fit``."""
    optim = OptimConfig(**{**vars(made.optim), **changes})
    if optim.compile:
        turn = cast(Any, torch.compiler.disable(turn))  # the loss inside is compiled, the waiting is not
    stage = MadeStage(module=TakingTurns(made.loss(network()), turn), optim=optim, batches=made.batches)
    with _average(average):
        trainer.fit(cast(Any, stage), quiet_run(made.folder / str(id(stage))))


@contextmanager
def _average(kept: bool) -> Iterator[None]:
    if kept:
        yield
        return
    with patch.object(trainer, "WeightAverage", NoAverage):
        yield


def diffusers_loop(
    made: Made,
    network: Callable[[], nn.Module],
    turn: Callable[[], None],
    fused: bool = True,
    foreach: bool = False,
    average: bool = True,
    compiled: bool = False,
) -> None:
    """Train as diffusers' example does: its noise schedule's arithmetic is gobelin's here, which is the same."""
    unet, schedule = network().train(), made.schedule
    if compiled:
        unet.compile()
    ema = EMAModel(unet.parameters(), decay=_DECAY, foreach=foreach) if average else None
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=_RATE, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True if fused else None
    )
    lr_scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=10**9)
    step = 0
    while True:
        turn()
        batch = made.batches[step % len(made.batches)]
        noisy_latents = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = schedule.target(batch.latents, batch.noise, batch.timesteps)
        with made.autocast():
            model_pred = unet(noisy_latents, batch.timesteps, batch.texts)
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        loss.detach().item()  # as it is logged
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), _CLIP)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())
        step += 1


def arms(made: Made) -> dict[str, Run]:
    """Name the loops: the two, and each with one part exchanged or left out."""
    ours, theirs = made.ours, made.theirs
    return {
        BASE: partial(fit_loop, made, ours),
        AGAIN: partial(fit_loop, made, ours),
        "diffusers": partial(diffusers_loop, made, theirs),
        "diffusers' network in fit": partial(fit_loop, made, theirs),
        "gobelin's network in diffusers' loop": partial(diffusers_loop, made, ours),
        "diffusers, AdamW not fused (its script's default)": partial(diffusers_loop, made, theirs, fused=False),
        "diffusers, average by foreach": partial(diffusers_loop, made, theirs, foreach=True),
        "diffusers, no average": partial(diffusers_loop, made, theirs, average=False),
        "gobelin, no average": partial(fit_loop, made, ours, average=False),
        "gobelin, Muon (the preset's)": partial(fit_loop, made, ours, optimizer="muon"),
        "gobelin, compiled": partial(fit_loop, made, ours, compile=True),
        "diffusers, compiled": partial(diffusers_loop, made, theirs, compiled=True),
    }


def main() -> None:
    """Measure every number of threads and precision in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="of each loop in a round")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="these loops alone, by name; gobelin is always there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    if not has_fast_bfloat16(torch.device("cpu")):
        options.precision = [one for one in options.precision if one != "bfloat16"]
        print("this CPU does not multiply bfloat16 in hardware: float32 alone is measured")
    found = machine()
    print_machine(found)
    measured = []
    for precision in options.precision:
        for threads in options.threads:
            measured.append(_in_process(options, precision, threads))
            show(measured[-1])
            write_results(options.json, {"machine": found, "training_steps": measured})


def _in_process(options: argparse.Namespace, precision: str, threads: int) -> dict[str, Any]:
    """Measure in a process that begins with this number of threads."""
    command = [sys.executable, __file__, "--worker", "--threads", str(threads), "--precision", precision]
    command += ["--rounds", str(options.rounds), "--steps", str(options.steps)]
    command += ["--batch-size", str(options.batch_size), *(["--only", *options.only] if options.only else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let the loops take turns; raises where the two networks do not compute the same loss."""
    precision, (threads,) = options.precision[0], options.threads
    with tempfile.TemporaryDirectory(prefix="training-steps-") as folder:
        made = Made(options.batch_size, precision, Path(folder))
        losses = [made.first_loss(network) for network in (made.ours(), made.theirs())]
        if abs(losses[0] - losses[1]) > _TOLERANCE[precision] * losses[0]:
            raise SystemExit(f"the two networks differ: their losses are {losses}")
        chosen = {
            name: run for name, run in arms(made).items() if not options.only or name in (BASE, AGAIN, *options.only)
        }
        loops = [Loop(name, run) for name, run in chosen.items()]
        seconds = take_turns(loops, options.rounds, options.steps)
    return {
        "precision": precision,
        "threads": threads,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "steps": options.steps,
        "first_losses": losses,
        "seconds": seconds,
        "ratios": {name: ratios(one, seconds[BASE]) for name, one in seconds.items() if name != BASE},
    }


def show(measured: dict[str, Any]) -> None:
    """Print one table: how many times as long as gobelin's each loop takes."""
    rows = []
    for name, seconds in measured["seconds"].items():
        middle = sorted(seconds)[len(seconds) // 2]
        ratio = "1" if name == BASE else written(measured["ratios"][name])
        rows.append((name, f"{middle:.3f}", f"{1 / middle:.2f}", f"{measured['batch_size'] / middle:.0f}", ratio))
    print_table(
        f"{measured['precision']}, {measured['threads']} thread(s), batch {measured['batch_size']}, "
        f"{measured['rounds']} rounds of {measured['steps']} steps",
        ("loop", "seconds a step", "steps/s", "samples/s", "time, gobelin's = 1 (quartiles)"),
        rows,
    )


if __name__ == "__main__":
    main()
