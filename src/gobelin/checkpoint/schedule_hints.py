"""Read what a single file says of its noise schedule: marker tensors, metadata, and a ``.yaml`` beside it.

The original layout holds no schedule. Markers are ComfyUI's (``comfy_extras/nodes_model_merging.py``) and
AUTOMATIC1111's (``modules/sd_models.py``), metadata is Stability's ModelSpec as kohya's sd-scripts and ComfyUI write
it, and the ``.yaml`` is the configuration of CompVis' code (``configs/stable-diffusion/v1-inference.yaml``).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gobelin.errors import ModelError
from gobelin.formats.files import is_there
from gobelin.validation import shown

MARKER_KEYS = ("v_pred", "ztsnr")
"""Empty tensors that say: v-prediction, zero terminal SNR."""
_EITHER = ("prediction_type", "rescale_betas_zero_snr")  # fields that several places may say
_EXPONENT = re.compile(r"[+-]?\d{1,9}(\.\d{0,20})?[eE][+-]?\d{1,2}")
_EDM_KEYS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
_PREDICTION_TYPES = {
    "epsilon": ("epsilon", "eps"),
    "v_prediction": ("v", "v_prediction", "v-prediction", "v_pred", "vpred", "velocity"),
}
_PREDICTION_METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_MAX_YAML = 20_000  # bytes, read in a fraction of a second; CompVis' have 2,000
_MAX_NUMBER = 1e6


@dataclass(frozen=True, kw_only=True)
class ScheduleHints:
    """Hints of a file at its noise schedule: fields of ``ScheduleConfig``.

    ``scaling_factor`` is the VAE's, and ``heads`` the U-Net's, which a ``.yaml`` says too; None where it does not.
    """

    fields: dict[str, Any]
    scaling_factor: float | None = None
    heads: int | None = None


def read_schedule_hints(
    path: Path, keys: Collection[str], metadata: Mapping[str, str], given: Mapping[str, Any], own: Mapping[str, Any]
) -> ScheduleHints:
    """Read what a single file says of its noise schedule, but for the fields that were ``given``.

    ``own`` are the fields of Gobelin's own metadata. Raises :class:`ModelError` for a schedule that Gobelin does not
    have, and where two places contradict each other.
    """
    if edm := [key for key in _EDM_KEYS if key in keys]:
        raise ModelError(
            f"{path} holds {edm[0]!r}: it was trained with EDM's noise levels, which Gobelin does not have"
        )
    ours = [(name, own[name], "its metadata under 'gobelin'") for name in _EITHER if name in own]
    said = [*ours, *_from_keys(keys), *_from_metadata(path, metadata)]
    configuration = _yaml_beside(path)
    scaling_factor, heads = None, None
    if configuration is not None:
        file, params = configuration
        said += _from_yaml(file, params)
        scaling_factor = _number(file, "scale_factor", params.get("scale_factor"))
        heads = _unet_heads(file, params)
    fields: dict[str, Any] = {}
    where: dict[str, str] = {}
    for name, value, place in said:
        if name in given or (name == "rescale_betas_zero_snr" and given.get("prediction_type") == "epsilon"):
            continue  # without v-prediction there is no zero terminal SNR
        if fields.setdefault(name, value) != value:
            raise ModelError(
                f"{path}: {name} is {shown(fields[name])} by {where[name]} and {shown(value)} by {place}: say which, "
                "with the option prediction_type (--prediction-type) or zero_terminal_snr (--zero-terminal-snr)"
            )
        where.setdefault(name, place)
    return ScheduleHints(fields=fields, scaling_factor=scaling_factor, heads=heads)


def _from_keys(keys: Collection[str]) -> list[tuple[str, Any, str]]:
    """Read the marker tensors."""
    said: list[tuple[str, Any, str]] = []
    if "v_pred" in keys:
        said.append(("prediction_type", "v_prediction", "its key 'v_pred'"))
    if "ztsnr" in keys:
        said.append(("rescale_betas_zero_snr", True, "its key 'ztsnr'"))
    return said


def _from_metadata(path: Path, metadata: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    """Read the metadata of a safetensors file."""
    said: list[tuple[str, Any, str]] = []
    for name in _PREDICTION_METADATA:
        if name in metadata:
            value = metadata[name].strip().lower()
            found = [ours for ours, names in _PREDICTION_TYPES.items() if value in names]
            if not found:
                raise ModelError(f"{path}: its metadata's {name} is {metadata[name][:100]!r}, expected epsilon or v")
            said.append(("prediction_type", found[0], f"its metadata's {name}"))
    for name, field, value in (
        ("ss_v_parameterization", "prediction_type", "v_prediction"),
        ("ss_zero_terminal_snr", "rescale_betas_zero_snr", True),
    ):
        if metadata.get(name, "").lower() == "true":
            said.append((field, value, f"its metadata's {name}"))
    if metadata.get("ss_v_parameterization", "").lower() == "false":
        said.append(("prediction_type", "epsilon", "its metadata's ss_v_parameterization"))
    return said


def _yaml_beside(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the parameters of the ``.yaml`` of the same name, if there is one."""
    file = next((one for one in (path.with_suffix(".yaml"), path.with_suffix(".yml")) if is_there(one)), None)
    if file is None:
        return None
    if file.stat().st_size > _MAX_YAML:
        raise ModelError(f"{file} is larger than any configuration of Stable Diffusion: move it away if it is none")
    from gobelin.formats.yaml_files import read_yaml  # with PyYAML, which few files need

    try:
        content = read_yaml(file)
        params = content["model"]["params"]
        if not isinstance(params, dict):
            raise TypeError
    except Exception as error:  # of many kinds
        raise ModelError(
            f"{file} has no model.params, which a configuration of Stable Diffusion has: move it away if it is none"
        ) from error
    return file, params


