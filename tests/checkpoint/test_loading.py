"""Every shape that a model comes in opens to the same numbers as in diffusers, and what is no model is refused."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from tests.checkpoint.file_kinds import rounded
from tests.conftest import edit_config
from tests.oracles import differences, original_weights

from gobelin.checkpoint.clip_tokenizer import find_clip_tokenizer
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import ModelError, UsageError
from gobelin.formats import ldm
from gobelin.pipeline import Pipeline
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_same(pipe: Pipeline, oracle: StableDiffusionPipeline) -> None:
    found = differences(pipe, oracle)
    assert max(found.values()) <= 2e-5, found


def test_pickles_are_refused_unless_they_are_allowed(oracle, tmp_path):
    oracle.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ModelError, match=r"is a pickle, a format that can hold programs: give its \.safetensors"):
        Pipeline.from_pretrained(tmp_path, "cpu")


def test_a_folder_with_a_variant_only_says_so(oracle, tmp_path):
    oracle.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ModelError, match="has its weights as variant fp16 only: name it, as variant"):
        Pipeline.from_pretrained(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("safetensors", torch.float32), ("nested ckpt", torch.bfloat16)],
)
def test_an_original_single_file(oracle, make_oracle, oracle_folder, words, kind, dtype, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in original_weights(oracle).items()}
    weights["alphas_cumprod"] = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0).to(dtype)
    weights[f"{ldm.TEXT_PREFIX}text_model.embeddings.position_ids"] = torch.arange(16)[None]
    path = tmp_path / f"model.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if "nested" in kind else weights, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = Pipeline.from_pretrained(path, "cpu", tokenizer=words, allow_pickle="ckpt" in kind)
    assert_same(pipe, rounded(oracle, make_oracle, dtype, scaled=False))
    if dtype == torch.float32:  # and diffusers reads the same from it
        theirs = UNet2DConditionModel.from_single_file(
            str(path), config=str(oracle_folder / "unet"), torch_dtype=torch.float32
        )
        vae = AutoencoderKL.from_single_file(str(path), config=str(oracle_folder / "vae"), torch_dtype=torch.float32)
        for module, ours in ((theirs, pipe.unet), (vae, pipe.vae)):
            assert all(torch.equal(ours.state_dict()[key], one) for key, one in module.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_computed_in_is_what_was_asked_for(oracle_folder, dtype):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu", dtype)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {dtype}


def test_the_average_of_a_single_file(oracle, make_oracle, words, tmp_path):
    averaged = make_oracle()
    weights = original_weights(oracle)
    for name, tensor in original_weights(averaged).items():
        if name.startswith(ldm.UNET_PREFIX):
            weights[ldm.map_ema_key(name)] = tensor * 0.5
    weights |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in weights
    save_file(weights, tmp_path / "x.safetensors")
    for ema, share in ((False, 1.0), (True, 0.5)):
        pipe = Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", tokenizer=words, ema=ema)
        expected = oracle.unet.state_dict()["conv_in.weight"] * share
        assert torch.equal(pipe.unet.conv_in.weight, expected)
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(weights), oracle.unet.config, extract_ema=True)
    assert all(torch.equal(pipe.unet.state_dict()[key], one) for key, one in theirs.items())
    save_file(original_weights(oracle), tmp_path / "y.safetensors")
    with pytest.raises(ModelError, match="has no average"):
        Pipeline.from_pretrained(tmp_path / "y.safetensors", "cpu", tokenizer=words, ema=True)


def test_a_vae_of_its_own(oracle, make_oracle, oracle_folder, words, tmp_path):
    weights = original_weights(oracle)
    save_file(weights, tmp_path / "x.safetensors")
    other = {name: tensor * 0.9 for name, tensor in weights.items() if name.startswith(ldm.VAE_PREFIX)}
    save_file(other, tmp_path / "prefixed.safetensors")
    save_file({name.removeprefix(ldm.VAE_PREFIX): one for name, one in other.items()}, tmp_path / "vae.safetensors")
    oracle.vae.save_pretrained(tmp_path / "vae")
    for vae, share in (("prefixed.safetensors", 0.9), ("vae.safetensors", 0.9), ("vae", 1.0)):
        pipe = Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", tokenizer=words, vae=tmp_path / vae)
        assert torch.equal(pipe.vae.decoder.conv_in.weight, oracle.vae.decoder.conv_in.weight * share)
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu", vae=tmp_path / "vae.safetensors")
    assert torch.equal(pipe.vae.decoder.conv_in.weight, oracle.vae.decoder.conv_in.weight * 0.9)
    with pytest.raises(ModelError, match="it is a VAE: give it as vae"):
        Pipeline.from_pretrained(tmp_path / "vae.safetensors", "cpu", tokenizer=words)


def test_inpainting_models_have_nine_channels(make_oracle, words, tmp_path):
    oracle = make_oracle(9)
    oracle.save_pretrained(tmp_path / "folder")
    save_file(original_weights(oracle), tmp_path / "x.safetensors")
    assert_same(Pipeline.from_pretrained(tmp_path / "folder", "cpu"), oracle)
    assert_same(Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", tokenizer=words), oracle)


def test_the_names_are_those_that_diffusers_converts_at_the_full_size():
    with torch.device("meta"):
        networks = UNet(UNetConfig.sd15()), VAE(VAEConfig.sd15()), TextEncoder(TextEncoderConfig.sd15())
    unet, vae, text = (network.state_dict() for network in networks)
    unet_names, vae_names = ldm.map_unet_keys(unet, 2), ldm.map_vae_keys(vae, 4)
    stored = {name: unet[key] for key, name in unet_names.items()}
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None}
    theirs = single_file_utils.convert_ldm_unet_checkpoint(stored, config)
    assert theirs.keys() == unet.keys()
    assert len(theirs) == 686
    assert all(theirs[key] is unet[key] for key in unet)

    numbered = {name: torch.tensor(float(index)) for index, name in enumerate(vae_names.values())}
    stored = {
        name: one.reshape(1, 1, 1) if ldm.is_vae_attention_weight(name) else one for name, one in numbered.items()
    }
    blocks = ["x"] * 4
    config = {"down_block_types": blocks, "up_block_types": blocks, "block_out_channels": blocks}
    theirs = single_file_utils.convert_ldm_vae_checkpoint(stored, config)
    assert {key: one.item() for key, one in theirs.items()} == {
        key: numbered[name].item() for key, name in vae_names.items()
    }
    assert ldm.map_text_keys(text) == {key: f"cond_stage_model.transformer.{key}" for key in text}

    shapes = {name: tuple(unet[key].shape) for key, name in unet_names.items()}
    assert UNetConfig(**ldm.infer_unet_config(shapes)) == UNetConfig.sd15()
    shapes = {name: tuple(vae[key].shape) for key, name in vae_names.items()}
    assert VAEConfig(**ldm.infer_vae_config(shapes)) == VAEConfig.sd15()


def test_the_tokenizer_of_a_single_file(oracle, words, tmp_path, monkeypatch):
    path = tmp_path / "model" / "x.safetensors"
    path.parent.mkdir()
    save_file(original_weights(oracle), path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("gobelin.checkpoint.clip_tokenizer.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has no tokenizer, .* give its folder as tokenizer"):
        Pipeline.from_pretrained(path, "cpu")
    cached = tmp_path / "hub" / "models--openai--clip-vit-large-patch14" / "snapshots" / "abc"
    for place in (cached, path.parent / "tokenizer", path.parent):
        shutil.copytree(words, place, dirs_exist_ok=True)
        assert Pipeline.from_pretrained(path, "cpu").tokenizer("a red ring").shape == (1, 16)
        shutil.rmtree(place) if place != path.parent else None


def test_clips_tokenizer_of_an_installed_open_clip(tmp_path, monkeypatch):
    """Token ids as OpenAI's tokenizer gives them."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    tokenizer = find_clip_tokenizer(tmp_path / "x.safetensors")
    assert len(tokenizer.vocab) == 49408
    for text, ids in (
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("An astronaut riding a horse, highly detailed!", [550, 18376, 6765, 320, 4558, 267, 5302, 12609, 256]),
    ):
        assert tokenizer(text)[0].tolist() == [49406, *ids, *[49407] * (76 - len(ids))]


