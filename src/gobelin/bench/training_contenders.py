"""Contenders of a training step: our ``fit``, and the loop of diffusers' example scripts on diffusers' own network.

Theirs is the step of ``examples/text_to_image/train_text_to_image.py`` without accelerate, in one process, on the same
weights and the same ready batches; with a LoRA that of ``train_text_to_image_lora.py``. It draws no noise and encodes
nothing, as ours does not here.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.adapters.trainable import add_adapters_
from gobelin.bench.machine import limit_memory
from gobelin.bench.process_contenders import run_python
from gobelin.bench.random_weights import CONFIGS, diffusers_unet, random_unet
from gobelin.bench.training_loops import (
    Loop,
    MadeStage,
    NoAverage,
    TakingTurns,
    make_batch,
    quiet_run,
    time_steps,
)
from gobelin.bench.unet_contenders import BASE, UNetPass
from gobelin.bench.workload import BenchPrecision, Call, Contender, Workload
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.training import trainer
from gobelin.training.config import OptimConfig
from gobelin.training.losses import UNetBatch, UNetLoss
from gobelin.unet import UNet

_BATCHES = 8
_RATE, _DECAY, _CLIP, _WEIGHT_DECAY, _BETAS = 1e-4, 0.999, 1.0, 0.01, (0.9, 0.99)
_RANK = 16

TrainingLoop = Callable[[Callable[[], None]], object]
"""A loop that calls what it is given at the start of every step."""


class DiffusersUNet(nn.Module):
    """diffusers' network with the call of gobelin's."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text_embeddings: Tensor) -> Tensor:
        """Predict."""
        return self.network(noisy_latents, timesteps, text_embeddings).sample


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """The weights, batches and options that all loops share; each trains a network of its own."""

    model: str
    side: int
    batch: int
    precision: BenchPrecision
    lora: bool = False

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return NoiseSchedule(ScheduleConfig.zero_terminal_snr())

    @cached_property
    def batches(self) -> list[UNetBatch]:
        """Random batches, the same ones every time."""
        config, length = CONFIGS[self.model]
        torch.manual_seed(1)
        return [make_batch(config, self.batch, length, self.side) for _ in range(_BATCHES)]

    @cached_property
    def optim(self) -> OptimConfig:
        """Options of the optimizer."""
        return OptimConfig(
            steps=10**9,
            batch_size=self.batch,
            learning_rate=_RATE,
            warmup_steps=0,
            hold=0.5,
            weight_decay=_WEIGHT_DECAY,
            betas=_BETAS,
            clip_norm=_CLIP,
            ema=_DECAY,
            precision=self.precision,
        )

    def operations(self) -> int:
        """Count the operations of a step of all weights: those of a forward pass, and twice as many backward."""
        forward = UNetPass(model=self.model, side=self.side, batch=self.batch, precision=self.precision)
        return 3 * forward.operations()

    def ours(self) -> UNet:
        """Make our U-Net, with an adapter where a LoRA is trained."""
        unet = random_unet(self.model, torch.float32)
        if self.lora:
            add_adapters_(unet, AdapterConfig(rank=_RANK), torch.Generator().manual_seed(0))
        else:
            unet.requires_grad_(True)
        return unet

    def theirs(self) -> DiffusersUNet:
        """Make diffusers' U-Net of the same weights, with PEFT's adapter where a LoRA is trained."""
        unet: Any = diffusers_unet(random_unet(self.model, torch.float32))
        if self.lora:
            from peft import LoraConfig

            targets = ["to_k", "to_q", "to_v", "to_out.0"]
            unet.add_adapter(
                LoraConfig(r=_RANK, lora_alpha=_RANK, init_lora_weights="gaussian", target_modules=targets)
            )
        else:
            unet.requires_grad_(True)
        return DiffusersUNet(unet)

    def loss(self, network: nn.Module) -> UNetLoss:
        """Put gobelin's loss around a network."""
        return UNetLoss(cast(UNet, network), None, self.schedule)

    def first_loss(self, network: nn.Module) -> Tensor:
        """Compute the first batch's loss, before any step."""
        with torch.no_grad(), self.autocast():
            return self.loss(network)(self.batches[0])["loss"].float()

    def reference(self) -> Tensor:
        """Compute the first batch's loss in float32."""
        with torch.no_grad():
            return self.loss(random_unet(self.model, torch.float32))(self.batches[0])["loss"]

    def autocast(self) -> torch.autocast:
        """Make the context of the forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16")


def fit_loop(
    run: TrainingPass, network: nn.Module, turn: Callable[[], None], average: bool = True, **changes: Any
) -> None:
    """Train with gobelin's ``fit``."""
    optim = OptimConfig(**{**vars(run.optim), **changes})
    if optim.compile:
        turn = cast(Any, torch.compiler.disable(turn))  # the loss inside is compiled, the waiting is not
    stage = MadeStage(module=TakingTurns(run.loss(network), turn), optim=optim, batches=run.batches)
    with tempfile.TemporaryDirectory(prefix="gobelin-bench-") as folder, _average(average):
        trainer.fit(cast(Any, stage), quiet_run(Path(folder)))


