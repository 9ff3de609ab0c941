"""Three networks, a tokenizer and a schedule are a model only if they fit together."""

import dataclasses

import pytest
import torch

from gobelin.checkpoint import Model, open_model
from gobelin.clip import TextEncoder
from gobelin.errors import ModelError
from gobelin.vae import VAE


@pytest.fixture(scope="module")
def model(oracle_folder) -> Model:
    return open_model(oracle_folder, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 15}, "gives more tokens than the text encoder has places"),
        ({"vocab_size": 8}, "has '.*', and the text encoder, which knows 8 tokens"),
        ({"hidden_size": 32}, "expects text embeddings of another width"),
    ],
)
def test_parts_that_do_not_fit_are_no_model(model, changes, message):
    encoder = TextEncoder(dataclasses.replace(model.text_encoder.config, **changes))
    with pytest.raises(ModelError, match=f"the parts of this model do not belong together: the .* {message}"):
        dataclasses.replace(model, text_encoder=encoder)


def test_a_vae_of_other_channels_is_no_part_of_the_model(model):
    vae = VAE(dataclasses.replace(model.vae.config, latent_channels=8))
    with pytest.raises(ModelError, match="the U-Net predicts 4 channels, and the VAE's latents have 8"):
        dataclasses.replace(model, vae=vae)
