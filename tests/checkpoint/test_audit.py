"""An audit counts and hashes tensors and sees what does not come back; a comparison finds the block that differs."""

import dataclasses
from collections.abc import Iterator
from hashlib import sha256
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gobelin.checkpoint import Model, audit, open_model
from gobelin.clip import TextEncoder

CPU = torch.device("cpu")
ROUNDING = 1e-4  # equal weights at other places in memory may be added up in another order


@pytest.fixture(scope="module")
def model(oracle_folder) -> Model:
    return open_model(oracle_folder, CPU, torch.float32)


@pytest.fixture(scope="module")
def half(oracle_folder) -> Model:
    return open_model(oracle_folder, CPU, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def small_latents() -> Iterator[None]:
    """Compare on latents of 16 x 16: attention's cost goes with the fourth power of a side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "_COARSEST_SIDE", 2)
        yield


@pytest.fixture(scope="module")
def same(small_latents, model) -> audit.ModelComparison:
    return audit.compare_models(model, model)


def edited(model: Model, network: str, key: str) -> Model:
    """The model with one tensor of a copied network changed in one place."""
    original = getattr(model, network)
    copy = type(original)(original.config).to(original.dtype).eval()
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    state[key].view(-1)[0] += 0.5
    copy.load_state_dict(state)
    return dataclasses.replace(model, **{network: copy})


def test_the_numbers_are_those_of_the_file(oracle_folder):
    model = open_model(oracle_folder, CPU, None)
    found = audit.audit_model(model, round_trips=False)
    tensors = load_file(oracle_folder / "unet" / "diffusion_pytorch_model.safetensors")
    unet = found.networks["unet"]
    assert found.networks.keys() == {"unet", "vae", "text_encoder"}
    assert (unet.tensors, unet.parameters) == (len(tensors), sum(tensor.numel() for tensor in tensors.values()))
    assert unet.largest == max(tensor.abs().max().item() for tensor in tensors.values())
    assert unet.dtypes == {"float32": len(tensors)}
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tuple(tensor.shape))).encode() + tensor.numpy().tobytes())
    assert unet.sha256 == digest.hexdigest()
    assert found.tokens == len(model.tokenizer.vocab)
    assert found.schedule["falls"]
    assert found.schedule["first_alpha_cumprod"] == pytest.approx(1 - 0.00085)
    assert (found.round_trips, found.sound) == ({}, True)


def test_a_hash_sees_one_changed_number_and_not_the_precision_that_holds_it(half):
    def hashes(one: Model) -> dict[str, str]:
        return {name: part.sha256 for name, part in audit.audit_model(one, round_trips=False).networks.items()}

    changed = hashes(edited(half, "vae", "quant_conv.bias"))
    assert changed["vae"] != hashes(half)["vae"]
    assert changed["unet"] == hashes(half)["unet"]
    wide = TextEncoder(half.text_encoder.config).eval()
    wide.load_state_dict(half.text_encoder.state_dict())
    assert wide.dtype == torch.float32
    assert hashes(dataclasses.replace(half, text_encoder=wide)) == hashes(half)


def test_a_model_comes_back_from_a_folder_and_from_a_single_file(half):
    found = audit.audit_model(half)
    assert found.round_trips == {"folder": True, "single file": True}
    assert found.sound
    assert found.json() == {**dataclasses.asdict(found), "sound": True}


def test_what_does_not_come_back_is_not_sound(model, monkeypatch):
    other = edited(model, "text_encoder", "text_model.final_layer_norm.bias")
    save = audit.save_single_file
    monkeypatch.setattr(audit, "save_single_file", lambda _, path: save(other, path))
    found = audit.audit_model(model)
    assert found.round_trips == {"folder": True, "single file": False}
    assert not found.sound
    assert "written as a single file and read again: NOT identical" in found.summary()
    assert found.summary()[-1] == "NOT sound"


def test_a_warning_is_not_sound(model):
    found = audit.audit_model(model, ["[red] holds 'x'"], round_trips=False)
    assert not found.sound
    assert found.summary()[-2:] == ["warning: [red] holds 'x'", "NOT sound"]


def test_a_model_differs_from_itself_in_no_block(same):
    found = same.differences
    assert found.keys() == {"unet", "vae", "text_encoder"}
    assert all(max(blocks.values()) <= ROUNDING for blocks in found.values())


@pytest.mark.parametrize(
    "changes",
    [
        {
            "unet": ("mid_block.resnets.1.conv2.weight", "mid_block.resnets.1"),
            "vae": ("decoder.up_blocks.1.resnets.0.conv1.weight", "decoder.up_blocks.1"),
        },
        {
            "unet": ("down_blocks.0.attentions.0.proj_in.weight", "down_blocks.0.attentions.0"),
            "text_encoder": ("text_model.encoder.layers.1.mlp.fc1.weight", "text_model.encoder"),
        },
    ],
)
def test_the_first_block_that_differs_is_the_one_that_was_changed(model, changes):
    other = model
    for network, (key, _) in changes.items():
        other = edited(other, network, key)
    found = audit.compare_models(other, model).differences
    for network, (_, block) in changes.items():
        first = next(name for name, difference in found[network].items() if difference > ROUNDING)
        assert first.startswith(block)
        assert found[network]["output"] > ROUNDING
    assert all(max(blocks.values()) <= ROUNDING for name, blocks in found.items() if name not in changes)


def test_networks_of_other_shapes_are_infinitely_far(model):
    config = dataclasses.replace(model.text_encoder.config, num_hidden_layers=2)
    other = dataclasses.replace(model, text_encoder=TextEncoder(config).eval())
    found = audit.compare_models(model, other).differences
    assert found["text_encoder"] == {"output": float("inf")}
    assert max(found["unet"].values()) <= ROUNDING


def test_tables_have_a_row_for_each_network_and_for_each_block(model, same):
    console = Console(width=200, record=True, file=StringIO())
    found = audit.audit_model(dataclasses.replace(model, name="[bold]x"), round_trips=False)
    console.print(found.table())
    console.print(same.table())
    text = console.export_text()
    assert "[bold]x" in text
    assert found.networks["vae"].sha256[:16] in text
    assert found.table().row_count == 3
    assert same.table().row_count == sum(len(blocks) for blocks in same.differences.values())
