"""Whole models that are refused for what is in them or beside them: the change, and what the sentence says of it."""

from collections.abc import Callable
from typing import Any

import torch

from gobelin.formats import ldm

Tensors = dict[str, Any]

_OUT = f"{ldm.UNET_PREFIX}out.2."


def _in_float8(weights: Tensors) -> Tensors:
    """The U-Net in float8, and the rest as it is."""
    return {
        name: tensor.to(torch.float8_e4m3fn) if name.startswith(ldm.UNET_PREFIX) else tensor
        for name, tensor in weights.items()
    }


def _note(kind: str) -> torch.Tensor:
    """ComfyUI's note on a quantized weight."""
    return torch.tensor(list(f'{{"format": "{kind}"}}'.encode()), dtype=torch.uint8)


CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no VAE": (
        lambda w: {k: t for k, t in w.items() if not k.startswith(ldm.VAE_PREFIX)},
        r"has no VAE: give one, as vae",
    ),
    "no text encoder": (
        lambda w: {k: t for k, t in w.items() if not k.startswith(ldm.TEXT_PREFIX)},
        "has no text encoder",
    ),
    "EMA alone, not asked for": (
        lambda w: {ldm.map_ema_key(k) if k.startswith(ldm.UNET_PREFIX) else k: t for k, t in w.items()},
        r"has only the average \(EMA\) of its U-Net's weights: take it, with ema",
    ),
    "an unknown layer of the U-Net": (
        lambda w: w | {f"{ldm.UNET_PREFIX}label.weight": torch.ones(2)},
        "holds 'model.diffusion_model.label.weight', which no part of Stable Diffusion 1.x has",
    ),
    "an unknown layer of the VAE": (
        lambda w: w | {f"{ldm.VAE_PREFIX}decoder.mid.attn_2.q.weight": torch.ones(2)},
        "holds 'first_stage_model.decoder.mid.attn_2.q.weight', which no part",
    ),
    "an unknown marker": (
        lambda w: w | {"sampling.shift": torch.ones(1)},
        "holds the marker 'sampling.shift', whose meaning is unknown",
    ),
    "EDM": (
        lambda w: w | {"edm_vpred.sigma_max": torch.ones(1)},
        "was trained with EDM's noise levels",
    ),
    "nvfp4": (
        lambda w: (
            w | {f"{ldm.UNET_PREFIX}out.2.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
        ),
        "says 'nvfp4', and only float8 is read",
    ),
    "int8": (
        lambda w: {k: t.to(torch.int8) if k == f"{ldm.UNET_PREFIX}out.2.weight" else t for k, t in w.items()},
        "is of int8: weights quantized to whole numbers are not read",
    ),
    "another schedule's table": (
        lambda w: w | {"alphas_cumprod": torch.linspace(1, 0, 1000)},
        "its table alphas_cumprod is of another noise schedule",
    ),
    "a scale is missing": (
        lambda w: _in_float8(w) | {f"{_OUT}scale_weight": torch.ones(1)},
        "'model.diffusion_model.time_embed.0.weight' is in float8 and lacks the scale that others have",
    ),
    "a mark of scales without any": (
        lambda w: _in_float8(w) | {f"{ldm.UNET_PREFIX}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)},
        "'model.diffusion_model.time_embed.0.weight' is in float8 and lacks the scale that others have",
    ),
    "two scales": (
        lambda w: _in_float8(w) | {f"{_OUT}scale_weight": torch.ones(1), f"{_OUT}weight_scale": torch.ones(1)},
        "holds two scales of 'model.diffusion_model.out.2.weight'",
    ),
    "a scale of zero": (
        lambda w: _in_float8(w) | {f"{_OUT}scale_weight": torch.zeros(1)},
        r"scale_weight' is \[0\.0\]: no scale",
    ),
    "a scale without float8": (
        lambda w: w | {f"{_OUT}scale_weight": torch.ones(1)},
        "scale_weight' is no scale of its weight",
    ),
    "a note without a scale": (
        lambda w: _in_float8(w) | {f"{_OUT}comfy_quant": _note("float8_e4m3fn")},
        "says 'float8_e4m3fn', and its weight is of float8_e4m3fn without a scale",
    ),
    "a note of another float8": (
        lambda w: _in_float8(w) | {f"{_OUT}comfy_quant": _note("float8_e5m2"), f"{_OUT}weight_scale": torch.ones(1)},
        "says 'float8_e5m2', and its weight is of float8_e4m3fn",
    ),
    "a note of any length": (
        lambda w: w | {f"{_OUT}comfy_quant": torch.zeros(4000, dtype=torch.uint8)},
        "is no note on how a weight",
    ),
}

# Each beside the key v_pred: metadata, and the text of a .yaml of the same name.
CONTRADICTIONS: dict[str, tuple[dict[str, str], str | None, str]] = {
    "v_pred, and metadata of epsilon": (
        {"modelspec.prediction_type": "epsilon"},
        None,
        r"'v_prediction' by its key 'v_pred' and 'epsilon' by its metadata",
    ),
    "v_pred, and a .yaml of eps": (
        {},
        "model: {params: {parameterization: eps}}",
        r"and 'epsilon' by .*model\.yaml: say which",
    ),
    "metadata of flow": (
        {"modelspec.prediction_type": "flow"},
        None,
        "prediction_type is 'flow', expected epsilon or v",
    ),
    "a .yaml of x0": (
        {},
        "model: {params: {parameterization: x0}}",
        "parameterization is 'x0', expected eps or v",
    ),
    "a .yaml of other betas": (
        {},
        "model: {params: {beta_schedule: cosine, parameterization: v}}",
        "beta_schedule is 'cosine', expected linear",
    ),
    "a .yaml with a word for a number": (
        {},
        "model: {params: {parameterization: v, linear_start: x}}",
        "linear_start is 'x', expected a number",
    ),
    "a .yaml that is none": (
        {},
        "a: [",
        r"has no model\.params",
    ),
    "a .yaml without a model": (
        {},
        "[]",
        r"has no model\.params",
    ),
    "v_pred, and kohya's metadata of epsilon": (
        {"ss_v_parameterization": "False"},
        None,
        "and 'epsilon' by its metadata's ss_v_parameterization",
    ),
    "v_pred, and Gobelin's metadata of epsilon": (
        {"gobelin": '{"schedule": {"prediction_type": "epsilon"}}'},
        None,
        "'epsilon' by its metadata under 'gobelin'",
    ),
    "a .yaml with betas one by one": (
        {},
        "model: {params: {parameterization: v, given_betas: [1]}}",
        "it gives its betas one by one",
    ),
    "a .yaml with text for true": (
        {},
        "model: {params: {parameterization: v, ztsnr: 'true'}}",
        "ztsnr is 'true', expected true or false",
    ),
    "a .yaml with other heads": (
        {},
        "model: {params: {parameterization: v, unet_config: {params: {num_heads: -1, num_head_channels: 32}}}}",
        "num_head_channels is 32; Stable Diffusion 1.x has num_heads instead",
    ),
    "a .yaml with a broken number": (
        {},
        'model: {params: {timesteps: !!int "_"}}',
        r"has no model\.params",
    ),
    "a .yaml with a broken time": (
        {},
        'model: {params: {timesteps: !!timestamp "x"}}',
        r"has no model\.params",
    ),
    "a .yaml with a number of any length": (
        {},
        f"model: {{params: {{scale_factor: 0x{'f' * 5000}}}}}",
        "a number of very many digits, expected a number",
    ),
    "a .yaml with a number in base 60": (
        {},
        f"model: {{params: {{linear_start: {'1:' * 400}.5}}}}",
        "model.yaml",
    ),
    "a .yaml with aliases": (
        {},
        "a: &a [x]\nmodel: {params: *a}",
        r"has no model\.params",
    ),
    "a .yaml of any length": (
        {},
        "a: " + "[x, " * 20_000,
        "is larger than any configuration",
    ),
}
