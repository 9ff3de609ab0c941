"""The fused kernel against attention in float64, beside the plain products in bfloat16 that it stands in for."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gobelin.attention import attention, training_attention
from gobelin.kernels import fused_attention as kernel
from gobelin.kernels import operators
from gobelin.layers import Attention

pytestmark = pytest.mark.skipif(
    training_attention() != "fused", reason="needs a C++ compiler and a CPU with AVX512-BF16"
)

ROUNDING = torch.finfo(torch.bfloat16).eps
SHAPES = [
    *((1, 1, 1), (1, 77, 12), (5, 1, 3), (2, 2, 40), (16, 16, 36), (17, 33, 24), (77, 77, 80), (31, 300, 160)),
    *((256, 256, 12), (256, 32, 12), (64, 64, 24), (300, 1000, 40), (1000, 300, 1), (15, 4096, 12), (4096, 15, 12)),
]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), dim=-1) @ value


def made(queries: int, keys: int, width: int, size: float = 1.0, batch: int = 2, heads: int = 3) -> list[Tensor]:
    """Query, key, value and the gradient of the result, each a view of [batch, length, heads · width]."""
    lengths = (queries, keys, keys, queries)
    wide = [(size * torch.randn(batch, length, heads * width)).bfloat16() for length in lengths]
    return [each.unflatten(-1, (heads, width)).transpose(1, 2) for each in wide]


def there_and_back(attend, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result, and the gradients of query, key and value."""
    *rows, grad = (each.to(dtype) for each in inputs)
    rows = [each.detach().requires_grad_() for each in rows]
    out = attend(*rows)
    return [out.detach(), *torch.autograd.grad(out, rows, grad)]


def distance(ours: Tensor, exact: Tensor) -> float:
    return (ours.double() - exact).norm().item()


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_and_gradients_are_no_farther_from_float64_than_plain_ones(
    shape: tuple[int, int, int], size: float
) -> None:
    inputs = made(*shape, size=size)
    exact = there_and_back(plain, inputs, torch.float64)
    rounded = there_and_back(plain, inputs, torch.bfloat16)
    ours = there_and_back(attention, inputs, torch.bfloat16)
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        assert mine.shape == truth.shape
        zero = 1e-5 * size**3 * truth.numel() ** 0.5  # of one key, two of the gradients are zero
        assert distance(mine, truth) <= 1.1 * distance(theirs, truth) + zero
        assert distance(mine, truth) <= 4 * ROUNDING * truth.norm() + zero


@pytest.mark.parametrize("shape", [(16, 16, 36), (256, 256, 12), (60, 1000, 40)], ids=str)
def test_what_all_keys_and_values_share_costs_no_more_than_it_costs_plain_products(shape: tuple[int, int, int]) -> None:
    inputs = [each + shared for each, shared in zip(made(*shape), (0, 3, 3, 0), strict=True)]
    exact = there_and_back(plain, inputs, torch.float64)
    rounded = there_and_back(plain, inputs, torch.bfloat16)
    for mine, theirs, truth in zip(there_and_back(attention, inputs, torch.bfloat16), rounded, exact, strict=True):
        assert distance(mine, truth) <= 1.1 * distance(theirs, truth)


@pytest.mark.parametrize("strided", ["expanded", "transposed", "sliced", "steps", "contiguous"])
def test_any_strides_will_do(strided: str) -> None:
    inputs = made(20, 36, 12)
    match strided:
        case "expanded":
            inputs = [each[:1, :1].expand(2, 3, -1, -1) for each in inputs]
        case "transposed":
            inputs = [each.transpose(-1, -2).contiguous().transpose(-1, -2) for each in inputs]
        case "sliced":
            inputs = [each[:, 1:, 3:, 2:9] for each in inputs]
        case "steps":
            inputs = [each[..., ::2, ::2] for each in inputs]
        case "contiguous":
            inputs = [each.contiguous() for each in inputs]
    ours = there_and_back(attention, inputs, torch.bfloat16)
    copies = [each.clone(memory_format=torch.contiguous_format) for each in inputs]
    same = there_and_back(attention, copies, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(ours, same, strict=True))
    exact = there_and_back(plain, inputs, torch.float64)
    for mine, truth in zip(ours, exact, strict=True):
        assert distance(mine, truth) <= 2 * ROUNDING * truth.norm()


def test_the_heads_are_joined_without_a_copy() -> None:
    inputs = made(20, 36, 12)
    for each in there_and_back(attention, inputs, torch.bfloat16):
        assert each.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("width", [12, 40])
def test_logits_of_ten_thousand_are_no_nan(width: int) -> None:
    query, key, value, grad = made(40, 300, width)
    inputs = [100 * query, 100 * key, value, grad]
    logits = inputs[0].double() @ inputs[1].double().transpose(-1, -2) * width**-0.5
    assert logits.max() > 1e4
    assert logits.min() < -1e4
    exact = there_and_back(plain, inputs, torch.float64)
    rounded = there_and_back(plain, inputs, torch.bfloat16)
    ours = there_and_back(attention, inputs, torch.bfloat16)
    assert all(each.isfinite().all() for each in ours)
    assert distance(ours[0], exact[0]) <= 2 * ROUNDING * exact[0].norm()
    for mine, theirs, truth in zip(ours, rounded, exact, strict=True):
        assert distance(mine, truth) <= 1.1 * distance(theirs, truth)