def test_a_repository_in_the_cache_of_the_hub(oracle_folder, oracle, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there = tmp_path / "models--someone--painter"
    shutil.copytree(oracle_folder, there / "snapshots" / "abc")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc")
    assert_same(Pipeline.from_pretrained("someone/painter", "cpu"), oracle)
    with pytest.raises(ModelError, match="no file or folder at someone/else, and the Hub does not give it"):
        Pipeline.from_pretrained("someone/else", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "is of Stable Diffusion XL"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "is of Stable Diffusion 3"),
        ({"_class_name": "FluxPipeline"}, "is of 'FluxPipeline'"),
        ({"unet": ["os", "system"]}, "its unet is \\['os', 'system'\\], and only UNet2DConditionModel is supported"),
        ({"vae": None}, "its vae is None"),
        ({"tokenizer": "../evil"}, r"its tokenizer is '\.\./evil'"),
    ],
)
def test_other_kinds_of_folders_are_refused_by_name(change, message, oracle_folder, tmp_path):
    shutil.copytree(oracle_folder, tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        Pipeline.from_pretrained(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dim": 1024}, r"is of Stable Diffusion 2\.x"),
        ({"use_linear_projection": True}, r"is of Stable Diffusion 2\.x"),
        ({"addition_embed_type": "text_time"}, "is of Stable Diffusion XL"),
    ],
)
def test_other_u_nets_are_refused_by_name(change, message, oracle_folder, tmp_path):
    shutil.copytree(oracle_folder, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path / "unet", **change)
    with pytest.raises(ModelError, match=message):
        Pipeline.from_pretrained(tmp_path, "cpu")


