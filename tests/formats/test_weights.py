import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from gobelin.errors import ModelError
from gobelin.formats.weights import load_into, parameter_count, read_tensors, write_tensors


def header(file: Path) -> dict:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_come_back_as_they_were_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 4).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    tensors["not.contiguous"] = torch.randn(4, 3).to(dtype).T
    file = tmp_path / "new" / "model.safetensors"
    write_tensors(file, tensors)
    loaded = read_tensors(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)
    assert header(file)["__metadata__"] == {"format": "pt"}
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weight file at .*lost\.safetensors"):
        read_tensors(tmp_path / "lost.safetensors")
    with pytest.raises(ModelError, match="no weight file at"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"a": torch.ones(10)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is (empty|not a whole safetensors file: .* it was cut)"):
        read_tensors(file)


def test_loading_casts_or_keeps_each_tensors_precision() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    tensors = {"weight": torch.randn(3, 2), "bias": torch.randn(3).bfloat16()}
    load_into(module, tensors, Path("x"))
    assert (module.weight.dtype, module.bias.dtype) == (torch.float32, torch.bfloat16)
    load_into(module, tensors, Path("x"), torch.float16)
    assert module.weight.dtype == module.bias.dtype == torch.float16
    assert torch.equal(module.weight, tensors["weight"].half())
    assert module.weight.requires_grad


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": (3, 2)}, "here lacks 'bias': it"),
        ({}, "here lacks 'bias' (and 1 more): it"),
        ({"weight": (3, 2), "bias": (3,), "zeta": (1,)}, "here holds 'zeta', which"),
        ({"weight": (3, 2), "bias": (3,), "zeta": (1,), "alpha": (1,), "eta": (1,)}, "holds 'alpha' (and 2 more), w"),
        ({"weight": (2, 3), "bias": (3,)}, "here: 'weight' is [2, 3], but the configuration says [3, 2]"),
        ({"weight": (3, 2), "bias": ()}, "here: 'bias' is [], but the configuration says [3]"),
    ],
)
def test_the_first_key_that_does_not_fit_is_named(tensors: dict, message: str) -> None:
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(ModelError) as caught:
        load_into(module, {name: torch.zeros(shape) for name, shape in tensors.items()}, Path("here"))
    assert message in str(caught.value)
    assert torch.equal(module.weight, before)


def test_parameter_count_counts_numbers() -> None:
    assert parameter_count(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))) == 2 * 3 + 3 + 3 + 3