def test_constant_logits_of_any_height_are_a_mean() -> None:
    _, _, value, _ = made(5, 37, 8)
    for height in (-1e4, -50.0, 0.0, 50.0, 1e4):
        query = torch.full((2, 3, 5, 8), height).bfloat16().requires_grad_()
        key = torch.ones(2, 3, 37, 8).bfloat16()
        mean = value.double().mean(dim=2, keepdim=True).expand(-1, -1, 5, -1)
        out = attention(query, key, value)
        assert distance(out, mean) <= ROUNDING * mean.norm()
        assert torch.autograd.grad(out.float().sum(), query)[0].isfinite().all()  # padding has logits of 0


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_nan_reaches_what_depends_on_it_and_no_more(which: int) -> None:
    inputs = made(20, 36, 12)
    inputs[which] = inputs[which].clone()
    inputs[which][0, 1, 7, 5] = torch.nan
    exact = there_and_back(plain, inputs, torch.float64)
    for mine, truth in zip(there_and_back(attention, inputs, torch.bfloat16), exact, strict=True):
        assert torch.equal(mine.isnan(), truth.isnan())


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_bits_do_not_depend_on_threads_or_on_the_run() -> None:
    inputs = made(100, 70, 12, batch=5)
    runs = []
    for threads in (1, 2, 2, 3, 1):
        torch.set_num_threads(threads)
        runs.append(there_and_back(attention, inputs, torch.bfloat16))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))
    lines = Path("/proc/self/maps").read_text().splitlines()
    openmp = {line.split()[-1] for line in lines if any(name in line for name in ("libgomp", "libomp", "libiomp"))}
    assert len(openmp) == 1


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    inputs = made(33, 47, 12, batch=3)
    whole = there_and_back(attention, inputs, torch.bfloat16)
    alone = there_and_back(attention, [each[1:2, 2:] for each in inputs], torch.bfloat16)
    assert all(torch.equal(one[1:2, 2:], other) for one, other in zip(whole, alone, strict=True))


def test_the_operators_are_what_torch_expects_of_operators() -> None:
    query, key, value, grad = made(20, 36, 12)
    trained = [each.detach().requires_grad_() for each in (query, key, value)]
    torch.library.opcheck(kernel._forward, tuple(trained))
    out, remainder, log_sum_exp = kernel._forward(query, key, value)
    exact = plain(query.double(), key.double(), value.double())
    assert distance(out.double() + remainder.double(), exact) < 0.7 * distance(out, exact)
    logits = query.double() @ key.double().transpose(-1, -2) * 12**-0.5
    assert torch.allclose(log_sum_exp.double(), logits.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(kernel._backward, (grad, query, key, value, out, remainder, log_sum_exp))


def gradients(attend, layer: Attention) -> list[Tensor]:
    """The layer's gradients under autocast."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(torch.randn(2, 20, 24), torch.randn(2, 7, 10))
    return list(torch.autograd.grad(out.float().square().sum(), list(layer.parameters())))


def test_a_layer_that_is_checkpointed_learns_the_same() -> None:
    layer = Attention(24, heads=2, context_width=10)
    checkpointed = gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False), layer)
    assert all(torch.equal(one, other) for one, other in zip(checkpointed, gradients(layer, layer), strict=True))


# Not in this process: the checks of types are nothing that could be compiled.
COMPILED = f"""
import torch
from torch import Tensor
from gobelin.layers import Attention

{inspect.getsource(gradients)}
layer = Attention(24, heads=2, context_width=10)
compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True), layer)
assert all(torch.equal(one, other) for one, other in zip(compiled, gradients(layer, layer), strict=True))
"""


def run(program: str) -> str:
    """Run a program in a process of its own; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout


def test_a_layer_that_is_compiled_before_the_kernel_is_loaded_learns_the_same() -> None:
    run(COMPILED)


def test_only_what_trains_in_bfloat16_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = made(20, 36, 12)[:3]
    calls = []
    monkeypatch.setattr(kernel._KERNEL, "run", lambda function, problem: calls.append(function))
    attention(*inputs)
    attention(*(each.float().requires_grad_() for each in inputs))
    trained = [each.detach().requires_grad_() for each in inputs]
    attention(*trained, mask=torch.ones(1, 1, 1, 36, dtype=torch.bool))
    attention(*(each[:, :, :20] for each in trained), causal=True)
    assert attention(trained[0][:, :, :0], *trained[1:]).shape == (2, 3, 0, 12)
    assert not kernel.takes_training(trained[0], *(each[:1] for each in trained[1:]))
    assert not kernel.takes_training(trained[0], trained[1], trained[2][:, :, 1:])
    assert calls == []
    attention(*trained)
    assert calls == ["attention_forward"]


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """The library is looked for again, before and after."""
    vars(kernel._KERNEL).pop("library", None)
    yield
    vars(kernel._KERNEL).pop("library", None)


@pytest.mark.usefixtures("_forgotten")
def test_without_a_compiler_products_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert training_attention() == "plain"
    inputs = made(20, 36, 12)
    ours, theirs = (there_and_back(attend, inputs, torch.bfloat16) for attend in (attention, plain))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("_forgotten")
def test_a_cpu_without_the_instructions_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(operators, "load_library", lambda *_: pytest.fail("compiled"))
    assert training_attention() == "plain"


def test_nothing_is_imported_before_it_trains() -> None:
    modules = run("import sys, gobelin.layers; print(*(name for name in sys.modules if name.startswith('gobelin')))")
    assert "gobelin.attention" in modules
    assert "gobelin.kernels." not in modules
