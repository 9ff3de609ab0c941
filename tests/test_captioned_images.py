"""Looking at any image with a caption, against passes of the U-Net by hand, and with what people bring."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gobelin.attention import Trace
from gobelin.captioned_images import LOOK_TIMESTEPS, caption_list, fitted_size
from gobelin.errors import DataError, UsageError
from gobelin.images import images_to_tensor
from gobelin.pipeline import Pipeline

PLAIN = Trace(per_head=True, per_step=True)


@pytest.fixture(scope="module")
def pipe(trained: Path) -> Pipeline:
    return Pipeline.from_pretrained(trained)


def noise_image(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def own_side(pipe: Pipeline) -> int:
    return pipe.unet.config.sample_size * pipe.vae.config.factor


@torch.no_grad()
def test_maps_are_those_of_a_pass_at_each_timestep(pipe: Pipeline) -> None:
    side, image, timesteps = own_side(pipe), noise_image(), (40, 700)
    (heatmaps,) = pipe.look(image, "a red circle", timesteps=timesteps, trace=PLAIN, seed=9)
    resized = image.resize((side, side), Image.Resampling.LANCZOS)
    latents = pipe.vae.config.scaling_factor * pipe.vae.encode(images_to_tensor([resized])).mean
    text = pipe.encode_text("a red circle")
    generator = torch.Generator().manual_seed(9)
    for index, timestep in enumerate(timesteps):
        noise = torch.randn(latents.shape[1:], generator=generator)[None]
        alpha = pipe.schedule.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        _, maps = pipe.unet.trace(noisy, torch.tensor([timestep]), text.embeddings, text.mask, reduce="none")
        assert list(heatmaps.maps) == list(maps)
        for site, probs in maps.items():
            assert torch.allclose(heatmaps.maps[site][index], probs[0], atol=1e-5), site.name
    assert heatmaps.image.size == (side, side)
    assert heatmaps.steps == 2
    assert [span.word for span in heatmaps.words.spans] == ["a", "red", "circle"]


def test_an_image_is_looked_at_alike_beside_others_of_other_sizes_and_captions(pipe: Pipeline) -> None:
    side = own_side(pipe)
    images = [noise_image(side, side, 1), noise_image(3 * side, side, 2), noise_image(side, side, 3)]
    captions = ["a circle", "a blue square left of a red circle", "two stars"]
    together = pipe.look(images, captions, trace=True)
    for image, caption, heatmaps in zip(images, captions, together, strict=True):
        (alone,) = pipe.look([image], [caption], trace=True)
        assert heatmaps.image.size == alone.image.size
        assert heatmaps.latent_size == alone.latent_size
        for word in range(len(alone.words)):
            assert torch.allclose(heatmaps[word].raw, alone[word].raw, atol=1e-5)
    assert together[0].latent_size == together[2].latent_size != together[1].latent_size


def test_every_form_of_an_image_is_looked_at_alike(pipe: Pipeline, tmp_path: Path) -> None:
    side = own_side(pipe)
    image = noise_image(side, side)
    image.save(tmp_path / "photo.png")
    forms: list[Any] = [image, tmp_path / "photo.png", str(tmp_path / "photo.png"), np.asarray(image)]
    forms.append(images_to_tensor([image])[0])
    maps = [pipe.look(form, "a red circle")[0]["circle"].raw for form in forms]
    assert all(torch.equal(maps[0], one) for one in maps)
    assert torch.equal(pipe.look(image, ["a red circle"])[0]["circle"].raw, maps[0])
    assert not torch.equal(pipe.look(image, "a red circle", seed=1)[0]["circle"].raw, maps[0])
    assert not torch.equal(pipe.look(image, "a red circle", timesteps=[900])[0]["circle"].raw, maps[0])


def test_maps_are_sharp_unless_plain_ones_are_asked_for(pipe: Pipeline) -> None:
    sharp, plain = (pipe.look(noise_image(), "a red circle", trace=trace)[0] for trace in ("sharp", True))
    assert sharp.sharp
    assert {site.kind for site in sharp.maps} == {"self", "cross"}
    assert not plain.sharp
    assert {site.kind for site in plain.maps} == {"cross"}
    assert sum(plain.shares().values()) == pytest.approx(1)


def test_sizes_that_are_given_are_kept(pipe: Pipeline) -> None:
    side, factor = own_side(pipe), pipe.vae.config.factor
    image = noise_image(2 * side, side)
    assert pipe.look(image, "a circle", height=side)[0].image.size == (2 * side, side)
    assert pipe.look(image, "a circle", height=side, width=side + factor)[0].image.size == (side + factor, side)
    with pytest.raises(UsageError, match="multiples of"):
        pipe.look(image, "a circle", height=side + 1)


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_an_image_is_fitted_to_about_the_models_pixels(pipe: Pipeline, width: int, height: int) -> None:
    high, wide = fitted_size(pipe.model, (width, height))
    factor, own = pipe.vae.config.factor, own_side(pipe)
    assert high % factor == wide % factor == 0 < min(high, wide)
    if 1 / 4 <= width / height <= 4:
        assert abs(math.log(high * wide / own**2)) < 0.4
        assert abs(math.log((wide / high) / (width / height))) < 0.4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no caption": ({"captions": " "}, "the caption is empty"),
    "captions that are none": ({"captions": [3]}, "give text, or a list of texts"),
    "too many captions": ({"captions": ["a", "b"]}, "2 captions given for 1 images"),
    "a timestep too late": ({"timesteps": [1000]}, "timesteps"),
    "a timestep below 0": ({"timesteps": [-1]}, "timesteps"),
    "half a timestep": ({"timesteps": [1.5]}, "timesteps"),
    "no timestep": ({"timesteps": []}, "timesteps"),
    "one timestep": ({"timesteps": 100}, "timesteps"),
    "no trace": ({"trace": False}, "trace is False"),
    "another trace": ({"trace": "blunt"}, "trace is 'blunt'"),
    "sites that are not there": ({"trace": Trace(sites="attn9")}, "matches no attention"),
    "a seed below 0": ({"seed": -1}, "the seed"),
    "no seed": ({"seed": None}, "the seed"),
    "another syntax": ({"weights": "novelai"}, "weights"),
    "too many layers": ({"clip_skip": 99}, "clip_skip is 99"),
    "half a pixel": ({"height": 0.5}, "height"),
    "an image that is none": ({"images": 3}, "give a path"),
    "no images": ({"images": []}, "no image"),
    "latents": ({"images": torch.zeros(4, 8, 8)}, "the image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_looked_at_is_refused(pipe: Pipeline, case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        pipe.look(**{"images": noise_image(), "captions": "a circle", **changes})


def test_a_file_that_is_no_image_is_named(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"photo\.jpg"):
        pipe.look(tmp_path / "photo.jpg", "a circle")
    with pytest.raises(DataError, match=r"there is no image at .*none\.png"):
        pipe.look(tmp_path / "none.png", "a circle")


def test_captions_are_one_for_all_or_one_each() -> None:
    assert caption_list("a", 3) == ["a", "a", "a"]
    assert caption_list(("a", "b"), 2) == ["a", "b"]


def test_models_that_inpaint_and_captions_of_several_chunks_are_looked_at(clip_model: Any) -> None:
    for channels in (4, 9):
        pipe = Pipeline(clip_model(channels))
        (heatmaps,) = pipe.look(noise_image(), " ".join(["red"] * 90), trace=True)
        assert heatmaps.words.length == 154
        assert all(probs.isfinite().all() for probs in heatmaps.maps.values())


def test_a_caption_that_is_cut_is_said_to_be(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match="its end is left out"):
        pipe.look(noise_image(), " ".join(["red circle"] * 40))


def test_what_goes_unsaid_is_what_the_model_recommends(trained: Path) -> None:
    pipe = Pipeline.from_pretrained(trained)
    layers = pipe.text_encoder.config.num_hidden_layers
    whole, cut = (pipe.look(noise_image(), "a red circle", clip_skip=skip)[0]["red"].raw for skip in (0, layers - 1))
    assert not torch.equal(whole, cut)
    assert torch.equal(pipe.look(noise_image(), "a red circle")[0]["red"].raw, whole)
    recommended = dataclasses.replace(pipe.recommended, clip_skip=layers - 1)
    other = Pipeline(dataclasses.replace(pipe.model, recommended=recommended))
    assert torch.equal(other.look(noise_image(), "a red circle")[0]["red"].raw, cut)


def test_default_timesteps_are_whole_numbers_on_the_way() -> None:
    assert all(isinstance(timestep, int) and 0 <= timestep < 1000 for timestep in LOOK_TIMESTEPS)


@torch.no_grad()
def test_features_are_what_layers_return_in_the_mean_over_noises(pipe: Pipeline) -> None:
    """By hooks on the layers, which features do without."""
    side, image = own_side(pipe), noise_image()
    name, other = pipe.unet.layer_names[-2:]
    features = pipe.features(image, "a red circle", timestep=200, layers=name, noises=3, seed=9)
    resized = image.resize((side, side), Image.Resampling.LANCZOS)
    latents = pipe.vae.config.scaling_factor * pipe.vae.encode(images_to_tensor([resized])).mean
    text = pipe.encode_text("a red circle")
    generator = torch.Generator().manual_seed(9)
    seen: list[torch.Tensor] = []
    handle = pipe.unet.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
    alpha = pipe.schedule.alphas_cumprod[200]
    for _ in range(3):
        noise = torch.randn(latents.shape[1:], generator=generator)[None]
        pipe.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, torch.tensor([200]), text.embeddings, text.mask)
    handle.remove()
    assert torch.allclose(features.values, torch.stack(seen).mean(dim=0), atol=1e-5)
    assert features.layers == (name,)
    assert features.images[0].size == (side, side)
    both = pipe.features([image, noise_image(seed=1)], layers=[other, name], noises=1)
    assert len(both) == 2
    assert both.layers == (name, other)
    finest = max(pipe.unet.attention_sites, key=lambda site: -site.downscale).grid(*pipe.latent_size())
    assert both.values.shape[2:] == finest


def test_every_layer_has_features_of_its_grid(pipe: Pipeline) -> None:
    for name in pipe.unet.layer_names:
        pipe.unet.get_submodule(name)
        features = pipe.features(noise_image(), layers=name, noises=1)
        assert features.values.shape[0] == 1
        assert features.values.isfinite().all()
    assert {name.split(".")[0] for name in pipe.unet.layer_names} == {"down_blocks", "mid_block", "up_blocks"}


def test_features_do_not_depend_on_neighbours(pipe: Pipeline) -> None:
    images = [noise_image(seed=seed) for seed in range(3)]
    together = pipe.features(images, ["a circle", "two blue stars", "red"], noises=2)
    for number, caption in enumerate(("a circle", "two blue stars", "red")):
        alone = pipe.features(images[number], caption, noises=2)
        assert torch.allclose(together[number].values, alone.values, atol=1e-4)


NO_FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "a timestep too late": ({"timestep": 1000}, "timestep is 1000: give a whole number from 0 to 999"),
    "several timesteps": ({"timestep": [100]}, "timestep is"),
    "no noise": ({"noises": 0}, "noises is 0"),
    "layers that are not there": ({"layers": "attn9"}, "'attn9' matches no layer of this U-Net, which has down_blocks"),
    "layers that are none": ({"layers": 3}, "layers is 3"),
    "a seed below 0": ({"seed": -1}, "the seed"),
    "no images": ({"images": []}, "no image"),
    "an image that is none": ({"images": 3}, "give a path"),
    "several shapes": ({"images": [noise_image(), noise_image(160)]}, "give the height and width for all"),
    "an empty caption among others": ({"images": [noise_image()] * 2, "captions": ["a", ""]}, "the caption is empty"),
    "half a pixel": ({"width": 0.5}, "width"),
}


@pytest.mark.parametrize("case", NO_FEATURES)
def test_features_that_cannot_be_are_refused(pipe: Pipeline, case: str) -> None:
    changes, said = NO_FEATURES[case]
    with pytest.raises(UsageError, match=said):
        pipe.features(**{"images": noise_image(), **changes})


def test_models_that_inpaint_and_long_captions_have_features(clip_model: Any) -> None:
    for channels in (4, 9):
        features = Pipeline(clip_model(channels)).features(noise_image(), " ".join(["red"] * 90), noises=1)
        assert features.values.isfinite().all()


@torch.no_grad()
def test_presence_is_the_share_of_the_error_that_a_text_takes_away(pipe: Pipeline) -> None:
    side, image = own_side(pipe), noise_image()
    texts = ["a red circle", "a blue star"]
    (found,) = pipe.presence(image, texts, timesteps=[300, 700], noises=2, seed=4)
    resized = image.resize((side, side), Image.Resampling.LANCZOS)
    latents = pipe.vae.config.scaling_factor * pipe.vae.encode(images_to_tensor([resized])).mean
    generator = torch.Generator().manual_seed(4)
    shares: dict[str, list[float]] = {text: [] for text in texts}
    for timestep in (300, 700):
        errors = dict.fromkeys(("", *texts), 0.0)
        alpha = pipe.schedule.alphas_cumprod[timestep]
        for _ in range(2):
            noise = torch.randn(latents.shape[1:], generator=generator)[None]
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            for text in errors:
                conditioning = pipe.encode_text(text)
                prediction = pipe.unet(noisy, torch.tensor([timestep]), conditioning.embeddings, conditioning.mask)
                _, predicted = pipe.schedule.split(prediction, noisy, alpha.item())
                errors[text] += (predicted - noise).square().mean().item()
        for text in texts:
            shares[text].append(1 - errors[text] / errors[""])
    for text in texts:
        assert found[text] == pytest.approx(np.mean(shares[text]), abs=1e-4)
    several = pipe.presence([image, noise_image(96, seed=1)], texts, timesteps=[300, 700], seed=4)
    assert several[0] == pytest.approx(found, abs=1e-4)
    assert list(several[1]) == texts


NO_PRESENCE: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"texts": []}, "a text is empty, or there is none"),
    "an empty text": ({"texts": ["a", " "]}, "a text is empty, or there is none"),
    "text by itself": ({"texts": "a dog"}, "texts is 'a dog': give texts, as in"),
    "texts that are none": ({"texts": [3]}, "texts is"),
    "no timestep": ({"timesteps": []}, "timesteps"),
    "half a noise": ({"noises": 0.5}, "noises is 0.5"),
    "no images": ({"images": []}, "no image"),
}


@pytest.mark.parametrize("case", NO_PRESENCE)
def test_presence_that_cannot_be_is_refused(pipe: Pipeline, case: str) -> None:
    changes, said = NO_PRESENCE[case]
    with pytest.raises(UsageError, match=said):
        pipe.presence(**{"images": noise_image(), "texts": ["a dog"], **changes})


def test_models_that_inpaint_and_long_texts_have_presence(clip_model: Any) -> None:
    for channels in (4, 9):
        (found,) = Pipeline(clip_model(channels)).presence(noise_image(), [" ".join(["red"] * 90), "a"], noises=1)
        assert all(math.isfinite(share) for share in found.values())
