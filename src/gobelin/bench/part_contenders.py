"""Contenders of a model's other parts: the text encoder, and the VAE's decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gobelin.bench.our_engines import DEFAULT, other_engines, run_by
from gobelin.bench.random_weights import (
    diffusers_vae,
    random_text_encoder,
    random_vae,
    transformers_text_encoder,
)
from gobelin.bench.unet_contenders import BASE, PLAIN, no_grad, openvino_call
from gobelin.bench.workload import BenchPrecision, Call, Contender, Workload, count_operations
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.formats.component import Component
from gobelin.vae import VAE, VAEConfig


@dataclass(frozen=True, kw_only=True)
class PartPass:
    """A forward pass of one part: how it is made in a precision, called, made by others, and given its input."""

    make: Callable[[torch.dtype], Component]
    call: Callable[[Any, Tensor], Tensor]
    theirs: Callable[[Any], nn.Module]
    their_call: Callable[[Any, Tensor], Tensor]
    given: Tensor
    precision: BenchPrecision

    @cached_property
    def ours(self) -> Component:
        """Our network in the row's precision."""
        return self.make(getattr(torch, self.precision))

    def inputs(self, dtype: torch.dtype) -> Tensor:
        """Give the input, numbers in that precision."""
        return self.given.to(dtype) if self.given.is_floating_point() else self.given

    def reference(self) -> Tensor:
        """Compute in float32, by our module."""
        with torch.no_grad():
            return self.call(self.make(torch.float32), self.inputs(torch.float32))


def vae_workload(side: int, precision: BenchPrecision) -> Workload:
    """Make the workload of decoding latents of ``side`` × ``side`` by a VAE of Stable Diffusion 1.5's size."""
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    run = PartPass(
        make=random_vae,
        call=VAE.decode,
        theirs=diffusers_vae,
        their_call=lambda vae, given: vae.decode(given, return_dict=False)[0],
        given=latents,
        precision=precision,
    )
    named = {BASE: DEFAULT, **{f"{BASE}, {engine}": engine for engine in other_engines()}}
    engines = [Contender(name=name, prepare=partial(_engine, run, engine)) for name, engine in named.items()]
    return _workload(run, "diffusers", lambda: VAE(VAEConfig.sd15()), engines)


def text_workload(precision: BenchPrecision) -> Workload:
    """Make the workload of encoding a prompt and an empty one, 77 tokens each, at Stable Diffusion 1.5's size."""
    token_ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(1))
    run = PartPass(
        make=random_text_encoder,
        call=lambda network, given: network(given),
        theirs=transformers_text_encoder,
        their_call=lambda network, given: network(given, return_dict=False)[0],
        given=token_ids,
        precision=precision,
    )
    return _workload(run, "transformers", lambda: TextEncoder(TextEncoderConfig.sd15()))


def _workload(
    run: PartPass, theirs: str, on_meta: Callable[[], Component], engines: Sequence[Contender] = ()
) -> Workload:
    def operations() -> int:
        with torch.device("meta"):
            network = on_meta()
        return count_operations(lambda: run.call(network, run.given.to("meta")))

    return Workload(
        contenders=[
            *engines,
            Contender(name=PLAIN if engines else BASE, prepare=partial(_ours, run)),
            Contender(name=theirs, peer="diffusers", prepare=partial(_theirs, run)),
            Contender(name=f"{theirs}, compiled", peer="diffusers", prepare=partial(_theirs, run, torch.compile)),
            Contender(name="openvino", peer="openvino", prepare=partial(_openvino, run)),
        ],
        reference=run.reference,
        operations=operations,
    )


def _ours(run: PartPass) -> Call:
    return no_grad(run.call, run.ours, run.inputs(run.ours.dtype))


def _engine(run: PartPass, engine: str) -> Call:
    vae = cast(VAE, run.ours)
    latents = vae.config.scaling_factor * run.inputs(vae.dtype)
    return no_grad(run_by(engine, vae=vae).vae.latents_to_images, latents)


def _theirs(run: PartPass, change: Callable[[Any], Any] = lambda module: module) -> Call:
    return no_grad(change(_Part(run.theirs(run.ours), run.their_call)), run.inputs(run.ours.dtype))


def _openvino(run: PartPass) -> Call:
    part = _Part(run.theirs(run.make(torch.float32)), run.their_call)
    return openvino_call(part, (run.inputs(torch.float32),), run.precision)


class _Part(nn.Module):
    """A network whose forward is one of its calls."""

    def __init__(self, network: nn.Module, call: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.network = network
        self._call = call

    def forward(self, given: Tensor) -> Tensor:
        """Compute that call."""
        return self._call(self.network, given)
