"""Edits of an image by its prompt: what stays, what changes, and where."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gobelin.control import EditGuidance, FlowEdit, LocalBlend, attend_and_excite
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline

BEFORE, AFTER = "a red circle", "a blue circle"


def test_an_edit_keeps_the_first_image(pipe: Pipeline) -> None:
    result = pipe.edit(BEFORE, AFTER, seed=5, steps=4)
    assert [settings["seed"] for settings in result.settings] == [5, 5]
    alone = pipe(BEFORE, seed=5, steps=4)
    assert torch.equal(result.latents[:1], alone.latents)
    assert result.settings[0] == alone.settings[0]
    assert result.settings[1]["control"] is True
    same = pipe.edit(BEFORE, BEFORE, seed=5, steps=4)
    assert torch.allclose(same.latents[1], same.latents[0], atol=1e-4)
    louder = pipe.edit(BEFORE, AFTER, seed=5, steps=4, reweight={"blue": 3}, control=lambda _, probs: probs)
    again = pipe.edit(BEFORE, AFTER, seed=5, steps=4)
    assert torch.equal(again.latents, result.latents)
    assert not torch.equal(louder.latents[1], again.latents[1])
    assert torch.equal(louder.latents[0], again.latents[0])


def test_an_edit_is_of_one_image(pipe: Pipeline) -> None:
    image = Image.new("RGB", (64, 64))
    for options in ({"count": 2}, {"seed": [1, 2]}, {"init_image": [image, image]}):
        with pytest.raises(UsageError, match="an edit is of one image: leave out count"):
            pipe.edit(BEFORE, AFTER, **options)
    with pytest.raises(UsageError, match="about image 1 of a batch of 1"):
        pipe(BEFORE, control=LocalBlend())
    for wrong in (3, None, ["a", "b"], ""):
        with pytest.raises(UsageError, match="the prompt is") as raised:
            pipe.edit(BEFORE, wrong)
        assert "\n" not in str(raised.value)


def test_a_changed_word_changes_less_of_the_image_than_an_image_by_itself() -> None:
    shipped = Pipeline.from_pretrained()
    before, after = "a red circle left of a blue square", "a green circle left of a blue square"
    options = {"steps": 8, "sampler": "dpmpp_2m"}
    paper = {"method": "prompt_to_prompt", "self_replace": 0.4, "edit_guidance": 0, "local_blend": ()}
    first, edited = shipped.edit(before, after, seed=0, **options).images
    _, alone = shipped.edit(before, after, seed=0, **paper, **options).images
    (itself,) = shipped(after, seed=0, **options).images

    def changed(image: Image.Image) -> float:
        apart = np.abs(np.asarray(image, np.float32) - np.asarray(first, np.float32))
        return float((apart.max(axis=-1) > 48).mean())  # levels of 255

    assert 0 < changed(edited) < 0.7 * changed(itself)
    assert 0 < changed(alone) < 0.7 * changed(itself)


def test_both_images_may_be_painted_at_once(pipe: Pipeline) -> None:
    alone = pipe(BEFORE, seed=5, steps=4)
    result = pipe.edit(BEFORE, AFTER, seed=5, steps=4, method="prompt_to_prompt")
    assert torch.allclose(result.latents[:1], alone.latents, atol=1e-4)
    assert not torch.equal(result.latents[1], alone.latents[0])
    same = pipe.edit(BEFORE, BEFORE, seed=5, steps=4, method="prompt_to_prompt")
    assert torch.allclose(same.latents[1], same.latents[0], atol=1e-4)
    latents = torch.zeros(1, 4, 16, 16)
    for unused in ({"init_image": alone.images[0]}, {"strength": 0.5}, {"latents": latents}, {"mask": alone.images[0]}):
        with pytest.raises(UsageError, match=f"from the seed's noise: leave out {next(iter(unused))}"):
            pipe.edit(BEFORE, AFTER, method="prompt_to_prompt", **unused)
    with pytest.raises(UsageError, match="begins from it: leave out latents"):
        pipe.edit(BEFORE, AFTER, init_image=alone.images[0], latents=latents)


@pytest.mark.parametrize("wrong", [{"reweight": {"zzz": 2.0}}, {"local_blend": ["zzz"]}, {"strength": 0.01}])
def test_what_is_wrong_with_a_change_is_said_before_anything_is_painted(
    wrong: dict[str, Any], pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *_: pytest.fail("painted first"))
    with pytest.raises(UsageError):
        pipe.edit(BEFORE, AFTER, steps=4, **wrong)


def test_guidance_beside_an_edit_does_not_change_what_its_blend_sees(pipe: Pipeline) -> None:
    """The passes that attention guidance makes are not the painting's."""
    plain = pipe.edit(BEFORE, AFTER, seed=5, steps=4)
    still = pipe.edit(BEFORE, AFTER, seed=5, steps=4, control=attend_and_excite("circle", strength=0))
    assert torch.equal(still.latents, plain.latents)


