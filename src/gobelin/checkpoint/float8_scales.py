"""Scales of weights that are stored in float8: the weight is ``stored · scale``, in float32.

ComfyUI's layouts (``comfy/utils.py``, ``convert_old_quants``): a scale beside each weight, and either a mark for the
whole file, ``scaled_fp8``, or a note in JSON beside each weight, ``comfy_quant``.
"""

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from gobelin.errors import ModelError
from gobelin.formats.files import parse_json
from gobelin.formats.tensor_file import TensorFile
from gobelin.validation import shown

_MARK = "scaled_fp8"
_LONGEST_NOTE = 1000  # bytes of JSON


def read_float8_scales(
    file: TensorFile, stored: Mapping[str, str], keys: Iterable[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """Read the scales of a network's weights; ``stored`` maps keys to the names in the file.

    Returns the scales by the keys of their weights, in float32 and of shapes that multiply them, and the keys that were
    read for it. Raises :class:`ModelError` for weights that were quantized in another way, for scales that do not
    belong to their weights, and for a matrix in float8 without a scale where others have one or a mark says so.
    """
    scales: dict[str, Tensor] = {}
    read: set[str] = set()
    unscaled = []
    for key in keys:
        start = key.removesuffix("weight")
        names = [name for name in (f"{start}scale_weight", f"{start}weight_scale") if name in stored]
        if len(names) > 1:
            raise ModelError(f"{file.path} holds two scales of {stored[key]!r}")
        if (note := f"{start}comfy_quant") in stored:
            _refuse_other_quantization(file, stored[key], stored[note], has_scale=bool(names))
            read.add(note)
        if names:
            scales[key] = _read_scale(file, stored[key], stored[names[0]])
            read.add(names[0])
        elif _is_float8(file, stored[key]) and len(file.shapes[stored[key]]) == 2:
            unscaled.append(key)
    if unscaled and (scales or any(key.endswith(_MARK) for key in stored)):
        raise ModelError(f"{file.path}: {stored[unscaled[0]]!r} is in float8 and lacks the scale that others have")
    return scales, read


def _read_scale(file: TensorFile, weight: str, name: str) -> Tensor:
    """Read a scale: one number above 0, or one for each row of the weight."""
    shape = file.shapes[weight]
    if not _is_float8(file, weight) or prod(file.shapes[name]) not in (1, shape[0]):
        raise ModelError(f"{file.path}: {name!r} is no scale of its weight")
    scale = file.read([name])[name].float()
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ModelError(f"{file.path}: {name!r} is {shown(scale.flatten()[:3].tolist())}: no scale")
    return scale.reshape(-1, *[1] * (len(shape) - 1))


def _refuse_other_quantization(file: TensorFile, weight: str, note: str, has_scale: bool) -> None:
    """Raise :class:`ModelError` unless the note on a weight says the float8 that the weight is stored in."""
    if prod(file.shapes[note]) > _LONGEST_NOTE or file.dtypes[note] != torch.uint8:
        raise ModelError(f"{file.path}: {note!r} is no note on how a weight is quantized")
    text = bytes(file.read([note])[note].flatten().tolist()).decode("utf-8", "replace")
    kind, dtype = parse_json(text, f"{file.path}: {note}").get("format"), str(file.dtypes[weight])[6:]
    if kind not in ("float8_e4m3fn", "float8_e5m2"):
        raise ModelError(f"{file.path}: {note!r} says {shown(kind)}, and only float8 is read")
    if dtype != kind or not has_scale:
        without = "" if has_scale else " without a scale"
        raise ModelError(f"{file.path}: {note!r} says {kind!r}, and its weight is of {dtype}{without}")


def _is_float8(file: TensorFile, name: str) -> bool:
    return file.dtypes[name] in (torch.float8_e4m3fn, torch.float8_e5m2)
