"""Attention by vectors, in float32 and bfloat16, against attention in float64, beside how others compute it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import attention
from gobelin.kernels import vector_attention as kernel
from gobelin.kernels.hardware import has_instructions

pytestmark = pytest.mark.skipif(kernel.VECTOR_LIBRARY is None, reason="needs a C++ compiler and a CPU with AVX2")

SHAPES = [
    *((1, 1, 1), (1, 77, 12), (5, 1, 3), (31, 32, 40), (32, 31, 15), (33, 33, 16), (64, 64, 31), (65, 63, 32)),
    *((77, 77, 64), (31, 300, 160), (256, 32, 12), (300, 1000, 40), (1000, 300, 80), (15, 4096, 40), (40, 129, 256)),
]


class Precision(NamedTuple):
    """A precision in which the kernel computes, and what else computes in it."""

    dtype: torch.dtype
    attend: Callable[..., Tensor]
    takes: Callable[..., bool]

    @property
    def rounding(self) -> float:
        return torch.finfo(self.dtype).eps

    def made(
        self, queries: int, keys: int, width: int, size: float = 1.0, batch: int = 2, heads: int = 3
    ) -> list[Tensor]:
        """Query, key and value, each a view of [batch, length, heads · width]."""
        wide = [size * torch.randn(batch, length, heads * width) for length in (queries, keys, keys)]
        return [each.to(self.dtype).unflatten(-1, (heads, width)).transpose(1, 2) for each in wide]

    def attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """The result of the kernel, which is that of the one door wherever the kernel is the faster one."""
        out = self.attend(query, key, value, mask)
        if self.takes(query, key, value, mask):
            assert same_bits(out, attention(query, key, value, mask))
        return out

    def other(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Torch's kernel in float32, and plain products in bfloat16: of few keys, torch's kernel rounds less."""
        if self.dtype == torch.float32:
            return F.scaled_dot_product_attention(query, key, value)
        return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), dim=-1) @ value


FLOAT32 = Precision(torch.float32, kernel.attend_in_float32, kernel.takes_float32)
BFLOAT16 = Precision(torch.bfloat16, kernel.attend_in_bfloat16, kernel.takes_bfloat16)


