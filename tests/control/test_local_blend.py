"""Local blend: which words bound an edit, and that outside of their pixels nothing changes."""

from dataclasses import replace

import torch
from tests.control.conftest import COARSE, SITE, SIZE, batch_of

from gobelin.attention import AttentionSite, choose_sites
from gobelin.control import LocalBlend, prompt_to_prompt
from gobelin.control.alignment import changed_words
from gobelin.control.local_blend import blended_tokens
from gobelin.guidance import ConditionedUNet
from gobelin.pipeline import Pipeline
from gobelin.samplers import DenoiserOutput
from gobelin.schedule import NoiseSchedule
from gobelin.text_conditioning import TextConditioning
from gobelin.tokenizer import Tokenizer
from gobelin.types import Latents
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

PATCHES = AttentionSite(name="up.attn1", kind="self", downscale=1, heads=2)


class Seer:
    """A denoiser that shows what it was given."""

    def __call__(self, latents: Latents, timestep: float, alpha_cumprod: float) -> DenoiserOutput:
        return DenoiserOutput(latents=latents, denoised=latents, noise=latents)

    def finish(self, latents: Latents) -> Latents:
        return latents


def network() -> ConditionedUNet:
    config = UNetConfig.of(8, attention=(True,), layers_per_block=1, cross_attention_dim=6, norm_num_groups=4)
    text = TextConditioning(embeddings=torch.zeros(3, 5, 6))
    return ConditionedUNet(unet=UNet(config), schedule=NoiseSchedule(), positive=text, negative=text)


def test_outside_of_the_words_pixels_nothing_changes(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a red ring"), tokenizer.words("a of ring")
    batch = replace(batch_of(source, target, source), sites=(SITE, PATCHES, COARSE))
    blend = LocalBlend(words=["red", "of"], threshold=0.5, start=0.2)
    attached = blend.attach(batch)
    (edit,) = attached.edits
    assert choose_sites(batch.sites, edit.sites) == (SITE, PATCHES)
    denoise = attached.around(Seer(), network())
    latents = torch.randn(3, 4, *SIZE)
    itself = torch.eye(24).expand(3, 2, 24, 24)
    probs = torch.zeros(3, 2, 24, 20)
    probs[:, :, 20, 1:4] = 1
    edit.change(PATCHES, itself)
    edit.change(SITE, probs)
    assert denoise(latents, 500.0, 0.5).latents is latents, "what was seen before is forgotten"
    probs = torch.zeros(3, 2, 24, 20)
    probs[0, :, 4, source.tokens("red")] = 1
    probs[1, :, 11, target.tokens("of")] = 1
    probs[:, :, 20, source.tokens("red") + target.tokens("of")] += 0.6  # .36 of the most, as its patch draws on itself
    assert edit.change(SITE, probs) is probs
    assert edit.change(PATCHES, itself) is itself
    assert denoise(latents, 900.0, 0.1).latents is latents, "a tenth of the way is too early"
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[0:2, 3:6] = True  # around patch 4, row 0
    mask[0:3, 4:6] = True  # around patch 11, at the end of row 1
    for result in (denoise(latents, 500.0, 0.5).latents, denoise.finish(latents)):
        assert torch.equal(result[1][:, mask], latents[1][:, mask])
        assert torch.equal(result[1][:, ~mask], latents[0][:, ~mask])
        assert torch.equal(result[[0, 2]], latents[[0, 2]])


def test_blended_tokens_are_the_nouns_of_changed_adjectives(tokenizer: Tokenizer) -> None:
    for before, after, words_before, words_after in (
        ("a red ring", "a blue ring", "ring", "ring"),
        ("a red ring, a blue circle", "a red ring, a green circle", "circle", "circle"),
        ("a red ring", "a red square", "ring", "square"),
        ("a big red ring", "a small blue ring", "ring", "ring"),
        ("a ring", "a red ring", "ring", "ring"),
        ("there is a red ring lower than a star", "there is a blue ring lower than a star", "ring", "ring"),
        ("one red ring alone", "one blue ring alone", "ring", "ring"),
        ("a ring that is red", "a ring that is blue", "red", "blue"),
    ):
        source, target = tokenizer.words(before), tokenizer.words(after)
        found = blended_tokens(source, target)
        expected = (list(source.tokens(words_before)), list(target.tokens(words_after)))
        assert found == expected, (before, after)
    same = tokenizer.words("a red ring")
    assert blended_tokens(same, same) == ([], [])


def test_changed_words_are_those_that_the_other_prompt_has_not(tokenizer: Tokenizer) -> None:
    source, target = tokenizer.words("a red ring, a blue circle"), tokenizer.words("a red square and a blue circle")
    old, new = changed_words(source, target)
    assert [span.word for span in old] == ["ring"]
    assert [span.word for span in new] == ["square", "and"]
    assert changed_words(source, source) == ([], [])


def test_a_blend_leaves_the_rest_of_the_image_as_it_was(pipe: Pipeline) -> None:
    prompts = ["a red circle", "a blue circle"]
    blend = LocalBlend(words=["red", "blue"], threshold=0.99)
    latents = pipe(prompts, seed=[5, 5], steps=4, control=[prompt_to_prompt(), blend]).latents
    kept = torch.eq(latents[0], latents[1]).all(dim=0)
    assert 0 < kept.sum() < kept.numel()
    same = pipe(["a red circle"] * 2, seed=[5, 5], steps=2, control=LocalBlend())
    alone = pipe(["a red circle"] * 2, seed=[5, 5], steps=2)
    assert torch.equal(same.latents, alone.latents), "nothing changed, so nothing is blended"
