"""Contenders of a U-Net's forward pass: our own in every engine, diffusers' in its ways, and OpenVINO."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gobelin.bench.our_engines import ROUNDED, other_engines, run_by
from gobelin.bench.random_weights import CONFIGS, diffusers_unet, random_unet
from gobelin.bench.workload import BenchPrecision, Call, Contender, Workload, count_operations
from gobelin.head_weights import HeadWeights
from gobelin.pipeline import Pipeline
from gobelin.unet import UNet

BASE = "gobelin"
"""Ours as it paints where nothing is said."""
PLAIN = "gobelin, plain"
"""Our network called directly."""


@dataclass(frozen=True, kw_only=True)
class UNetPass:
    """One forward pass: a U-Net and its inputs. ``model`` is one of the ``CONFIGS``; "tiny" has its shipped weights."""

    model: str
    side: int
    batch: int
    precision: BenchPrecision

    @property
    def dtype(self) -> torch.dtype:
        """The precision as PyTorch has it."""
        return getattr(torch, self.precision)

    def unet(self, dtype: torch.dtype) -> UNet:
        """Make the network, with the same weights every time."""
        if self.model == "tiny":
            return Pipeline.from_pretrained(device="cpu", dtype=dtype).unet.requires_grad_(False)
        return random_unet(self.model, dtype)

    @property
    def head_weights(self) -> HeadWeights | None:
        """The weights that the model's sharp maps are made by, if it has any."""
        return Pipeline.from_pretrained(device="cpu").model.head_weights if self.model == "tiny" else None

    @cached_property
    def ours(self) -> UNet:
        """Our network in the row's precision, of whose tensors other contenders are made."""
        return self.unet(self.dtype)

    @cached_property
    def painting(self) -> Any:
        """Our network as the engine runs it that paints where none is named."""
        return run_by(unet=self.ours).unet

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Draw latents, timesteps and text embeddings, the same ones every time."""
        config, length = CONFIGS[self.model]
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(self.batch, config.in_channels, self.side, self.side, generator=generator)
        texts = torch.randn(self.batch, length, config.cross_attention_dim, generator=generator)
        timesteps = torch.full((self.batch,), 500.0)
        return latents.bfloat16().to(dtype), timesteps, texts.bfloat16().to(dtype)

    def reference(self) -> Tensor:
        """Predict in float32, by our module."""
        unet = self.ours if self.precision == "float32" else self.unet(torch.float32)
        with torch.no_grad():
            return unet(*self.inputs(torch.float32))

    def operations(self) -> int:
        """Count the operations of the pass, computing nothing."""
        config, length = CONFIGS[self.model]
        with torch.device("meta"):
            unet = UNet(config)
            latents = torch.empty(self.batch, config.in_channels, self.side, self.side)
            texts = torch.empty(self.batch, length, config.cross_attention_dim)
            return count_operations(lambda: unet(latents, torch.zeros(self.batch), texts))


def unet_workload(model: str, side: int, batch: int, precision: BenchPrecision) -> Workload:
    """Make the workload of a forward pass, with every contender that there is."""
    run = UNetPass(model=model, side=side, batch=batch, precision=precision)
    engines = (ROUNDED, *other_engines()) if precision == "bfloat16" else other_engines()
    return Workload(
        contenders=[
            Contender(name=BASE, prepare=lambda: no_grad(run.painting, *run.inputs(run.dtype))),
            Contender(name=PLAIN, prepare=lambda: no_grad(run.ours, *run.inputs(run.dtype))),
            *[Contender(name=f"{BASE}, {engine}", prepare=partial(_engine, run, engine)) for engine in engines],
            Contender(name="diffusers", peer="diffusers", prepare=partial(_diffusers, run)),
            Contender(
                name="diffusers, channels last",
                peer="diffusers",
                prepare=partial(_diffusers, run, _channels_last),
            ),
            Contender(
                name="diffusers, compiled",
                peer="diffusers",
                prepare=partial(_diffusers, run, torch.compile),
            ),
            Contender(name="openvino", peer="openvino", prepare=partial(_openvino, run)),
        ],
        reference=run.reference,
        operations=run.operations,
        samples=batch,
    )


def _engine(run: UNetPass, engine: str) -> Call:
    return no_grad(run_by(engine, unet=run.ours).unet, *run.inputs(run.dtype))


def _diffusers(run: UNetPass, change: Callable[[nn.Module], Any] = lambda unet: unet) -> Call:
    return no_grad(_Prediction(change(diffusers_unet(run.ours))), *run.inputs(run.dtype))


def _channels_last(unet: Any) -> Any:
    return unet.to(memory_format=torch.channels_last)


def _openvino(run: UNetPass) -> Call:
    """Convert diffusers' U-Net of float32 weights, with fixed shapes, and compute in the row's precision."""
    unet = run.ours if run.precision == "float32" else run.unet(torch.float32)
    return openvino_call(_Prediction(diffusers_unet(unet)), run.inputs(torch.float32), run.precision)


class _Prediction(nn.Module):
    """diffusers' network with the call of ours: its prediction alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text_embeddings: Tensor) -> Tensor:
        """Predict."""
        return self.network(noisy_latents, timesteps, text_embeddings, return_dict=False)[0]


def no_grad(run: Callable[..., Tensor], *inputs: Any) -> Call:
    """Make a call without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return run(*inputs)

    return call


def openvino_call(module: nn.Module, inputs: tuple[Tensor, ...], precision: BenchPrecision) -> Call:
    """Convert a module of float32 weights with OpenVINO, for the shapes of ``inputs``; returns a call with them."""
    import openvino as ov

    from gobelin.engines.openvino_runtime import convert_graph  # which reports nothing to anybody

    converted = convert_graph(module, dict(zip(signature(module.forward).parameters, inputs, strict=True)))
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.compile_model(converted, "CPU", options)
    arrays = [one.numpy() for one in inputs]
    return lambda: torch.from_numpy(compiled(arrays)[0])