@pytest.fixture(params=[FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    if request.param is BFLOAT16 and not has_instructions("avx512_bf16"):
        pytest.skip("needs a CPU with AVX512-BF16")
    return request.param


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)


def distance(ours: Tensor, truth: Tensor) -> float:
    return (ours.double() - truth).norm().item()


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_no_farther_from_float64_than_others(
    precision: Precision, shape: tuple[int, int, int], size: float
) -> None:
    inputs = precision.made(*shape, size=size, batch=max(2, 400 // shape[0]))  # of few numbers, errors are luck
    truth = exact(*inputs)
    ours, theirs = precision.attended(*inputs), precision.other(*inputs)
    assert ours.shape == truth.shape
    # Of a single row, torch's sums go along lanes, and are shorter; and so are MKL's on AMD's CPUs, of wide heads.
    worst = 1.5 if len(ours[0, 0]) == 1 else 2.5 if shape[2] > 160 else 1.2
    assert distance(ours, truth) <= worst * distance(theirs, truth) + precision.rounding / 4 * truth.norm()


def test_powers_are_as_exact_as_rounding_allows(precision: Precision) -> None:
    # One number wide, the first of two keys has a logit of zero, and the value of the second is its share.
    logits = torch.linspace(-87, 0, 100_000).to(precision.dtype)
    query = logits[None, None, :, None]
    key = value = torch.tensor([0.0, 1.0], dtype=precision.dtype)[None, None, :, None]
    shares = precision.attended(query, key, value).flatten().double()
    errors = (shares / torch.sigmoid(logits.double()) - 1).abs()
    if precision is BFLOAT16:  # the power is rounded, and so is its share of the sum
        assert errors.max() <= 1.1 * precision.rounding
        return
    # Rounding of the power itself, of log2(e) and of their product; in an exponential of lower degree 3e-6.
    assert errors.max() <= precision.rounding * (87 + 4) / 2
    assert errors[logits > -1].max() <= 4 * precision.rounding


@pytest.mark.parametrize("strided", ["expanded", "transposed", "sliced", "steps", "contiguous"])
def test_any_strides_will_do(precision: Precision, strided: str) -> None:
    inputs = precision.made(80, 144, 24)
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
    ours = precision.attended(*inputs)
    copies = [each.clone(memory_format=torch.contiguous_format) for each in inputs]
    assert torch.equal(ours, precision.attended(*copies))
    assert ours.transpose(1, 2).is_contiguous()
    assert distance(ours, exact(*inputs)) <= 4 * precision.rounding * exact(*inputs).norm()


@pytest.mark.parametrize("width", [12, 40, 80])
@pytest.mark.parametrize("size", [30, 100, 300])
def test_logits_may_be_far_apart(precision: Precision, width: int, size: float) -> None:
    query, key, value = precision.made(40, 300, width, batch=20)  # of few, errors are luck
    query, key = size * query, size * key
    ours, truth = precision.attended(query, key, value), exact(query, key, value)
    assert ours.isfinite().all()
    luck = 1e-6 + precision.rounding**2 * truth.norm()  # where one key has nearly all, hardly a number is rounded
    assert distance(ours, truth) <= 1.2 * distance(F.scaled_dot_product_attention(query, key, value), truth) + luck


@pytest.mark.parametrize("rising", [True, False])
def test_the_largest_logit_may_come_first_or_last(precision: Precision, rising: bool) -> None:
    query = torch.ones(1, 1, 5, 1, dtype=precision.dtype)
    key = torch.linspace(-200, 200, 500).to(precision.dtype)[None, None, :, None]
    key, value = key if rising else -key, precision.made(1, 500, 1)[2][:1, :1]
    truth = exact(query, key, value)
    assert distance(precision.attended(query, key, value), truth) <= 16 * precision.rounding * truth.norm()


def test_constant_logits_of_any_height_are_a_mean(precision: Precision) -> None:
    *_, value = precision.made(5, 137, 8)
    mean = value.double().mean(dim=2, keepdim=True).expand(-1, -1, 5, -1)
    for height in (-1e30, -1e4, -50.0, 0.0, 50.0, 1e4, 1e30):
        query = torch.full((2, 3, 5, 8), height, dtype=precision.dtype)
        key = torch.ones(2, 3, 137, 8, dtype=precision.dtype)
        assert distance(precision.attended(query, key, value), mean) <= 4 * precision.rounding * mean.norm()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_reaches_what_depends_on_it_and_no_more(
    precision: Precision, which: int, number: float
) -> None:
    inputs = precision.made(70, 136, 12)
    inputs[which] = inputs[which].clone()
    inputs[which][0, 1, 7, 5] = number
    query, key, value = (each.float() for each in inputs)
    wanted = torch.softmax(query @ key.transpose(-1, -2) * 12**-0.5, dim=-1) @ value
    ours = precision.attended(*inputs)
    assert torch.equal(ours.isfinite(), wanted.isfinite())
    finite = wanted.isfinite()
    assert distance(ours[finite], wanted[finite].double()) <= 8 * precision.rounding * wanted[finite].double().norm()


def test_a_logit_of_minus_infinity_is_no_share(precision: Precision) -> None:
    query, key = (torch.ones(1, 1, length, 1, dtype=precision.dtype) for length in (3, 200))
    key, value = 0 * key, precision.made(1, 200, 1)[2][:1, :1]
    key[:, :, :130] = -torch.inf
    mean = value[:, :, 130:].double().mean(dim=2, keepdim=True).expand(-1, -1, 3, -1)
    assert distance(precision.attended(query, key, value), mean) <= 8 * precision.rounding * mean.norm() + 1e-7
    assert precision.attended(query, torch.full_like(key, -torch.inf), value).isnan().all()


@pytest.mark.parametrize("keys", [1, 31, 77, 100, 231])
def test_a_hidden_key_is_as_one_that_is_not_there(precision: Precision, keys: int) -> None:
    query, key, value = precision.made(40, keys, 24)
    mask = torch.rand(2, 1, 1, keys) < 0.5
    mask[..., 0] = True
    ours = precision.attended(query, key, value, mask)
    truth = exact(query, key, value, mask.expand(-1, 3, 40, -1))
    assert distance(ours, truth) <= 4 * precision.rounding * truth.norm()
    spoilt = [each.clone() for each in (key, value)]
    for each in spoilt:
        each.masked_fill_(~mask.transpose(-1, -2), torch.nan)
    assert torch.equal(precision.attended(query, *spoilt, mask), ours)
    for row in range(2):
        seen = mask[row].flatten()
        there = precision.attended(query[row:][:1], key[row:][:1, :, seen], value[row:][:1, :, seen])
        assert torch.equal(ours[row:][:1], there)


def test_where_no_key_may_be_seen_the_result_is_no_number(precision: Precision) -> None:
    query, key, value = precision.made(40, 20, 24)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1] = False
    ours = precision.attended(query, key, value, mask)
    assert ours[0].isfinite().all()
    assert ours[1].isnan().all()


@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 200), (2, 3, 1, 200), (2, 1, 200, 200)])
def test_other_masks_are_torchs(precision: Precision, mask_shape: tuple[int, ...]) -> None:
    inputs = precision.made(200, 200, 24)
    mask = torch.rand(mask_shape) < 0.8
    mask[..., 0] = True
    assert torch.equal(attention(*inputs, mask), F.scaled_dot_product_attention(*inputs, attn_mask=mask))
    assert not precision.takes(*inputs, mask)