def test_single_files_that_do_not_fit_name_the_first_tensor(oracle, words, tmp_path):
    path = tmp_path / "x.safetensors"
    whole = original_weights(oracle)
    first = f"{ldm.UNET_PREFIX}middle_block.0.in_layers.0.weight"

    def opened(weights):
        save_file(weights, path)
        return Pipeline.from_pretrained(path, "cpu", tokenizer=words)

    with pytest.raises(ModelError, match=r"lacks 'mid_block\.resnets\.0\.norm1\.weight'"):
        opened({name: one for name, one in whole.items() if name != first})
    with pytest.raises(
        ModelError, match=r"is not laid out as a Stable Diffusion 1\.x file: it lacks '.*\.input_blocks\.0\.0\.weight'"
    ):
        opened({name: one for name, one in whole.items() if ".input_blocks.0.0." not in name})
    with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.norm1\.weight' is \[3\], but"):
        opened(whole | {first: torch.ones(3)})
    with pytest.raises(ModelError, match=r"norm1\.weight' holds NaN or infinity"):
        opened(whole | {first: torch.full((64,), torch.nan)})
    with pytest.warns(UserWarning, match="holds 'something.else', which this model has no place for"):
        opened(whole | {"something.else": torch.ones(2)})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"conv_in.weight": "../secret.safetensors"}}, "expected one in the same folder"),
        ({"weight_map": {"conv_in.weight": "/etc/passwd"}}, "expected one in the same folder"),
        ({"weight_map": {"conv_in.weight": "part.safetensors"}}, "no weight file at"),
        (
            {"weight_map": {"conv_in.weight": "there.safetensors"}},
            "does not name 'other'",
        ),
        ({"weight_map": ["x"]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_names_files_beside_it_and_no_others(index, message, oracle_folder, tmp_path):
    shutil.copytree(oracle_folder, tmp_path / "model")
    part = tmp_path / "model" / "unet"
    (part / "diffusion_pytorch_model.safetensors").rename(tmp_path / "secret.safetensors")
    save_file({"other": torch.ones(1)}, part / "there.safetensors")
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        Pipeline.from_pretrained(tmp_path / "model", "cpu")


def test_options_that_do_not_belong_are_refused(oracle_folder, oracle, words, tmp_path):
    with pytest.raises(UsageError, match="ema is for single files"):
        Pipeline.from_pretrained(oracle_folder, "cpu", ema=True)
    save_file(original_weights(oracle), tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="is a single file: leave it out"):
        Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", tokenizer=words, variant="fp16")
    with pytest.raises(ModelError, match=r"no model at .*: expected a folder with a model_index\.json"):
        Pipeline.from_pretrained(tmp_path / "nowhere", "cpu")


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_single_file_and_a_folder_come_back_identical(oracle, oracle_folder, words, dtype, tmp_path):
    """Folder → single file → folder, and single file → folder → single file."""
    Pipeline.from_pretrained(oracle_folder, "cpu").save_single_file(tmp_path / "x.safetensors", dtype)
    pipe = Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", dtype, tokenizer=words)
    pipe.save_pretrained(tmp_path / "again")
    for part in ("unet", "vae", "text_encoder"):
        file = next((oracle_folder / part).glob("*.safetensors"))
        before, after = load_file(file), load_file(tmp_path / "again" / part / file.name)
        names = {name: name if name in after else f"text_model.{name}" for name in before}
        assert set(names.values()) == after.keys()
        assert all(torch.equal(after[names[key]], one.to(dtype or one.dtype)) for key, one in before.items())
    Pipeline.from_pretrained(tmp_path / "again", "cpu", dtype).save_single_file(tmp_path / "y.safetensors")
    once, twice = load_file(tmp_path / "x.safetensors"), load_file(tmp_path / "y.safetensors")
    assert once.keys() == twice.keys() == original_weights(oracle).keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_schedule_that_leaves_its_spacing_to_the_sampler_comes_back_so(oracle, words, tmp_path):
    save_file(original_weights(oracle), tmp_path / "x.safetensors")
    pipe = Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", tokenizer=words)
    assert pipe.schedule.config.timestep_spacing is None
    pipe.save_pretrained(tmp_path / "folder")
    again = Pipeline.from_pretrained(tmp_path / "folder", "cpu")
    assert again.schedule.config == pipe.schedule.config
    options = {"seed": 0, "steps": 2, "height": 64, "width": 64}
    torch.testing.assert_close(  # another spacing is far off
        again("a red ring", **options).latents, pipe("a red ring", **options).latents, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds a list, expected an object"),
        ('{"unet": [1]}', "under 'gobelin': unet is no object"),
        ('{"schedule": [1]}', "under 'gobelin': schedule is no object"),
        ('{"unet": {"block_out_channels": 5}}', "block_out_channels is 5: give several, each a whole number"),
        ('{"vae": {"scaling_factor": "1"}}', "scaling_factor is '1': give a number above 0"),
        ('{"text_encoder": {"num_hidden_layers": 1000000000}}', "too few for the 1000000000 layers"),
        ('{"world": {"a": 1}}', "expected the name of a world"),
    ],
)
def test_what_a_single_file_says_of_itself_is_checked(said, message, oracle, words, tmp_path):
    save_file(original_weights(oracle), tmp_path / "x.safetensors", {"gobelin": said})
    with pytest.raises(ModelError, match=message):
        Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", tokenizer=words)


def test_a_single_file_of_a_later_gobelin_opens(oracle, words, tmp_path):
    save_file(original_weights(oracle), tmp_path / "x.safetensors", {"gobelin": '{"unet": {"later": 1}}'})
    assert_same(Pipeline.from_pretrained(tmp_path / "x.safetensors", "cpu", tokenizer=words), oracle)


def test_an_inpainting_model_is_saved_as_one(make_oracle, words, tmp_path):
    make_oracle(9).save_pretrained(tmp_path / "x")
    Pipeline.from_pretrained(tmp_path / "x", "cpu").save_pretrained(tmp_path / "y")
    index = json.loads((tmp_path / "y" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
