"""Caption sensitivity: a U-Net that ignores captions, one that reads one kind of word, one that is always right."""

import pytest
import torch

from gobelin import scenes
from gobelin.data import SceneDataset
from gobelin.evaluate import caption_sensitivity as module
from gobelin.evaluate.caption_sensitivity import caption_sensitivity
from gobelin.evaluate.retrieval import negative_kind
from gobelin.pipeline import Pipeline


@pytest.fixture
def pipeline(trained):
    return Pipeline.from_pretrained(trained, "cpu")


def hearing(pipeline, wrong):
    """A U-Net that is off by one with the captions that ``wrong`` says yes to."""
    source = SceneDataset(world=scenes.NANO, count=200, split="dev")
    kinds = {}
    for index in range(len(source)):
        pair = source[index]
        kinds[pair.caption] = None
        for negative in pair.negatives:
            kinds.setdefault(negative, negative_kind(pair.caption, negative))
    names = {tuple(pipeline.tokenizer([text])[0].tolist()): kind for text, kind in kinds.items()}
    pipeline.text_encoder.forward = lambda token_ids: token_ids[:, :, None].float()

    def predict(noisy_latents, timesteps, text_embeddings):
        heard = [wrong(names[tuple(row.long().tolist())]) for row in text_embeddings[:, :, 0]]
        return torch.tensor(heard).float()[:, None, None, None].expand(noisy_latents.shape)

    pipeline.unet.forward = predict
    return {(one.kind, one.first_timestep): one for one in caption_sensitivity(pipeline, scenes.NANO, count=20)}


def test_who_is_deaf_hears_nothing(pipeline):
    pipeline.unet.forward = lambda noisy_latents, timesteps, text_embeddings: 0.3 * noisy_latents
    found = caption_sensitivity(pipeline, scenes.NANO, count=8)
    assert {one.kind for one in found} == {"colour", "order", "relation", "shape"}
    assert [(one.first_timestep, one.last_timestep) for one in found[:3]] == [(100, 399), (400, 699), (700, 999)]
    assert all(one.rise == 0 == one.margin and one.n == 8 for one in found)


def test_only_what_is_heard_rises(pipeline):
    found = hearing(pipeline, wrong=lambda kind: kind == "colour")
    for (kind, _), one in found.items():
        if kind == "colour":
            assert one.rise > 5 * one.margin > 0
        else:
            assert one.rise == pytest.approx(0, abs=0.2), "a caption of another kind may read the same"


def test_the_error_is_that_of_training(pipeline, monkeypatch):
    schedule, asked = pipeline.schedule, {}
    add_noise = schedule.add_noise

    def remember(latents, noise, timesteps):
        asked.update(latents=latents, noise=noise, timesteps=timesteps, done=0)
        return add_noise(latents, noise, timesteps)

    def oracle(noisy_latents, timesteps, text_embeddings):
        at = slice(asked["done"], asked["done"] + len(timesteps))
        asked["done"] = at.stop % len(asked["timesteps"])
        assert torch.equal(timesteps, asked["timesteps"][at])
        return schedule.target(asked["latents"][at], asked["noise"][at], timesteps) + 0.5

    monkeypatch.setattr(type(schedule), "add_noise", lambda self, *given: remember(*given))
    monkeypatch.setattr(module, "_BATCH_SIZE", 3)
    pipeline.unet.forward = oracle
    for one in caption_sensitivity(pipeline, scenes.NANO, count=8):
        assert one.rise == pytest.approx(0, abs=1e-5)
        assert one.first_timestep <= asked["timesteps"].min()
    assert one.last_timestep == 999 >= asked["timesteps"].max() > 800