def _from_yaml(file: Path, params: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Read the parameters of CompVis' ``LatentDiffusion``, whose ``linear`` betas are diffusers' ``scaled_linear``."""
    said: list[tuple[str, Any, str]] = []
    parameterization = params.get("parameterization", "eps")
    if parameterization not in ("eps", "v"):
        raise ModelError(f"{file}: parameterization is {shown(parameterization)}, expected eps or v")
    said.append(("prediction_type", "v_prediction" if parameterization == "v" else "epsilon", str(file)))
    for name in ("rescale_betas_zero_snr", "zero_terminal_snr", "ztsnr"):
        if not isinstance(value := params.get(name, False), bool):
            raise ModelError(f"{file}: {name} is {shown(value)}, expected true or false")
        if value:
            said.append(("rescale_betas_zero_snr", True, str(file)))
    if params.get("given_betas") is not None:
        raise ModelError(f"{file}: it gives its betas one by one (given_betas), which Gobelin does not read")
    for name, field in (
        ("linear_start", "beta_start"),
        ("linear_end", "beta_end"),
        ("timesteps", "num_train_timesteps"),
    ):
        if (value := _number(file, name, params.get(name))) is not None:
            said.append((field, value, str(file)))
    if params.get("beta_schedule", "linear") != "linear":
        raise ModelError(f"{file}: beta_schedule is {shown(params['beta_schedule'])}, expected linear")
    layer = _params_of(params, "cond_stage_config").get("layer", "last")
    if layer != "last":
        raise ModelError(
            f"{file}: the text encoder's layer is {shown(layer)}, expected last: move the file away, and give "
            "clip_skip when painting"
        )
    return said


def _params_of(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the ``params`` of a part of the configuration; empty where it has none."""
    part = params.get(name)
    inner = part.get("params") if isinstance(part, dict) else None
    return inner if isinstance(inner, dict) else {}


def _unet_heads(file: Path, params: Mapping[str, Any]) -> int | None:
    """Return the number of attention heads of the U-Net; None where the file does not say."""
    inner = _params_of(params, "unet_config")
    if (channels := inner.get("num_head_channels", -1)) != -1:
        raise ModelError(f"{file}: num_head_channels is {shown(channels)}; Stable Diffusion 1.x has num_heads instead")
    heads = inner.get("num_heads")
    if heads in (None, -1):
        return None
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise ModelError(f"{file}: num_heads is {shown(heads)}, expected a whole number above 0")
    return heads


def _number(file: Path, name: str, value: Any) -> Any:
    """Return a number; raises :class:`ModelError` for anything else, None alone apart."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)  # YAML 1.1 takes 1e-4 for text
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _MAX_NUMBER
    ):
        raise ModelError(f"{file}: {name} is {shown(value)}, expected a number")
    return value
