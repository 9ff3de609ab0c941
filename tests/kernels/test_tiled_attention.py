"""Attention by tiles against attention in float64, beside plain products and torch's own kernel in bfloat16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import attention
from gobelin.kernels import tiled_attention as kernel

pytestmark = pytest.mark.skipif(kernel.LIBRARY is None, reason="needs a C++ compiler and a CPU with AMX")

ROUNDING = torch.finfo(torch.bfloat16).eps
SHAPES = [
    *((1, 1, 1), (1, 77, 12), (5, 1, 3), (31, 32, 40), (32, 31, 15), (33, 33, 16), (64, 64, 31), (65, 63, 32)),
    *((77, 77, 64), (31, 300, 160), (256, 32, 12), (300, 1000, 40), (1000, 300, 80), (15, 4096, 40), (40, 129, 256)),
]


def made(queries: int, keys: int, width: int, size: float = 1.0, batch: int = 2, heads: int = 3) -> list[Tensor]:
    """Query, key and value, each a view of [batch, length, heads · width]."""
    wide = [(size * torch.randn(batch, length, heads * width)).bfloat16() for length in (queries, keys, keys)]
    return [each.unflatten(-1, (heads, width)).transpose(1, 2) for each in wide]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), dim=-1) @ value


def distance(ours: Tensor, truth: Tensor) -> float:
    return (ours.double() - truth).norm().item()


def attended_by_tiles(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The result of the one door, which has to be the kernel's."""
    assert kernel.takes_painting(query, key, value, mask)
    out = attention(query, key, value, mask)
    assert same_bits(out, kernel.attend(query, key, value, mask))
    return out


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_no_farther_from_float64_than_plain_products(shape: tuple[int, int, int], size: float) -> None:
    inputs = made(*shape, size=size)
    truth = exact(*inputs)
    ours, theirs = attended_by_tiles(*inputs), plain(*inputs)
    assert ours.shape == truth.shape
    # Of logits that hardly differ, powers are near 1, where the steps of bfloat16 are the largest for a number's size.
    worst = 1.4 if size < 1 else 1.1
    assert distance(ours, truth) <= worst * distance(theirs, truth) + 1e-6 * size * truth.numel() ** 0.5
    assert distance(ours, truth) <= 2 * ROUNDING * truth.norm()


@pytest.mark.parametrize("strided", ["expanded", "transposed", "sliced", "steps", "contiguous"])
def test_any_strides_will_do(strided: str) -> None:
    inputs = made(40, 72, 24)
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
    ours = attended_by_tiles(*inputs)
    assert torch.equal(ours, attended_by_tiles(*(each.clone(memory_format=torch.contiguous_format) for each in inputs)))
    assert ours.transpose(1, 2).is_contiguous()
    assert distance(ours, exact(*inputs)) <= ROUNDING * exact(*inputs).norm()


@pytest.mark.parametrize("width", [12, 40, 80])
@pytest.mark.parametrize("size", [30, 100, 300])
def test_where_the_bound_is_far_above_every_logit_the_largest_are_found(width: int, size: float) -> None:
    query, key, value = made(40, 300, width)
    query, key = size * query, size * key
    logits = query.double() @ key.double().transpose(-1, -2) * width**-0.5
    bounds = query.double().norm(dim=-1) * key.double().norm(dim=-1).max() * width**-0.5
    assert (bounds - logits.amax(dim=-1)).max() > 180  # in powers of e: 2^-260 of the bound's
    ours, truth = attended_by_tiles(query, key, value), exact(query, key, value)
    assert ours.isfinite().all()
    assert distance(ours, truth) <= 1.05 * distance(F.scaled_dot_product_attention(query, key, value), truth) + 1e-6