def test_an_image_of_ones_own_is_changed(pipe: Pipeline) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 81, 3), np.uint8))
    result = pipe.edit(BEFORE, AFTER, init_image=image, seed=5, steps=4, trace=True)
    fitted = image.resize((80, 68), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(fitted))
    assert result.images[1].size == (80, 68)
    assert len(result.heatmaps) == 2
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipe.vae.config.scaling_factor * pipe.vae.encode(pixels).mean
    assert torch.allclose(result.latents[:1], latents, atol=1e-4)
    less = pipe.edit(BEFORE, AFTER, init_image=image, seed=5, steps=4, strength=0.25)
    changed = [(each.latents[1] - latents[0]).square().mean() for each in (less, result)]
    assert 0 < changed[0] < changed[1]
    with pytest.raises(UsageError, match="strength is 0: give a number above 0"):
        pipe.edit(BEFORE, AFTER, init_image=image, steps=4, strength=0)


def test_an_edit_traces_the_image_that_it_began_with(pipe: Pipeline) -> None:
    result = pipe.edit(BEFORE, AFTER, seed=5, steps=2, trace=True)
    assert [heatmaps.words.text for heatmaps in result.heatmaps] == [BEFORE, AFTER]
    alone = pipe(BEFORE, seed=5, steps=2, trace=True)
    assert torch.equal(result.heatmaps[0]["red"].raw, alone.heatmaps[0]["red"].raw)


def test_outside_of_a_mask_no_pixel_changes(pipe: Pipeline) -> None:
    hole = np.zeros((64, 64), np.uint8)
    hole[16:48, 16:32] = 255
    options = {"seed": 5, "steps": 4, "local_blend": ()}
    edited = pipe.edit(BEFORE, AFTER, mask=Image.fromarray(hole), **options)
    apart = torch.ne(*edited.latents).any(dim=0)
    assert apart[4:12, 4:8].all()
    assert apart.sum() == 8 * 4, "a latent is four pixels wide"
    first, second = edited.images
    differ = (np.asarray(first) != np.asarray(second)).any(axis=-1)
    assert differ[hole > 0].any()
    assert not differ[hole == 0].any()
    first, second = pipe.edit(BEFORE, AFTER, **options).images
    assert (np.asarray(first) != np.asarray(second)).any(axis=-1)[hole == 0].any()


def test_finished_images_are_half_of_a_batch(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"\[2, 4, 16, 16\] are edited in a batch of 2: expected half as many"):
        pipe([BEFORE, AFTER], control=FlowEdit(latents=torch.zeros(2, 4, 16, 16)))
    image = torch.randn(1, 4, 16, 16)
    with pytest.raises(UsageError, match="not noise: leave out the start latents"):
        pipe([BEFORE] * 2, latents=image.repeat(2, 1, 1, 1), control=FlowEdit(latents=image))
    with pytest.raises(UsageError, match="two controls bring a way of sampling of their own"):
        pipe([BEFORE] * 2, control=[FlowEdit(latents=image)] * 2)
    paper, ours = (
        pipe([BEFORE, AFTER], seed=0, steps=4, control=FlowEdit(latents=image, gain=gain)).latents
        for gain in (0.0, 0.45)
    )
    assert torch.equal(paper[:1], image)
    assert (ours[1] - image[0]).square().mean() > (paper[1] - image[0]).square().mean() > 0


def test_edit_guidance_adds_the_way_from_one_text_to_the_other(pipe: Pipeline) -> None:
    latents = torch.randn(2, 4, *pipe.latent_size(), generator=torch.Generator().manual_seed(0))

    def denoised(*control: EditGuidance, prompts: list[str], guidance: float = 2.0) -> Tensor:
        options = {"seed": [0, 0], "latents": latents, "steps": 2, "guidance": guidance, "control": control}
        return next(pipe.start(prompts, **options)).denoised

    plain, pushed = (denoised(*control, prompts=[BEFORE, AFTER]) for control in ((), (EditGuidance(strength=0.5),)))
    assert torch.equal(pushed[0], plain[0])
    texts = [denoised(prompts=[text] * 2, guidance=1.0) for text in (BEFORE, AFTER)]
    difference = texts[1][1] - texts[0][1]
    assert torch.allclose(pushed[1] - plain[1], 0.5 * difference, atol=1e-4)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"cross_replace": 2},
        {"self_replace": "1"},
        {"edit_guidance": "much"},
        {"edit_guidance": float("nan")},
        {"method": "magic"},
        {"local_blend": "circle"},
        {"local_blend": 3},
        {"reweight": {"blue": "2"}},
        {"reweight": "blue"},
        {"reweight": {"green": 2}},
        {"reweight": {"blue": -1}},
        {"together": True},
        {"blend": ()},
        {"push": 2},
        {"strength": 2},
    ],
)
def test_options_of_an_edit_are_checked(pipe: Pipeline, options: dict) -> None:
    with pytest.raises(UsageError) as raised:
        pipe.edit(BEFORE, AFTER, steps=1, **options)
    assert "\n" not in str(raised.value)
    assert next(iter(options)) in str(raised.value) or "green" in str(raised.value) or "blue" in str(raised.value)
