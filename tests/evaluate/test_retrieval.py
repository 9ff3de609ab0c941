"""Choosing captions among hard negatives: what is counted, and encoders that know nothing or everything."""

import pytest
import torch

from gobelin import scenes
from gobelin.clip import ImageEncoder
from gobelin.data import SceneDataset
from gobelin.evaluate import retrieval as module
from gobelin.evaluate.retrieval import measure_retrieval, negative_kind
from gobelin.pipeline import Pipeline


@pytest.mark.parametrize(
    ("caption", "negative", "kind"),
    [
        ("a red circle and the blue ring", "a blue circle and the red ring", "order"),
        ("a red circle", "an orange circle", "colour"),
        ("an orange plus sign", "an orange square", "shape"),
        ("here are 3 red stars", "here are 4 red stars", "number"),
        ("two boxes", "three boxes", "number"),
        ("a red circle to the left of a ring", "a red circle to the right of a ring", "relation"),
        ("a ring, and a red box over it", "a ring, and a red box under it", "relation"),
        ("three rings", "three boxes", "shape"),
        ("a striped red ring", "a dotted red ring", "texture, size or background"),
    ],
)
def test_what_is_wrong_about_a_negative_is_told(caption, negative, kind):
    assert negative_kind(caption, negative) == kind


def test_every_kind_of_negative_of_the_scenes_has_a_name():
    source = SceneDataset(world=scenes.CORE, count=60, split="dev")
    pairs = [source[index] for index in range(60)]
    kinds = {negative_kind(pair.caption, negative) for pair in pairs for negative in pair.negatives}
    assert kinds == {"order", "colour", "shape", "number", "relation"}


@pytest.fixture
def encoders(trained):
    pipe = Pipeline.from_pretrained(trained)
    return pipe.text_encoder, ImageEncoder.from_pretrained(trained / "image_encoder"), pipe.tokenizer


def test_shares_are_of_scenes_and_of_negatives(encoders):
    found = measure_retrieval(*encoders, scenes.CORE, count=70)
    pairs = SceneDataset(world=scenes.CORE, count=70, split="dev")
    negatives = [len(pairs[index].negatives) for index in range(70)]
    assert found.correct.n == 70
    assert sum(share.n for share in found.by_kind.values()) == sum(negatives)
    assert found.chance == pytest.approx(sum(1 / (1 + number) for number in negatives) / 70)
    assert found.correct.value < 0.7, "four steps of training are not an encoder"


@pytest.mark.parametrize(("knows", "value"), [(True, 1.0), (False, 0.0)])
def test_encoders_that_know_all_and_that_are_always_wrong(encoders, monkeypatch, knows, value):
    text_encoder, image_encoder, tokenizer = encoders

    def margins(text, image, tokens, batch):
        return [[1.0 if knows else -1.0] * len(pair.negatives) for pair in batch]

    monkeypatch.setattr(module, "_margins", margins)
    found = measure_retrieval(text_encoder, image_encoder, tokenizer, scenes.CORE, count=10)
    assert found.correct.value == value
    assert all(share.value == value for share in found.by_kind.values())


def test_a_margin_is_that_of_the_caption_and_the_negative_themselves(encoders):
    """Computed one pair at a time, apart from the batch: a caption mixed up with its neighbour's would show."""
    text_encoder, image_encoder, tokenizer = encoders
    pairs = SceneDataset(world=scenes.NANO, count=3, split="dev")
    batch = [pairs[index] for index in range(3)]
    with torch.no_grad():
        together = module._margins(text_encoder, image_encoder, tokenizer, batch)
        for pair, margins in zip(batch, together, strict=True):
            assert len(margins) == len(pair.negatives) > 0
            image = image_encoder(torch.from_numpy(pair.image).permute(2, 0, 1)[None] / 127.5 - 1)
            scores = []
            for text in (pair.caption, *pair.negatives):
                ids = tokenizer([text])
                pooled = text_encoder.pooled(ids, text_encoder(ids))
                scores.append(image_encoder.similarity(image, image_encoder.project_text(pooled)).item())
            expected = [scores[0] - score for score in scores[1:]]
            torch.testing.assert_close(torch.tensor(margins), torch.tensor(expected), rtol=1e-3, atol=1e-4)