def test_the_one_door_leads_to_it(precision: Precision) -> None:
    inputs = precision.made(200, 200, 24)
    assert precision.takes(*inputs) is (precision is FLOAT32 or not has_instructions("amx_bf16"))
    assert not precision.takes(*(each.half() for each in inputs))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_where_gradients_are_wanted_there_are_torchs(which: int) -> None:
    inputs = FLOAT32.made(200, 200, 24)
    inputs[which] = inputs[which].detach().requires_grad_()
    ours = torch.autograd.grad(attention(*inputs).sum(), inputs[which])[0]
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).sum(), inputs[which])[0]
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_that_torch_makes_is_torchs(precision: Precision) -> None:
    inputs = [torch.stack([each, 2 * each]) for each in precision.made(200, 200, 24)]
    ours = torch.func.vmap(attention)(*inputs)
    close = max(1e-5, precision.rounding)
    assert torch.allclose(ours, F.scaled_dot_product_attention(*inputs), atol=close, rtol=close)


def run(code: str, **environment: str) -> None:
    code = "import torch; from gobelin.attention import attention; import torch.nn.functional as F\n" + code
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)


def test_the_compiler_is_given_an_operator(precision: Precision) -> None:
    torch.library.opcheck(torch.ops.gobelin.vector_attention.default, (*precision.made(40, 20, 24), None))
    run(
        "inputs = [torch.randn(1, 2, 200, 24) for _ in range(3)]\n"
        "graph = torch.compile(attention, backend='eager', fullgraph=True)\n"
        "assert torch.equal(graph(*inputs), attention(*inputs))\n"
        "assert not torch.equal(attention(*inputs), F.scaled_dot_product_attention(*inputs))"
    )


def test_what_is_exported_has_torchs_operators_alone() -> None:
    run(
        "class Attends(torch.nn.Module):\n"
        "    def forward(self, query, key, value):\n"
        "        return attention(query, key, value)\n"
        "inputs = tuple(torch.randn(1, 2, 200, 24) for _ in range(3))\n"
        "for strict in (True, False):\n"
        "    graph = torch.export.export(Attends(), inputs, strict=strict).graph\n"
        "    assert not [node for node in graph.nodes if 'gobelin' in str(node.target)]\n"
        "assert torch.equal(torch.jit.trace(Attends(), inputs)(*inputs), F.scaled_dot_product_attention(*inputs))"
    )


def test_bits_do_not_depend_on_the_number_of_threads(precision: Precision) -> None:
    inputs = precision.made(300, 200, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(precision.attend(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found)


def test_what_does_not_fit_is_refused() -> None:
    run(
        "import pytest; from gobelin.kernels.vector_attention import attend_in_float32 as attend\n"
        "query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))\n"
        "for wrong in ([query, key[..., 1:], value], [query, key, value[:, :, 1:]], [query.bfloat16(), key, value]):\n"
        "    with pytest.raises(ValueError, match='give float32 on a CPU, whose shapes fit'):\n"
        "        attend(*wrong)"
    )


def test_without_a_compiler_torchs_kernel_computes(tmp_path: Path) -> None:
    run(
        "inputs = [torch.randn(1, 2, 200, 24) for _ in range(3)]\n"
        "assert torch.equal(attention(*inputs), F.scaled_dot_product_attention(*inputs))",
        CXX="/nowhere/c++",
        XDG_CACHE_HOME=str(tmp_path),
    )
