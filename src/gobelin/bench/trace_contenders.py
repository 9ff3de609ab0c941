"""Contenders of tracing: a guided U-Net pass with the attention maps of its words, beside the same pass without."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gobelin.attention import Trace
from gobelin.bench.random_weights import diffusers_unet
from gobelin.bench.unet_contenders import BASE, UNetPass, no_grad
from gobelin.bench.workload import BenchPrecision, Call, Contender, Workload
from gobelin.diffusers_pipelines import MapRecorder, find_attention
from gobelin.look.sharp_maps import sharp_trace

LOOK_INTO = "diffusers, gobelin.look_into"
"""Our maps of diffusers' own pass."""
_GUIDED = slice(1, None)  # of a batch of two: the pass with the prompt, whose maps are asked for


def trace_workload(model: str, side: int, precision: BenchPrecision) -> Workload:
    """Make the workload of a guided pass, batch 2, with and without maps; each program beside its own plain pass."""
    run = UNetPass(model=model, side=side, batch=2, precision=precision)
    plain = "diffusers"
    return Workload(
        contenders=[
            Contender(name=BASE, prepare=partial(_ours, run)),
            Contender(name="gobelin, trace=True", prepare=partial(_traced, run, False), against=BASE),
            Contender(name='gobelin, trace="sharp"', prepare=partial(_traced, run, True), against=BASE),
            Contender(name=plain, peer="diffusers", prepare=partial(_diffusers, run)),
            Contender(name=LOOK_INTO, peer="diffusers", prepare=partial(_looked_into, run), against=plain),
            Contender(name="daam", peer="daam", prepare=partial(_daam, run), against=plain),
            Contender(
                name="attention-map-diffusers",
                peer="attention-map-diffusers",
                prepare=partial(_attention_map_diffusers, run),
                against=plain,
            ),
        ],
        reference=run.reference,
        operations=run.operations,
    )


def _ours(run: UNetPass) -> Call:
    return no_grad(run.painting, *run.inputs(run.dtype))


def _traced(run: UNetPass, sharp: bool) -> Call:
    unet = run.painting
    trace = sharp_trace(unet.attention_sites, (run.side, run.side), run.head_weights) if sharp else Trace()
    choice: dict[str, Any] = {"sites": trace.sites, "rows": _GUIDED, "reduce": "none" if trace.per_head else "heads"}
    return no_grad(lambda *inputs: unet.trace(*inputs, **choice)[0], *run.inputs(run.dtype))


def _diffusers(run: UNetPass) -> Call:
    return _predicting(diffusers_unet(run.ours), run)


def _predicting(unet: nn.Module, run: UNetPass) -> Call:
    return no_grad(lambda *inputs: unet(*inputs, return_dict=False)[0], *run.inputs(run.dtype))


def _pipeline(unet: nn.Module) -> Any:
    """Make diffusers' pipeline of a U-Net alone, for what traces pipelines."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    missing: Any = None
    return StableDiffusionPipeline(
        vae=missing,
        text_encoder=missing,
        tokenizer=missing,
        unet=unet,  # pyright: ignore[reportArgumentType]
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),  # pyright: ignore[reportArgumentType]
        safety_checker=missing,
        feature_extractor=missing,
        requires_safety_checker=False,
    )


def _looked_into(run: UNetPass) -> Call:
    """Record a diffusers U-Net's maps as :func:`gobelin.look_into` does."""
    unet = diffusers_unet(run.ours)
    recorder = MapRecorder(
        modules={site: module for site, module in find_attention(unet).items() if site.kind == "cross"},
        trace=Trace(),
        latent_size=(run.side, run.side),
        length=run.inputs(run.dtype)[2].shape[1],
        rows=_GUIDED,
    )
    recorder.__enter__()  # for as long as the contender is there
    return _predicting(unet, run)


def _daam(run: UNetPass) -> Call:
    import daam  # pyright: ignore[reportMissingImports]

    unet = diffusers_unet(run.ours)
    tracer = daam.trace(_pipeline(unet))
    tracer.hook()
    predict = _predicting(unet, run)

    def call() -> Tensor:
        tracer.all_heat_maps.clear()
        return _tensor(predict())

    return call


def _attention_map_diffusers(run: UNetPass) -> Call:
    """Trace as ``init_pipeline`` does, which takes the attention of every head exactly."""
    from attention_map_diffusers import AttentionCapture  # pyright: ignore[reportMissingImports]

    unet = diffusers_unet(run.ours)
    capture = AttentionCapture(_pipeline(unet), relations="image->text", mode="exact", heads="mean", timesteps="all")
    capture.install()
    predict = _predicting(unet, run)

    def call() -> Tensor:
        capture.clear()
        result = _tensor(predict())
        capture.compute()
        return result

    return call


def _tensor(result: Any) -> Tensor:
    if not isinstance(result, torch.Tensor):
        raise TypeError("a U-Net's pass returns a prediction")
    return result