@contextmanager
def _average(kept: bool) -> Iterator[None]:
    if kept:
        yield
        return
    with patch.object(trainer, "WeightAverage", NoAverage):
        yield


def diffusers_loop(
    run: TrainingPass,
    network: nn.Module,
    turn: Callable[[], None],
    fused: bool = True,
    foreach: bool = False,
    average: bool = True,
    compiled: bool = False,
) -> None:
    """Train as diffusers' example does: its noise schedule's arithmetic is gobelin's here, which is the same."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    unet, schedule = network.train(), run.schedule
    if compiled:
        unet.compile()
    parameters = [one for one in unet.parameters() if one.requires_grad]
    ema = EMAModel(parameters, decay=_DECAY, foreach=foreach) if average else None
    optimizer = torch.optim.AdamW(
        parameters, lr=_RATE, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True if fused else None
    )
    lr_scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=10**9)
    step = 0
    while True:
        turn()
        batch = run.batches[step % len(run.batches)]
        noisy_latents = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = schedule.target(batch.latents, batch.noise, batch.timesteps)
        with run.autocast():
            model_pred = unet(noisy_latents, batch.timesteps, batch.texts)
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        loss.detach().item()  # as it is logged
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)
        step += 1


def train_workload(
    model: str, side: int, batch: int, precision: BenchPrecision, lora: bool = False, apart: bool = False
) -> Workload:
    """Make the workload of an optimizer step: forward, backward, clipping, AdamW and the average of the weights.

    ``apart`` gives each contender a process of its own, for models of which two do not fit into the memory.
    """
    run = TrainingPass(model=model, side=side, batch=batch, precision=precision, lora=lora)
    prepare = _apart if apart else _together
    peer = "peft" if lora else "diffusers"
    contenders = [
        Contender(
            name=name, prepare=partial(prepare, run, name), peer=None if name == BASE else peer, is_compared=not apart
        )
        for name in (BASE, "diffusers", "diffusers, compiled")
        if not (apart or lora) or name != "diffusers, compiled"
    ]
    return Workload(
        contenders=contenders,
        reference=None if apart else run.reference,
        operations=None if apart or lora else run.operations,
        samples=batch,
        is_timed=not apart,
    )


def _loop(run: TrainingPass, name: str) -> tuple[nn.Module, TrainingLoop]:
    """Make a contender's network, and its loop."""
    if name == BASE:
        network: nn.Module = run.ours()
        return network, partial(fit_loop, run, network)
    network = run.theirs()
    # The example that trains a LoRA keeps no average of it.
    return network, partial(diffusers_loop, run, network, average=not run.lora, compiled=name.endswith("compiled"))


def _together(run: TrainingPass, name: str) -> Call:
    """Make a call of one step, which returns the loss before the first one."""
    network, loop = _loop(run, name)
    first = run.first_loss(network)
    steps = Loop(name, loop)

    def call() -> Tensor:
        steps.steps(1)
        return first

    return call


_APART = "import sys; from gobelin.bench.training_contenders import time_step; time_step(sys.argv[1])"


def _apart(run: TrainingPass, name: str) -> Call:
    """Make a call that trains in a fresh process, and returns the seconds of a step."""

    def call() -> float:
        return float(run_python(_APART, [json.dumps({"run": asdict(run), "name": name})]).split()[-1])

    return call


def time_step(task: str) -> None:
    """Print the seconds of a step after the first ones; takes no more memory than is free."""
    limit_memory()
    told = json.loads(task)
    _, loop = _loop(TrainingPass(**told["run"]), told["name"])
    print(time_steps(loop, warm=3, count=2))
