"""Features of images and captions: as the networks give them, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from gobelin.clip import ImageEncoder, TextEncoder
from gobelin.errors import ModelError, UsageError
from gobelin.evaluate.image_features import (
    CLIPFeatures,
    GobelinFeatures,
    InceptionFeatures,
    SharedSpace,
    _downloaded,
    encode_all_captions,
    open_image_features,
    require_package,
)
from gobelin.images import images_to_tensor
from gobelin.pipeline import shipped_model
from gobelin.tokenizer import Tokenizer

CAPTIONS = ["a red circle", "a blue square left of a red circle", "red " * 40]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)


def test_a_models_own_features_are_its_similarities(images):
    folder = shipped_model()
    found = open_image_features(folder)
    assert isinstance(found, GobelinFeatures)
    encoded, texts = found.encode_images(images), encode_all_captions(found, CAPTIONS)
    encoder, tokenizer = (
        ImageEncoder.from_pretrained(folder / "image_encoder"),
        Tokenizer.from_pretrained(folder / "tokenizer"),
    )
    text_encoder = TextEncoder.from_pretrained(folder / "text_encoder").float()
    encoder.float()
    ids = tokenizer(CAPTIONS)
    with torch.no_grad():
        pooled = text_encoder.pooled(ids, text_encoder(ids))
        expected = encoder.similarity(encoder(images_to_tensor(images)), encoder.project_text(pooled))
        cosines = torch.nn.functional.cosine_similarity(encoded[:, None].double(), texts[None], dim=-1)
        scale = encoder.logit_scale.exp().clamp(max=100)
    torch.testing.assert_close((scale * cosines).float(), expected, rtol=1e-4, atol=1e-3)
    assert (encoded.square().mean(dim=1) - 1).abs().max() < 1e-5


def test_a_clip_of_transformers_scores_as_it_does_there(images, small_clip):
    found = open_image_features(small_clip)
    assert isinstance(found, CLIPFeatures)
    clip, processor = CLIPModel.from_pretrained(small_clip), CLIPProcessor.from_pretrained(small_clip)
    given = processor(
        text=CAPTIONS, images=list(images), padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        expected = clip(**given)
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(normal(found.encode_images(images)), expected.image_embeds)
    torch.testing.assert_close(normal(found.encode_captions(CAPTIONS)), expected.text_embeds)
    assert found.description == f"CLIP ({small_clip.name}, transformers)"


def test_what_is_no_network_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"there is nothing at .*nowhere: give a model folder with an image_encoder"):
        open_image_features(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="has no network that encodes images"):
        open_image_features(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="cannot be opened as a CLIP of transformers: "):
        open_image_features(tmp_path)


@pytest.mark.parametrize("module", ["torchmetrics", "torch_fidelity", "transformers"])
def test_a_missing_package_is_named_with_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"is not installed: pip install 'gobelin\[fidelity\]'"):
        require_package(module)


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch, tmp_path):
    """Nothing listens at the proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    url = "https://example.org/weights-01234567.pth"
    with pytest.raises(ModelError) as refused:
        _downloaded(url)
    file = tmp_path / "hub" / "checkpoints" / "weights-01234567.pth"
    assert f"fetch {url} and put it at {file}, or give its path as --features" in str(refused.value)
    file.write_bytes(b"there")
    assert _downloaded(url) == file


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Inception, in the file's layout."""
    network = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        made = network.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(made.state_dict(), file)
    return file


def test_inception_is_opened_from_a_file(images, inception_weights):
    found = open_image_features(inception_weights)
    assert isinstance(found, InceptionFeatures)
    assert not isinstance(found, SharedSpace)
    assert found.encode_images(images).shape == (3, 2048)


def test_other_files_than_inceptions_are_refused(tmp_path, inception_weights):
    file = tmp_path / "weights.pth"
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return Path.touch, (ran,)

    for content in ({"fc.weight": torch.zeros(2, 2)}, Harmful()):
        torch.save(content, file)
        with pytest.raises(ModelError, match="does not hold the weights of FID's Inception: give the file at https"):
            open_image_features(file)
    assert not ran.exists(), "a program in a file was run"
