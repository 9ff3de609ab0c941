"""The text encoder against transformers' CLIPTextModel, and the contrastive loss against the paper's formula."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.conftest import edit_config, fill_, relative_error
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from gobelin.clip import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig, contrastive_loss
from gobelin.errors import ModelError, UsageError
from gobelin.formats.weights import parameter_count

SMALL = TextEncoderConfig.of(12, layers=3, heads=2, vocab_size=40, max_position_embeddings=10)


def random_config(seed: int) -> TextEncoderConfig:
    draw = random.Random(seed)
    heads, vocab = draw.choice((1, 2, 4)), draw.randint(10, 60)
    return TextEncoderConfig(
        vocab_size=vocab,
        hidden_size=heads * draw.randint(2, 8),
        intermediate_size=draw.randint(5, 40),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=heads,
        max_position_embeddings=draw.randint(4, 16),
        hidden_act=("quick_gelu", "gelu")[seed % 2],
        layer_norm_eps=draw.choice((1e-5, 1e-3)),
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )


def token_ids(config: TextEncoderConfig, *lengths: int) -> Tensor:
    """BOS, as many tokens as asked for, EOS, and EOS as padding to the full length."""
    ids = torch.full((len(lengths), config.max_position_embeddings), config.eos_token_id)
    ids[:, 0] = config.bos_token_id
    for row, length in zip(ids, lengths, strict=True):
        row[1 : 1 + length] = torch.randint(config.bos_token_id, (length,))
    return ids


def twin(encoder: TextEncoder) -> CLIPTextModel:
    """transformers' model of the same configuration and weights."""
    theirs = CLIPTextModel(CLIPTextConfig(**encoder.config_json())).eval()
    text_model = getattr(theirs, "text_model", theirs)
    text_model.load_state_dict(encoder.text_model.state_dict())
    return theirs


@pytest.mark.parametrize("seed", range(12))
def test_any_shape_computes_what_transformers_does(seed: int) -> None:
    ours = fill_(TextEncoder(random_config(seed)), seed)
    length = ours.config.max_position_embeddings
    ids = token_ids(ours.config, 0, 1, length - 2)
    theirs = twin(ours)(ids)
    embeddings = ours(ids)
    assert relative_error(embeddings, theirs.last_hidden_state) < 2e-5
    assert relative_error(ours.pooled(ids, embeddings), theirs.pooler_output) < 2e-5


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_is_the_final_norm_of_an_earlier_hidden_state(clip_skip: int) -> None:
    ours = fill_(TextEncoder(SMALL))
    ids = token_ids(SMALL, 3, 6)
    theirs = twin(ours)
    final_layer_norm = getattr(theirs, "text_model", theirs).final_layer_norm
    hidden_states = theirs(ids, output_hidden_states=True).hidden_states
    expected = final_layer_norm(hidden_states[-(clip_skip + 1)])
    assert relative_error(ours(ids, clip_skip=clip_skip), expected) < 2e-5


@pytest.mark.parametrize("clip_skip", [-1, 3])
def test_clip_skip_beyond_the_layers_is_refused(clip_skip: int) -> None:
    with pytest.raises(UsageError, match=f"clip_skip is {clip_skip}: give a number from 0 to 2"):
        TextEncoder(SMALL)(token_ids(SMALL, 1), clip_skip=clip_skip)


def test_sd15_has_its_parameters_under_its_keys() -> None:
    with torch.device("meta"):
        ours = TextEncoder(TextEncoderConfig.sd15())
        theirs = CLIPTextModel(CLIPTextConfig(**ours.config_json()))
    assert parameter_count(ours) == 123_060_480
    shapes, expected = (
        {name.removeprefix("text_model."): t.shape for name, t in encoder.state_dict().items()}
        for encoder in (ours, theirs)
    )
    assert shapes == expected


def test_a_saved_folder_opens_in_transformers_and_one_of_transformers_opens_here(tmp_path: Path) -> None:
    ours = fill_(TextEncoder(SMALL))
    ids = token_ids(SMALL, 5)
    ours.save_pretrained(tmp_path / "ours")
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "ours" / TextEncoder.weights_name))
    theirs, report = CLIPTextModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert relative_error(ours(ids), theirs.eval()(ids).last_hidden_state) < 2e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = TextEncoder.from_pretrained(tmp_path / "theirs")
    assert again.config == SMALL
    assert torch.equal(again(ids), ours(ids))


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("position_ids", [True, False])
def test_weights_load_with_and_without_prefix_and_position_ids(prefix: str, position_ids: bool, tmp_path: Path) -> None:
    ours = fill_(TextEncoder(SMALL))
    ours.save_pretrained(tmp_path)
    tensors = {prefix + name.removeprefix("text_model."): t for name, t in ours.state_dict().items()}
    if position_ids:
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(10)[None]
    save_file(tensors, tmp_path / TextEncoder.weights_name)
    loaded = TextEncoder.from_pretrained(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 12 must divide into 5 heads"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': give one of 'quick_gelu', 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ],
)
def test_a_config_file_of_another_architecture_is_refused(fields: dict, message: str, tmp_path: Path) -> None:
    TextEncoder(SMALL).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(ModelError, match=message):
        TextEncoder.from_pretrained(tmp_path)


