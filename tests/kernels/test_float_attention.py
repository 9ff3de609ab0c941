"""Attention in float32 by vectors against attention in float64, beside torch's own kernel in float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import attention
from gobelin.kernels import float_attention as kernel

pytestmark = pytest.mark.skipif(kernel.FLOAT_LIBRARY is None, reason="needs a C++ compiler and a CPU with AVX-512")

ROUNDING = torch.finfo(torch.float32).eps
SHAPES = [
    *((1, 1, 1), (1, 77, 12), (5, 1, 3), (31, 32, 40), (32, 31, 15), (33, 33, 16), (64, 64, 31), (65, 63, 32)),
    *((77, 77, 64), (31, 300, 160), (256, 32, 12), (300, 1000, 40), (1000, 300, 80), (15, 4096, 40), (40, 129, 256)),
]


def made(queries: int, keys: int, width: int, size: float = 1.0, batch: int = 2, heads: int = 3) -> list[Tensor]:
    """Query, key and value, each a view of [batch, length, heads · width]."""
    wide = [size * torch.randn(batch, length, heads * width) for length in (queries, keys, keys)]
    return [each.unflatten(-1, (heads, width)).transpose(1, 2) for each in wide]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)


def distance(ours: Tensor, truth: Tensor) -> float:
    return (ours.double() - truth).norm().item()


def attended_by_vectors(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """The result of the kernel, which is that of the one door wherever the kernel is the faster one."""
    out = kernel.attend_in_float32(query, key, value, mask)
    if kernel.takes_float32(query, key, value, mask):
        assert same_bits(out, attention(query, key, value, mask))
    return out


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_no_farther_from_float64_than_torchs_kernel(shape: tuple[int, int, int], size: float) -> None:
    inputs = made(*shape, size=size, batch=max(2, 400 // shape[0]))  # of few numbers, errors are luck
    truth = exact(*inputs)
    ours, theirs = attended_by_vectors(*inputs), F.scaled_dot_product_attention(*inputs)
    assert ours.shape == truth.shape
    worst = 1.2 if len(ours[0, 0]) > 1 else 1.5  # of a single row, torch's sums go along lanes, and are shorter
    assert distance(ours, truth) <= worst * distance(theirs, truth) + ROUNDING / 4 * truth.norm()


def test_powers_are_as_exact_as_rounding_allows() -> None:
    # One number wide, the first of two keys has a logit of zero, and the value of the second is its share.
    logits = torch.linspace(-87, 0, 100_000)
    query = logits[None, None, :, None]
    key, value = torch.tensor([0.0, 1.0])[None, None, :, None], torch.tensor([0.0, 1.0])[None, None, :, None]
    shares = attended_by_vectors(query, key, value).flatten().double()
    # Rounding of the power itself, of log2(e) and of their product; in an exponential of lower degree 3e-6.
    assert (shares / torch.sigmoid(logits.double()) - 1).abs().max() <= ROUNDING * (87 + 4) / 2
    near = logits > -1
    assert (shares / torch.sigmoid(logits.double()) - 1)[near].abs().max() <= 4 * ROUNDING


@pytest.mark.parametrize("strided", ["expanded", "transposed", "sliced", "steps", "contiguous"])
def test_any_strides_will_do(strided: str) -> None:
    inputs = made(80, 144, 24)
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
    ours = attended_by_vectors(*inputs)
    copies = [each.clone(memory_format=torch.contiguous_format) for each in inputs]
    assert torch.equal(ours, attended_by_vectors(*copies))
    assert ours.transpose(1, 2).is_contiguous()
    assert distance(ours, exact(*inputs)) <= 4 * ROUNDING * exact(*inputs).norm()


@pytest.mark.parametrize("width", [12, 40, 80])
@pytest.mark.parametrize("size", [30, 100, 300])
def test_logits_may_be_far_apart(width: int, size: float) -> None:
    query, key, value = made(40, 300, width)
    query, key = size * query, size * key
    ours, truth = attended_by_vectors(query, key, value), exact(query, key, value)
    assert ours.isfinite().all()
    assert distance(ours, truth) <= 1.2 * distance(F.scaled_dot_product_attention(query, key, value), truth) + 1e-6


@pytest.mark.parametrize("rising", [True, False])
def test_the_largest_logit_may_come_first_or_last(rising: bool) -> None:
    query, key, value = torch.ones(1, 1, 5, 1), torch.linspace(-200, 200, 500)[None, None, :, None], made(1, 500, 1)[2]
    key = key if rising else -key
    truth = exact(query, key, value[:1, :1])
    assert distance(attended_by_vectors(query, key, value[:1, :1]), truth) <= 16 * ROUNDING * truth.norm()


def test_constant_logits_of_any_height_are_a_mean() -> None:
    *_, value = made(5, 137, 8)
    mean = value.double().mean(dim=2, keepdim=True).expand(-1, -1, 5, -1)
    for height in (-1e30, -1e4, -50.0, 0.0, 50.0, 1e4, 1e30):
        query, key = torch.full((2, 3, 5, 8), height), torch.ones(2, 3, 137, 8)
        assert distance(attended_by_vectors(query, key, value), mean) <= 4 * ROUNDING * mean.norm()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_reaches_what_depends_on_it_and_no_more(which: int, number: float) -> None:
    inputs = made(70, 136, 12)
    inputs[which] = inputs[which].clone()
    inputs[which][0, 1, 7, 5] = number
    logits = inputs[0] @ inputs[1].transpose(-1, -2) * 12**-0.5
    wanted = torch.softmax(logits, dim=-1) @ inputs[2]
    ours = attended_by_vectors(*inputs)
    assert torch.equal(ours.isfinite(), wanted.isfinite())
    finite = wanted.isfinite()
    assert distance(ours[finite], wanted[finite].double()) <= 8 * ROUNDING * wanted[finite].double().norm()


def test_a_logit_of_minus_infinity_is_no_share() -> None:
    query, key, value = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 200, 1), made(1, 200, 1)[2][:1, :1]
    key[:, :, :130] = -torch.inf
    mean = value[:, :, 130:].double().mean(dim=2, keepdim=True).expand(-1, -1, 3, -1)
    assert distance(attended_by_vectors(query, key, value), mean) <= 8 * ROUNDING * mean.norm() + 1e-7
    assert attended_by_vectors(query, torch.full_like(key, -torch.inf), value).isnan().all()


@pytest.mark.parametrize("keys", [1, 31, 77, 100, 231])
def test_a_hidden_key_is_as_one_that_is_not_there(keys: int) -> None:
    query, key, value = made(40, keys, 24)
    mask = torch.rand(2, 1, 1, keys) < 0.5
    mask[..., 0] = True
    ours = attended_by_vectors(query, key, value, mask)
    truth = exact(query, key, value, mask.expand(-1, 3, 40, -1))
    assert distance(ours, truth) <= 4 * ROUNDING * truth.norm()
    spoilt = [each.clone() for each in (key, value)]
    for each in spoilt:
        each.masked_fill_(~mask.transpose(-1, -2), torch.nan)
    assert torch.equal(attended_by_vectors(query, *spoilt, mask), ours)
    for row in range(2):
        seen = mask[row].flatten()
        there = attended_by_vectors(query[row:][:1], key[row:][:1, :, seen], value[row:][:1, :, seen])
        assert torch.equal(ours[row:][:1], there)


def test_where_no_key_may_be_seen_the_result_is_no_number() -> None:
    query, key, value = made(40, 20, 24)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1] = False
    ours = attended_by_vectors(query, key, value, mask)
    assert ours[0].isfinite().all()
    assert ours[1].isnan().all()


@pytest.mark.parametrize("mask_shape", [(1, 1, 1, 200), (2, 3, 1, 200), (2, 1, 200, 200)])
def test_other_masks_are_torchs(mask_shape: tuple[int, ...]) -> None:
    inputs = made(200, 200, 24)
    mask = torch.rand(mask_shape) < 0.8
    mask[..., 0] = True
    assert torch.equal(attention(*inputs, mask), F.scaled_dot_product_attention(*inputs, attn_mask=mask))
    assert kernel.takes_float32(*inputs)
    assert not kernel.takes_float32(*inputs, mask)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_where_gradients_are_wanted_there_are_torchs(which: int) -> None:
    inputs = made(200, 200, 24)
    inputs[which] = inputs[which].detach().requires_grad_()
    ours = torch.autograd.grad(attention(*inputs).sum(), inputs[which])[0]
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).sum(), inputs[which])[0]
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_that_torch_makes_is_torchs() -> None:
    inputs = [torch.stack([each, 2 * each]) for each in made(200, 200, 24)]
    ours = torch.func.vmap(attention)(*inputs)
    assert torch.allclose(ours, F.scaled_dot_product_attention(*inputs), atol=1e-5)


def run(code: str, **environment: str) -> None:
    code = "import torch; from gobelin.attention import attention; import torch.nn.functional as F\n" + code
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True)


def test_the_compiler_is_given_an_operator() -> None:
    torch.library.opcheck(torch.ops.gobelin.float_attention.default, (*made(40, 20, 24), None))
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


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    inputs = made(300, 200, 40)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(kernel.attend_in_float32(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found)


def test_what_does_not_fit_is_refused() -> None:
    run(
        "import pytest; from gobelin.kernels.float_attention import attend_in_float32 as attend\n"
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