def test_constant_logits_of_any_height_are_a_mean() -> None:
    *_, value = made(5, 37, 8)
    mean = value.double().mean(dim=2, keepdim=True).expand(-1, -1, 5, -1)
    for height in (-1e4, -50.0, 0.0, 50.0, 1e4):
        query, key = torch.full((2, 3, 5, 8), height).bfloat16(), torch.ones(2, 3, 37, 8).bfloat16()
        assert distance(attended_by_tiles(query, key, value), mean) <= ROUNDING * mean.norm()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_reaches_what_depends_on_it_and_no_more(which: int, number: float) -> None:
    inputs = made(70, 36, 12)
    inputs[which] = inputs[which].clone()
    inputs[which][0, 1, 7, 5] = number
    wanted = exact(*inputs).isfinite()
    if number == 3e38 and which < 2:  # as a logit it is no number in bfloat16, or one key's alone, as its sign decides
        assert attended_by_tiles(*inputs)[1].isfinite().all()
        return
    ours = attended_by_tiles(*inputs)
    assert torch.equal(ours.isfinite(), wanted)
    assert distance(ours[wanted], exact(*inputs)[wanted]) <= 2 * ROUNDING * exact(*inputs)[wanted].norm()


@pytest.mark.parametrize("keys", [1, 31, 77, 100, 231])
def test_a_hidden_key_is_as_one_that_is_not_there(keys: int) -> None:
    query, key, value = made(40, keys, 24)
    mask = torch.rand(2, 1, 1, keys) < 0.5
    mask[..., 0] = True
    ours = attended_by_tiles(query, key, value, mask)
    truth = exact(query, key, value, mask.expand(-1, 3, 40, -1))
    assert distance(ours, truth) <= ROUNDING * truth.norm()
    spoilt = [each.clone() for each in (key, value)]
    for each in spoilt:
        each.masked_fill_(~mask.transpose(-1, -2), torch.nan)
    assert torch.equal(attended_by_tiles(query, *spoilt, mask), ours)


def test_where_no_key_may_be_seen_the_result_is_no_number() -> None:
    query, key, value = made(40, 20, 24)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1] = False
    ours = attended_by_tiles(query, key, value, mask)
    assert ours[0].isfinite().all()
    assert ours[1].isnan().all()


@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 20), (2, 3, 1, 20), (2, 1, 40, 20)])
def test_other_masks_are_torchs(mask_shape: tuple[int, ...]) -> None:
    inputs = made(40, 20, 24)
    mask = torch.rand(mask_shape) < 0.8
    mask[..., 0] = True
    assert torch.equal(attention(*inputs, mask), F.scaled_dot_product_attention(*inputs, attn_mask=mask))
    assert not kernel.takes_painting(*inputs, mask)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_where_gradients_are_wanted_there_are_some(which: int) -> None:
    inputs = made(40, 20, 24)
    inputs[which] = inputs[which].detach().requires_grad_()
    assert torch.autograd.grad(attention(*inputs).float().sum(), inputs[which])[0].isfinite().all()


def run(code: str, **environment: str) -> None:
    code = "import torch; from gobelin.attention import attention; import torch.nn.functional as F\n" + code
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)


def test_the_compiler_is_given_an_operator() -> None:
    torch.library.opcheck(torch.ops.gobelin.tiled_attention.default, (*made(40, 20, 24), None))
    run(
        "inputs = [torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3)]\n"
        "graph = torch.compile(attention, backend='eager', fullgraph=True)\n"
        "assert torch.equal(graph(*inputs), attention(*inputs))"
    )


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    inputs = made(300, 200, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(kernel.attend(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found)


def test_what_does_not_fit_is_refused() -> None:
    run(
        "import pytest; from gobelin.kernels.tiled_attention import attend\n"
        "query, key, value = (torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3))\n"
        "for wrong in ([query, key[..., 1:], value], [query, key, value[:, :, 1:]], [query.float(), key, value]):\n"
        "    with pytest.raises(ValueError, match='give bfloat16 on a CPU, whose shapes fit'):\n"
        "        attend(*wrong)"
    )


def test_without_a_compiler_torchs_kernel_computes(tmp_path: Path) -> None:
    run(
        "inputs = [torch.randn(1, 2, 9, 8).bfloat16() for _ in range(3)]\n"
        "assert torch.equal(attention(*inputs), F.scaled_dot_product_attention(*inputs))",
        CXX="/nowhere/c++",
        XDG_CACHE_HOME=str(tmp_path),
    )
