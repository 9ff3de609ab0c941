"""The attention operation against the textbook's formula, and against the plain layer that people first write."""

import pytest
import torch
from tests.conftest import fill_, relative_error
from torch import Tensor, nn

from gobelin.attention import attention, attention_probs, choose_layers, choose_sites, extra_shares
from gobelin.errors import UsageError
from gobelin.layers import Attention
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig


class PlainAttention(nn.Module):
    """One head, no transposes: softmax(q kᵀ / √d) v. Its mask says what to *drop*, the inverse of ours."""

    def __init__(self, width: int, context_width: int):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        sim = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if mask is not None:
            sim = sim.masked_fill(mask, -float("inf"))
        return self.to_out(torch.matmul(torch.softmax(sim, dim=-1), v))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_one_head_is_the_plain_formula(cross: bool, masked: bool) -> None:
    ours = fill_(Attention(24, heads=1, context_width=10 if cross else None))
    plain = PlainAttention(24, 10 if cross else 24)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 37, 24)
    context = torch.randn(3, 7, 10) if cross else None
    keep = (torch.rand(3, 7 if cross else 37) > 0.4) if masked else None
    if keep is not None:
        keep[:, 0] = True
    drop = None if keep is None else ~keep[:, None, :]
    assert relative_error(ours(x, context, keep), plain(x, context, drop)) < 2e-6


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_each_head_attends_with_its_own_slice_of_the_width(heads: int) -> None:
    ours = fill_(Attention(12, heads=heads, context_width=5, bias=True))
    x, context = torch.randn(2, 9, 12), torch.randn(2, 4, 5)
    q, k, v = ours.to_q(x), ours.to_k(context), ours.to_v(context)
    d = 12 // heads
    slices = [
        torch.softmax(q[..., i : i + d] @ k[..., i : i + d].transpose(1, 2) / d**0.5, dim=-1) @ v[..., i : i + d]
        for i in range(0, 12, d)
    ]
    assert relative_error(ours(x, context), ours.to_out[0](torch.cat(slices, dim=-1))) < 2e-6


def test_a_true_in_the_mask_lets_a_query_attend() -> None:
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    mask = torch.tensor([True, False, True, True, False, True]).expand(1, 1, 1, 6)
    kept = mask.flatten()
    assert relative_error(
        attention(query, key, value, mask), attention(query, key[..., kept, :], value[..., kept, :])
    ) < (2e-6)


def test_causal_attention_sees_no_later_key() -> None:
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    whole = attention(query, key, value, causal=True)
    for end in range(1, 7):
        start = attention(query[..., end - 1 : end, :], key[..., :end, :], value[..., :end, :])
        assert relative_error(whole[..., end - 1 : end, :], start) < 2e-6


def test_training_in_bfloat16_computes_and_learns_the_same_as_the_fused_kernel() -> None:
    exact = [torch.randn(2, 2, length, 8, requires_grad=True) for length in (9, 5, 5)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    plain = attention(*rounded)
    fused = attention(*(tensor.detach() for tensor in rounded))
    rounding = torch.finfo(torch.bfloat16).eps
    assert plain.dtype == fused.dtype == torch.bfloat16
    assert relative_error(plain.float(), fused.float()) <= 2 * rounding

    weights = torch.randn(2, 2, 9, 8)
    (plain.float() * weights).sum().backward()
    (attention(*exact) * weights).sum().backward()
    for ours, theirs in zip(rounded, exact, strict=True):
        assert relative_error(ours.grad.float(), theirs.grad) <= 8 * rounding


@pytest.mark.parametrize("masked", [False, True])
def test_probabilities_times_values_are_the_attention(masked: bool) -> None:
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    mask = (torch.rand(2, 1, 1, 7) > 0.4) if masked else None
    if mask is not None:
        mask[..., 0] = True
    probs = attention_probs(query, key, mask)
    assert relative_error(probs @ value, attention(query, key, value, mask)) < 2e-6
    assert torch.allclose(probs.sum(dim=-1), torch.ones(2, 3, 5))
    assert mask is None or probs[~mask.expand_as(probs)].eq(0).all()


def test_probabilities_are_float32_whatever_the_precision() -> None:
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    probs = attention_probs(query.bfloat16(), key.bfloat16())
    assert probs.dtype == torch.float32
    assert torch.equal(probs, attention_probs(query.bfloat16().float(), key.bfloat16().float()))


@pytest.mark.parametrize("masked", [False, True])
def test_an_extra_word_takes_what_it_would_take_beside_all_keys(masked: bool) -> None:
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    mask = (torch.rand(2, 1, 1, 7) > 0.4) if masked else None
    if mask is not None:
        mask[..., 0] = True
    words = torch.randn(3, 6, 4)
    found = extra_shares(query, key, mask, words, (1, 3, 2)).split((1, 3, 2), dim=-1)
    for share, word in zip(found, words.split((1, 3, 2), dim=1), strict=True):
        beside = torch.cat([key, word.expand(2, -1, -1, -1)], dim=2)
        shown = None if mask is None else torch.cat([mask, torch.ones(2, 1, 1, word.shape[1], dtype=torch.bool)], dim=3)
        assert torch.allclose(share, attention_probs(query, beside, shown)[..., 7:], atol=1e-6)


def test_extra_words_that_are_far_off_or_near_are_shares_all_the_same() -> None:
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    for scale, share in ((1e4, 1.0), (-1e4, 0.0)):
        word = scale * query[0].mean(dim=1, keepdim=True).sign()
        found = extra_shares(query.abs(), key, None, word.abs() * scale, (1,))
        assert torch.allclose(found, torch.full_like(found, share))


@pytest.mark.parametrize("layers", ["nowhere", ["*", "nowhere"], 3, [], [3]], ids=str)
def test_layers_that_are_none_are_said(layers) -> None:
    with pytest.raises(UsageError, match=r"layers is|matches no layer of this U-Net, which has down"):
        choose_layers(("down", "up"), layers)
    assert choose_layers(("down.0", "down.1", "up"), ["up", "down.*"]) == ("down.0", "down.1", "up")


def test_sites_are_chosen_by_pattern_by_question_and_by_name() -> None:
    sites = UNet(UNetConfig.nano()).attention_sites
    assert [site.kind for site in choose_sites(sites)] == ["cross"] * (len(sites) // 2)
    assert choose_sites(sites, "*") == sites
    assert {site.name.split(".")[0] for site in choose_sites(sites, "up_blocks.*attn1")} == {"up_blocks"}
    assert {site.downscale for site in choose_sites(sites, lambda site: site.downscale == 2)} == {2}
    assert choose_sites(sites, sites[3:5]) == sites[3:5]
    assert choose_sites(sites, ()) == ()


@pytest.mark.parametrize("choice", ["attn2", lambda site: site.downscale > 8], ids=["pattern", "question"])
def test_a_choice_that_matches_nothing_lists_what_there_is(choice) -> None:
    sites = UNet(UNetConfig.nano()).attention_sites
    with pytest.raises(UsageError, match="matches no attention") as raised:
        choose_sites(sites, choice)
    assert all(site.name in str(raised.value) for site in sites)
