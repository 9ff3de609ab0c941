"""Activation patching: what an image takes from another, bit for bit, and what its measurement can tell."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from gobelin.attention import AttentionPatch
from gobelin.control import suppress
from gobelin.errors import UsageError
from gobelin.evaluate.patching import Patching, measure_patching, patching_report
from gobelin.pipeline import Pipeline, Result
from gobelin.scenes import CORE
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

PROMPTS = ["a red circle", "two blue stars in a row", "a red circle"]


@pytest.fixture(scope="module")
def pipe(trained) -> Pipeline:
    return Pipeline.from_pretrained(trained)


@pytest.fixture(scope="module")
def plain(pipe: Pipeline) -> Result:
    return pipe(PROMPTS, seed=[3, 3, 3], steps=4, trace=True)


def painted(pipe: Pipeline, *patches: AttentionPatch, **options) -> Result:
    return pipe(PROMPTS, seed=[3, 3, 3], steps=4, control=list(patches), **options)


def test_all_of_anothers_text_is_its_image(pipe: Pipeline, plain: Result) -> None:
    found = painted(pipe, AttentionPatch(source=1, target=2))
    assert torch.equal(found.latents[:2], plain.latents[:2]), "the others stay as they are"
    assert torch.allclose(found.latents[2], plain.latents[1], atol=1e-5)
    assert not torch.allclose(plain.latents[2], plain.latents[1], atol=1e-2)


def test_nothing_of_it_changes_no_bit(pipe: Pipeline, plain: Result) -> None:
    for nothing in (
        AttentionPatch(source=1, target=2, end=0.0),
        AttentionPatch(source=1, target=2, heads=[]),
        AttentionPatch(source=0, target=2),  # the same prompt and the same noise
        AttentionPatch(source=2, target=2, part="output", sites="*"),
    ):
        assert torch.equal(painted(pipe, nothing).latents, plain.latents)


def test_all_heads_one_by_one_are_all_at_once(pipe: Pipeline) -> None:
    heads = range(max(site.heads for site in pipe.unet.attention_sites))
    for part in ("text", "output"):
        patch = partial(AttentionPatch, source=1, target=0, part=part, sites="up*attn2")
        apart = painted(pipe, *(patch(heads=[head]) for head in heads)).latents
        assert torch.equal(apart, painted(pipe, patch()).latents)
        assert not torch.equal(apart, painted(pipe, patch(heads=[0])).latents)


def test_maps_are_those_of_the_patched_text(pipe: Pipeline, plain: Result) -> None:
    maps = painted(pipe, AttentionPatch(source=1, target=2), trace=True).heatmaps
    for site, probs in maps[2].maps.items():
        assert torch.allclose(probs, plain.heatmaps[1].maps[site], atol=1e-4)
        assert torch.allclose(probs.sum(dim=-1), torch.ones(()))


def test_masks_go_with_the_text_and_rows_are_those_of_the_probe() -> None:
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet = UNet(config).eval()
    latents, text, timesteps = torch.randn(2, 4, 4, 4), torch.randn(4, 5, 8), torch.tensor([500.0, 500.0])
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2, 3:] = False
    latents[1] = latents[0]
    rows = slice(2, 4)  # of a guided pass: the halves with the prompts
    with torch.no_grad():
        patched, _ = unet.trace(
            latents, timesteps, text, mask, sites=(), rows=rows, edits=[AttentionPatch(source=0, target=1)]
        )
        first = unet(latents, timesteps, text, mask)
        heads, _ = unet.trace(
            latents, timesteps, text, mask, sites=(), rows=rows,
            edits=[AttentionPatch(source=0, target=1, heads=[0]), AttentionPatch(source=0, target=1, heads=[1])],
        )  # fmt: skip
    assert torch.allclose(patched[3], first[2], atol=1e-6)
    assert torch.equal(patched[:3], first[:3])
    assert torch.allclose(heads, patched, atol=1e-6)


def test_patches_go_with_other_controls(pipe: Pipeline) -> None:
    both = painted(pipe, AttentionPatch(source=1, target=2, sites="mid*attn2"), suppress("red", rows=[2])).latents
    alone = painted(pipe, AttentionPatch(source=1, target=2, sites="mid*attn2")).latents
    assert not torch.equal(both[2], alone[2])
    assert torch.allclose(both[:2], alone[:2], atol=1e-5)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (AttentionPatch(source=0, target=3), "image 3 of a batch of 3"),
        (AttentionPatch(source=-1, target=0), "image -1 of a batch of 3"),
        (AttentionPatch(source=0, target=1, sites="*attn1"), "attends to no text: patch its output"),
        (AttentionPatch(source=0, target=1, sites="attn3"), "matches no attention"),
        (AttentionPatch(source=0, target=1, heads=[99]), "has no head 99: its 2 heads count from 0"),
        (AttentionPatch(source=0, target=1, end=1.5), "the end of an attention patch is 1.5"),
        (AttentionPatch(source="a", target=1), "source and target of an attention patch"),
        (AttentionPatch(source=0, target=1, part="words"), "the part of an attention patch is 'words'"),
        (AttentionPatch(source=0, target=1, heads="all"), "the heads of an attention patch is 'all'"),
    ],
)
def test_what_cannot_be_patched_is_said(pipe: Pipeline, patch: AttentionPatch, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        painted(pipe, patch)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_model_that_paints_right_follows_text_everywhere_and_chance_does_not() -> None:
    pipeline = Pipeline.from_pretrained()
    measured: Patching = measure_patching(pipeline, CORE, 2, ["colour"])
    patches = measured.kinds["colour"].patches
    assert measured.kinds["colour"].pairs == 2
    assert patches["text everywhere"].follows.value == 1.0
    assert patches["another pair's text everywhere"].follows.value == 0.0
    sites = [name for name in patches if name.startswith("text at")]
    assert len(sites) == sum(site.kind == "cross" for site in pipeline.unet.attention_sites)
    content = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    report = patching_report(content)
    assert all(len(row) == 2 for table in report.tables for row in table.rows)
    assert "colour (2 pairs)" in report.markdown()


def test_a_model_that_gets_nothing_right_is_refused(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = Image.fromarray(np.full((64, 64, 3), 175, np.uint8))

    def painted_grey(self: Pipeline, prompts: list[str], **options) -> Result:
        return Result(images=[grey] * len(prompts), latents=torch.zeros(len(prompts), 4, 1, 1), settings=[])

    monkeypatch.setattr(Pipeline, "__call__", painted_grey)
    with pytest.raises(UsageError, match="there is nothing to patch"):
        measure_patching(pipe, CORE, 2, ["number"])
