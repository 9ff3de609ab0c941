"""Token merging against loops over patches, its limits, and what becomes of attention among merged patches."""

import pytest
import torch
from tests.conftest import fill_
from torch import Tensor

from gobelin.layers import Attention
from gobelin.token_merging import MergedPatches
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

GRIDS = [(4, 6), (5, 3), (1, 7), (2, 2), (1, 1)]


def merged_by_hand(hidden: Tensor, height: int, share: float) -> list[int]:
    """The patch that stands for each one of an image [patches, width]."""
    patches = len(hidden)
    width = patches // height
    staying = [number for number in range(patches) if number // width % 2 == 0 and number % width % 2 == 0]
    likeness = torch.nn.functional.cosine_similarity(hidden[:, None], hidden[None], dim=-1)
    others = [number for number in range(patches) if number not in staying]
    nearest = {number: max(staying, key=lambda other: likeness[number, other].item()) for number in others}
    likest = sorted(others, key=lambda number: -likeness[number, nearest[number]].item())
    stands_for = list(range(patches))
    for number in likest[: int(share * patches)]:
        stands_for[number] = nearest[number]
    return stands_for


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_the_likest_patches_attend_as_one(grid: tuple[int, int], share: float) -> None:
    height, width = grid
    hidden = torch.randn(2, height * width, 8)
    merging = MergedPatches.of(hidden, height, share)
    values = torch.randn(2, height * width, 5)
    merged = merging.merge(values)
    back = merging.unmerge(merged)
    for image in range(2):
        stands_for = merged_by_hand(hidden[image], height, share)
        assert merged.shape[1] == len(set(stands_for))
        for number, one in enumerate(stands_for):
            group = [other for other, its in enumerate(stands_for) if its == one]
            torch.testing.assert_close(back[image, number], values[image, group].mean(dim=0))


def test_merging_nothing_changes_no_bit() -> None:
    hidden = torch.randn(3, 24, 8)
    merging = MergedPatches.of(hidden, 4, 0.0)
    assert torch.equal(merging.merge(hidden), hidden)
    assert torch.equal(merging.unmerge(hidden), hidden)
    probs = torch.rand(3, 2, 24, 24)
    assert torch.equal(merging.spread(probs, slice(None)), probs)


def test_merging_equal_patches_is_exact() -> None:
    attend = fill_(Attention(8, heads=2))
    hidden = torch.randn(2, 1, 8).expand(-1, 16, -1).clone()
    merging = MergedPatches.of(hidden, 4, 0.75)
    merged = merging.merge(hidden)
    assert merged.shape[1] == 4
    torch.testing.assert_close(merging.unmerge(attend(merged)), attend(hidden))


@pytest.mark.parametrize("heads", [(), (3,)])
def test_attention_among_merged_patches_is_shared_out_equally(heads: tuple[int, ...]) -> None:
    hidden = torch.randn(3, 24, 8)
    merging = MergedPatches.of(hidden, 4, 0.5)
    probs = torch.softmax(torch.randn(1, *heads, 12, 12), dim=-1)
    spread = merging.spread(probs, slice(2, None))
    torch.testing.assert_close(spread.sum(dim=-1), torch.ones(1, *heads, 24))
    stands_for = merged_by_hand(hidden[2], 4, 0.5)
    numbers = sorted(set(stands_for))
    for query in range(24):
        for key in range(24):
            sharing = stands_for.count(stands_for[key])
            row, column = numbers.index(stands_for[query]), numbers.index(stands_for[key])
            torch.testing.assert_close(spread[..., query, key], probs[..., row, column] / sharing)


def test_images_are_merged_each_for_itself() -> None:
    hidden = torch.randn(3, 24, 8)
    together = MergedPatches.of(hidden, 4, 0.5).merge(hidden)
    for number in range(3):
        alone = hidden[number : number + 1]
        torch.testing.assert_close(MergedPatches.of(alone, 4, 0.5).merge(alone), together[number : number + 1])


@torch.no_grad()
def test_the_finest_patches_alone_are_merged_and_words_see_them_all() -> None:
    from gobelin.shortcuts import Shortcuts

    config = UNetConfig.of(
        *(8, 12),
        attention=(True, True),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    unet = fill_(UNet(config))
    seen: dict[str, int] = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].shape[1]}))
    inputs = torch.randn(2, 4, 4, 6), torch.tensor([3.0, 500.0]), torch.randn(2, 5, 6)
    shortcuts = Shortcuts(merge_tokens=0.5)
    prediction, maps = unet.trace(*inputs, sites="*", shortcuts=shortcuts)
    for site in unet.attention_sites:
        patches = 24 // site.downscale**2
        assert seen[site.name] == (patches // 2 if (site.kind, site.downscale) == ("self", 1) else patches)
        assert maps[site].shape == (2, patches, 5 if site.kind == "cross" else patches)
        torch.testing.assert_close(maps[site].sum(dim=-1), torch.ones(2, patches))
    assert torch.equal(prediction, unet.trace(*inputs, sites=(), shortcuts=shortcuts)[0]), "traced or not"
    assert not torch.equal(prediction, unet(*inputs))
    assert torch.equal(unet.trace(*inputs, sites=(), shortcuts=Shortcuts())[0], unet(*inputs))