def test_pooled_is_the_embedding_at_the_first_eos() -> None:
    encoder = TextEncoder(SMALL)
    embeddings = torch.randn(3, 10, 12)
    pooled = encoder.pooled(token_ids(SMALL, 0, 4, 8), embeddings)
    assert torch.equal(pooled, torch.stack([embeddings[0, 1], embeddings[1, 5], embeddings[2, 9]]))


def test_initial_weights_are_those_of_clip() -> None:
    config = TextEncoderConfig.of(64, layers=2, heads=4, vocab_size=300)
    weights = TextEncoder(config).init_().state_dict()
    expected = {
        "embeddings.token_embedding.weight": 0.02,
        "embeddings.position_embedding.weight": 0.01,
        "encoder.layers.1.self_attn.q_proj.weight": 64**-0.5,
        "encoder.layers.1.self_attn.out_proj.weight": 64**-0.5 * 4**-0.5,
        "encoder.layers.1.mlp.fc1.weight": 128**-0.5,
        "encoder.layers.1.mlp.fc2.weight": 64**-0.5 * 4**-0.5,
    }
    for name, std in expected.items():
        assert weights[f"text_model.{name}"].std().item() == pytest.approx(std, rel=0.1)
    assert not weights["text_model.encoder.layers.0.mlp.fc1.bias"].any()


IMAGES = ImageEncoderConfig(
    image_size=16, block_out_channels=(4, 8), norm_num_groups=2, text_width=12, projection_dim=6
)


def test_the_image_encoder_gives_unit_vectors_at_any_size_and_survives_a_save(tmp_path: Path) -> None:
    encoder = fill_(ImageEncoder(IMAGES))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for batch in (images, torch.rand(3, 3, 20, 33)):
        vectors = encoder(batch)
        assert vectors.shape == (len(batch), 6)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(batch)))
    texts = encoder.project_text(torch.randn(5, 12))
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(5))
    encoder.save_pretrained(tmp_path)
    assert torch.equal(ImageEncoder.from_pretrained(tmp_path)(images), encoder(images))


@pytest.mark.parametrize(("logit_scale", "scale"), [(2.0, 7.389056), (9.0, 100.0)])
def test_similarity_is_the_cosine_times_a_scale_of_at_most_100(logit_scale: float, scale: float) -> None:
    encoder = ImageEncoder(IMAGES)
    assert encoder.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    torch.nn.init.constant_(encoder.logit_scale, logit_scale)
    images, texts = F.normalize(torch.randn(3, 6), dim=-1), F.normalize(torch.randn(5, 6), dim=-1)
    expected = torch.stack([scale * F.cosine_similarity(image[None], texts) for image in images])
    torch.testing.assert_close(encoder.similarity(images, texts), expected)


@pytest.mark.parametrize("negatives", [0, 3])
def test_without_equal_captions_the_loss_is_two_cross_entropies(negatives: int) -> None:
    logits = torch.randn(6, 6 + negatives) * 3
    pairs = torch.arange(6)
    expected = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits[:, :6].T, pairs)) / 2
    torch.testing.assert_close(contrastive_loss(logits), expected)
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(6).bool()), expected)


def test_equal_captions_share_the_blame_and_hard_negatives_only_take() -> None:
    # Pairs 0 and 1 have the same caption; the fourth text belongs to no image. e^logits are whole numbers.
    logits = torch.tensor([[3.0, 3.0, 1.0, 1.0], [2.0, 2.0, 1.0, 5.0], [1.0, 1.0, 4.0, 2.0]]).log()
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    # image to text: rows sum to 8, 10 and 8; each of two equal texts is half of what should be found
    find_text = -torch.tensor([3 / 8, 2 / 10, 4 / 8]).log().mean()
    # text to image: columns sum to 6, 6 and 6; texts 0 and 1 should find images 0 and 1 half each
    shared = (torch.tensor(3 / 6).log() + torch.tensor(2 / 6).log()) / 2
    find_image = -torch.stack([shared, shared, torch.tensor(4 / 6).log()]).mean()
    torch.testing.assert_close(contrastive_loss(logits, same), (find_text + find_image) / 2)
