"""LoRAs in every layout: the same numbers as diffusers, and none of the file left over."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tests.conftest import sentence_of
from tests.oracles import differences
from torch import Tensor

from gobelin.checkpoint.diffusers_folder import save_folder
from gobelin.errors import ModelError, UsageError
from gobelin.formats import ldm
from gobelin.formats.lora_layouts import layer_names
from gobelin.pipeline import Pipeline

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def with_adapter(make: Any, targets: list[str], seed: int, alpha: int = 8) -> StableDiffusionPipeline:
    """The oracle with a LoRA of random numbers in U-Net and text encoder, as PEFT makes one."""
    pipe = make()
    for network, layers in ((pipe.unet, targets), (pipe.text_encoder, TEXT)):
        network.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=layers, init_lora_weights=False))
    generator = torch.Generator().manual_seed(seed)
    for network in (pipe.unet, pipe.text_encoder):
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                # At 0.2 the changed U-Net multiplies rounding errors: PEFT's float32 strays 4e-5 from its own float64.
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return pipe


def saved(pipe: StableDiffusionPipeline, where: Path) -> dict[str, Tensor]:
    """The adapter as diffusers saves it, in ``where``; returns its tensors."""
    StableDiffusionPipeline.save_lora_weights(
        where,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata={"lora_alpha": 8, "r": 4},
        text_encoder_lora_adapter_metadata={"lora_alpha": 8, "r": 4},
    )
    return load_file(where / "pytorch_lora_weights.safetensors")


def kohya(tensors: dict[str, Tensor], alpha: float | None = 8.0) -> dict[str, Tensor]:
    """The same in kohya's names."""
    renamed = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        module, role = rest.rsplit(".lora_", 1)
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
        if part == "text_encoder" and not module.startswith("text_model."):
            module = f"text_model.{module}"
        base = prefix + module.replace(".", "_")
        renamed[f"{base}.lora_{'down' if role.startswith('A') else 'up'}.weight"] = tensor
        if alpha is not None:
            renamed[f"{base}.alpha"] = torch.tensor(alpha)
    return renamed


def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention's part in the names of diffusers before PEFT."""
    renamed = {}
    for name, tensor in tensors.items():
        module, role = name.rsplit(".lora_", 1)
        way = "down" if role.startswith("A") else "up"
        if name.startswith("unet."):
            block, layer = module.replace("to_out.0", "to_out").rsplit(".", 1)
            renamed[f"{block}.processor.{layer}_lora.{way}.weight"] = tensor
        else:
            renamed[f"{module}.lora_linear_layer.{way}.weight"] = tensor
    return renamed


@pytest.fixture(scope="module")
def full(make_oracle, tmp_path_factory):
    pipe = with_adapter(make_oracle, EVERYTHING, seed=1)
    return pipe, saved(pipe, tmp_path_factory.mktemp("lora"))


def assert_same(pipe: Pipeline, oracle: StableDiffusionPipeline) -> None:
    found = differences(
        pipe, oracle, torch.float64
    )  # theirs adds where ours merges: in float32 6e-5 apart on some CPUs
    assert max(found.values()) <= 2e-5, found


def test_as_diffusers_saves_it_with_pefts_alpha_in_the_header(full, oracle_folder, tmp_path):
    theirs, _ = full
    saved(theirs, tmp_path)
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    before = differences(pipe, theirs)
    assert before["unet"] > 0.1
    assert before["text_encoder"] > 0.1
    assert pipe.load_lora(tmp_path / "pytorch_lora_weights.safetensors") == "pytorch_lora_weights"
    assert_same(pipe, theirs)


def test_in_kohyas_layout(full, oracle_folder, tmp_path):
    theirs, tensors = full
    save_file(kohya(tensors), tmp_path / "kohya.safetensors")
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    pipe.load_lora(tmp_path / "kohya.safetensors")
    assert_same(pipe, theirs)


def test_in_the_layout_of_diffusers_before_peft(make_oracle, oracle_folder, tmp_path):
    theirs = with_adapter(make_oracle, ATTENTION, seed=2, alpha=4)
    tensors = saved(theirs, tmp_path)
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    save_file(older(tensors), tmp_path / "old.safetensors")
    pipe.load_lora(tmp_path / "old.safetensors")
    assert_same(pipe, theirs)
    bare = {name.removeprefix("unet."): one for name, one in older(tensors).items() if name.startswith("unet.")}
    torch.save(bare, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ModelError, match="is a pickle"):
        pipe.load_lora(tmp_path / "pytorch_lora_weights.bin")
    other = Pipeline.from_pretrained(oracle_folder, "cpu")
    other.load_lora(tmp_path / "pytorch_lora_weights.bin", allow_pickle=True)
    assert differences(other, theirs)["unet"] <= 2e-5


def test_several_with_weights_and_out_again_without_a_trace(full, make_oracle, oracle_folder, tmp_path):
    _, first = full
    second = saved(with_adapter(make_oracle, ATTENTION, seed=3), tmp_path)
    save_file(kohya(first), tmp_path / "one.safetensors")
    save_file(kohya(second), tmp_path / "two.safetensors")
    theirs = make_oracle()
    theirs.load_lora_weights(tmp_path / "one.safetensors", adapter_name="one")
    theirs.load_lora_weights(tmp_path / "two.safetensors", adapter_name="two")
    theirs.set_adapters(["one", "two"], [0.7, -0.4])
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora(tmp_path / "one.safetensors", weight=0.7)
    pipe.load_lora(tmp_path / "two.safetensors", weight=3.0)
    pipe.loras.set_weight("two", -0.4)
    assert_same(pipe, theirs)
    assert pipe("a red circle", steps=1).settings[0]["loras"] == {"one": 0.7, "two": -0.4}
    pipe.loras.remove("one")
    theirs.set_adapters(["two"], [-0.4])
    assert_same(pipe, theirs)
    pipe.loras.remove("two")
    assert pipe.loras.weights == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())


def test_the_rank_is_the_scale_without_an_alpha_and_zero_is_none(full, oracle_folder, tmp_path):
    _, tensors = full
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    before = pipe.unet.mid_block.resnets[0].conv1.weight.clone()
    changes = []
    for alpha in (None, 0.0, 4.0, 2.0):
        save_file(kohya(tensors, alpha), tmp_path / "x.safetensors")
        name = pipe.load_lora(tmp_path / "x.safetensors")
        changes.append(pipe.unet.mid_block.resnets[0].conv1.weight - before)
        pipe.loras.remove(name)
    assert not changes[1].any()
    assert torch.equal(changes[0], changes[2])
    torch.testing.assert_close(changes[3], changes[0] / 2)


def test_convolutions_with_a_middle(oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    layer = pipe.unet.mid_block.resnets[0].conv1
    before, base = layer.weight.clone(), "lora_unet_mid_block_resnets_0_conv1"
    out, into = layer.weight.shape[:2]
    down, middle, up = torch.randn(4, into, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(out, 4, 1, 1)
    file = tmp_path / "locon.safetensors"
    save_file({f"{base}.lora_down.weight": down, f"{base}.lora_mid.weight": middle, f"{base}.lora_up.weight": up}, file)
    pipe.load_lora(file)
    images = torch.randn(1, into, 5, 6)
    conv = torch.nn.functional.conv2d
    expected = conv(images, before, layer.bias, padding=1) + conv(conv(conv(images, down), middle, padding=1), up)
    torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-4)


def test_maps_and_edits_go_on_working(full, oracle_folder, tmp_path):
    _, tensors = full
    save_file(kohya(tensors), tmp_path / "x.safetensors")
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    plain = pipe("a red circle", seed=0, steps=2, trace=True)
    pipe.load_lora(tmp_path / "x.safetensors")
    traced, silent = (pipe("a red circle", seed=0, steps=2, trace=trace) for trace in (True, False))
    assert torch.equal(traced.latents, silent.latents)
    assert not torch.equal(traced.latents, plain.latents)
    assert not torch.equal(traced.heatmaps[0]["red"].raw, plain.heatmaps[0]["red"].raw)
    assert pipe.edit("a red circle", "a blue circle", steps=2).images[1].size == (64, 64)


def test_a_model_that_is_saved_holds_its_loras_and_saving_it_has_to_be_meant(full, oracle_folder, tmp_path):
    theirs, tensors = full
    save_file(kohya(tensors), tmp_path / "x.safetensors")
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    pipe.loras.require_fuse(False)
    pipe.load_lora(tmp_path / "x.safetensors", weight=1.0)
    with pytest.raises(UsageError, match=r"has LoRAs loaded \('x' at 1\): save with fuse_loras=True"):
        pipe.loras.require_fuse(False)
    pipe.loras.require_fuse(True)
    save_folder(pipe.model, tmp_path / "fused")
    fused = Pipeline.from_pretrained(tmp_path / "fused", "cpu")
    assert fused.loras.weights == {}
    assert_same(fused, theirs)
    assert pipe.loras.weights == {"x": 1.0}
    pipe.loras.remove("x")
    pipe.loras.require_fuse(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {}, "it holds no tensors"),
        (
            lambda t: {"a.lora_down.weight": torch.ones(1)},
            r"holds 'a\.lora_down\.weight', which belongs to no layer of this",
        ),
        (
            lambda t: t | {"lora_unet_x.alpha": torch.ones(1)},
            r"holds 'lora_unet_x\.alpha', which belongs to no layer of this",
        ),
        (lambda t: t | {"lora_unet_y.ia3_l": torch.ones(1)}, "is an IA3"),
        (lambda t: t | {"lora_unet_y.dora_scale": torch.ones(1)}, "is a DoRA"),
        (lambda t: dict(list(t.items())[1:]), r"lacks the lora_(down|up)\.weight that goes with"),
        (lambda t: {k: one[:, :-1] if k.endswith("down.weight") else one for k, one in t.items()}, "for another model"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_leaves_the_model_alone(
    change,
    message,
    full,
    oracle_folder,
    tmp_path,
):
    _, tensors = full
    named = {name: one for name, one in kohya(tensors, None).items() if "mid_block" in name}
    save_file({name: one.contiguous() for name, one in change(named).items()}, tmp_path / "x.safetensors")
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        pipe.load_lora(tmp_path / "x.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    assert pipe.loras.weights == {}


def test_names_that_are_taken_or_not_there_are_said(full, oracle_folder, tmp_path):
    _, tensors = full
    save_file(kohya(tensors), tmp_path / "x.safetensors")
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    pipe.load_lora(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="a LoRA 'x' is loaded already"):
        pipe.load_lora(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="no LoRA 'y' is loaded: the loaded ones are x"):
        pipe.loras.remove("y")


def test_no_two_layers_share_a_name():
    from gobelin.unet import UNet
    from gobelin.unet_config import UNetConfig

    with torch.device("meta"):
        unet = UNet(UNetConfig.sd15())
    modules = [name for name, module in unet.named_modules() if hasattr(module, "weight")]
    names = [name for found in layer_names("unet", modules).values() for name in found]
    assert len(set(names)) == len(names)


WHERE = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_down.weight": torch.ones(())}, "no common rank"),
        ({"lora_up.weight": torch.ones(64)}, "no common rank"),
        ({"lora_up.weight": torch.ones(64, 3)}, "no common rank"),
        ({"lora_down.weight": torch.ones(0, 64), "lora_up.weight": torch.ones(64, 0)}, "no common rank"),
        ({"alpha": torch.ones(2)}, r"alpha\' is of the shape \[2\], expected a number"),
        ({"alpha": torch.tensor(torch.nan)}, "alpha' is nan, expected a number"),
        ({"lora_down.weight": torch.full((2, 64), torch.inf)}, "holds NaN or infinity"),
        ({"lora_up.weight": torch.ones(10**5, 2), "lora_down.weight": torch.ones(2, 10**5)}, "is for another model"),
    ],
)
def test_odd_tensors_are_refused(change: dict, message: str, oracle_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    whole = {"lora_down.weight": torch.ones(2, 64), "lora_up.weight": torch.ones(64, 2), "alpha": torch.tensor(1.0)}
    before = {name: one.clone() for name, one in pipe.unet.state_dict().items()}
    tensors = {f"{WHERE}.{name}": one for name, one in (whole | change).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        pipe.load_lora(tmp_path / "x.safetensors")
    assert all(torch.equal(one, before[name]) for name, one in pipe.unet.state_dict().items())
    assert pipe.loras.weights == {}


@pytest.mark.parametrize(
    "said",
    ["{", "[" * 100_000, "[1]", '{"unet.lora_alpha": "abc"}', '{"unet.lora_alpha": [1]}', '{"unet.lora_alpha": 1e999}'],
)
def test_odd_settings_of_pefts_are_refused(said: str, oracle_folder: Path, tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(ModelError, match=r"x\.safetensors"):
        Pipeline.from_pretrained(oracle_folder, "cpu").load_lora(tmp_path / "x.safetensors")


def test_a_weight_that_is_no_number_is_refused(oracle_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    with pytest.raises(UsageError, match="the weight of a LoRA is nan: give a number"):
        pipe.load_lora(tmp_path / "x.safetensors", float("nan"))
    for odd in (10**400, True):
        with pytest.raises(UsageError, match=r"the weight of a LoRA is .*: give a number"):
            pipe.load_lora(tmp_path / "x.safetensors", odd)


def renamed(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The adapter as diffusers saves it, under the names of another program."""
    unet_names = original_names(tensors)
    found = {}
    for name, tensor in tensors.items():
        network, _, rest = name.partition(".")
        module, role = rest.rsplit(".lora_", 1)
        way = "lora_down" if role.startswith("A") else "lora_up"
        text = module if module.startswith("text_model.") else f"text_model.{module}"
        flat, flat_text, original = module.replace(".", "_"), text.replace(".", "_"), unet_names.get(module, "")
        base = {
            "onetrainer": {"unet": f"lora_unet_{flat}", "text_encoder": f"lora_te1_{flat_text}"},
            "original": {"unet": f"lora_unet_{original.replace('.', '_')}", "text_encoder": f"lora_te_{flat_text}"},
            "comfyui": {"unet": f"diffusion_model.{original}", "text_encoder": f"lora_te_{flat_text}"},
            "lycoris": {"unet": f"lycoris_{flat}", "text_encoder": f"lora_te_{flat_text}"},
            "dots": {"unet": f"lora_unet.{module}", "text_encoder": f"lora_te.{text}"},
            "peft": {
                "unet": f"unet.base_model.model.{module}",
                "text_encoder": f"text_encoder.base_model.model.{text}",
            },
        }[layout][network]
        found[f"{base}.lora_{role}" if layout == "peft" else f"{base}.{way}.weight"] = tensor
        if layout != "peft":
            found[f"{base}.alpha"] = torch.tensor(8.0)
    return found


@pytest.fixture(scope="module")
def whole_pipe(oracle_folder: Path) -> Pipeline:
    """One for tests that leave it as it was."""
    return Pipeline.from_pretrained(oracle_folder, "cpu")


def original_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The names of CompVis' code, which diffusers' own converter takes apart (the oracle of a model's tests)."""
    modules = {name.removeprefix("unet.").rsplit(".lora_", 1)[0] for name in tensors if name.startswith("unet.")}
    mapped = ldm.map_unet_keys([f"{module}.weight" for module in modules], layers=2)
    return {
        key.removesuffix(".weight"): name.removeprefix(ldm.UNET_PREFIX).removesuffix(".weight")
        for key, name in mapped.items()
    }


@pytest.mark.parametrize("layout", ["onetrainer", "original", "comfyui", "lycoris", "dots"])
def test_names_of_other_programs_are_the_same_layers(layout, full, whole_pipe, tmp_path):
    _, tensors = full
    save_file(kohya(tensors), tmp_path / "plain.safetensors")
    save_file(renamed(tensors, layout), tmp_path / "other.safetensors")
    changed = []
    for name in ("plain", "other"):
        whole_pipe.load_lora(tmp_path / f"{name}.safetensors")
        changed.append({**whole_pipe.unet.state_dict(), **whole_pipe.text_encoder.state_dict()})
        whole_pipe.loras.remove(name)
    assert all(torch.equal(one, changed[0][name]) for name, one in changed[1].items())
    assert any(not torch.equal(one, changed[0][name]) for name, one in whole_pipe.unet.state_dict().items())


def test_peft_with_the_networks_name_before_it(full, oracle_folder, tmp_path):
    _, tensors = full
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(renamed(tensors, "peft"), tmp_path / "other.safetensors")
    plain, other = (Pipeline.from_pretrained(oracle_folder, "cpu") for _ in range(2))
    plain.load_lora(tmp_path / "plain.safetensors")
    other.load_lora(tmp_path / "other.safetensors")
    theirs = plain.unet.state_dict()
    assert all(torch.equal(one, theirs[name]) for name, one in other.unet.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 16},
        {"lora_alpha": 16, "use_rslora": True},
        {"lora_alpha": 2, "alpha_pattern": {"proj": 8}},
        {"lora_alpha": 2, "alpha_pattern": {"mid_block.*proj_in": 8, "emb_proj": 4}},
        {"lora_alpha": 0},
    ],
)
def test_pefts_own_folder_has_pefts_strength(options, make_oracle, oracle_folder, tmp_path):
    theirs = make_oracle().unet
    before = theirs.mid_block.attentions[0].proj_in.weight.clone(), theirs.time_embedding.linear_1.weight.clone()
    targets = ["proj_in", "time_emb_proj", "to_q"]
    model = get_peft_model(theirs, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    assert pipe.load_lora(tmp_path) == tmp_path.name
    assert torch.equal(merged.time_embedding.linear_1.weight, before[1])
    expected = merged.state_dict()
    for name, one in pipe.unet.state_dict().items():
        torch.testing.assert_close(one, expected[name], rtol=1e-5, atol=1e-6)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"no file at .*adapter_config\.json"):
        Pipeline.from_pretrained(oracle_folder, "cpu").load_lora(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("pattern", ["(a+)+$", "x" * 300, ".*.*.*x", "[", "a|b"])
def test_patterns_that_take_long_to_match_are_refused(pattern, oracle_folder, tmp_path):
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}
    said = json.dumps({"unet.alpha_pattern": {pattern: 1}})
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(ModelError, match="its alpha_pattern has "):
        Pipeline.from_pretrained(oracle_folder, "cpu").load_lora(tmp_path / "x.safetensors")


def test_a_tensor_with_a_name_of_any_length_is_refused(oracle_folder, tmp_path):
    save_file({"attn2.to_k.lora_A" * 10_000: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="a tensor whose name has 170,000 characters"):
        Pipeline.from_pretrained(oracle_folder, "cpu").load_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_a_lora_of_whole_numbers_is_refused(dtype, oracle_folder, tmp_path):
    save_file({name: one.to(dtype) for name, one in LAYER.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="is of whole numbers: quantized LoRAs are not read"):
        Pipeline.from_pretrained(oracle_folder, "cpu").load_lora(tmp_path / "x.safetensors")


def test_two_files_of_diffusers_one_name_are_called_by_their_folders(oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(LAYER, tmp_path / folder / "pytorch_lora_weights.safetensors")
        pipe.load_lora(tmp_path / folder / "pytorch_lora_weights.safetensors")
    assert list(pipe.loras.weights) == ["pytorch_lora_weights", "b"]


PAIR = {"lora_down.weight": torch.ones(2, 64), "lora_up.weight": torch.ones(64, 2)}
LAYER = {f"lora_unet_mid_block_attentions_0_proj_in.{role}": one for role, one in PAIR.items()}
TEXT_LAYER = "text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_conv_in.diff", "is a file of full differences of weights"),
        ("lora_unet_conv_in.diff_b", "is a file of full differences of weights"),
        ("lora_unet_mid_block_resnets_0_norm1.w_norm", "is a file of differences of norms"),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", "is an IA3"),
        ("base_model.model.mid_block.attentions.0.proj_in.ia3_l", "is an IA3"),
        ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "is a GLoRA"),
        ("base_model.model.mid_block.attentions.0.proj_in.glora_A", "is a GLoRA"),
        ("oft_unet_mid_block_attentions_0_proj_in.oft_blocks", "is an OFT"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_diag", "is an OFT"),
        ("base_model.model.mid_block.attentions.0.proj_in.boft_R", "is a BOFT"),
        ("base_model.model.mid_block.attentions.0.proj_in.vera_lambda_b", "is a VeRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.bias", "is a LoRA with biases"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.bias", "is a LoRA with biases"),
        ("text_encoder.text_model.embeddings.token_embedding.lora_embedding_A", "is a LoRA of the token embeddings"),
        ("unet:0:up", "is a LoRA whose layers have numbers and no names"),
        ("base_model.model.mid_block.attentions.0.proj_in.lokr_w1", "is a LoKr in PEFT's layout"),
        ("base_model.model.mid_block.attentions.0.proj_in.hada_w1_a", "is a LoHa in PEFT's layout"),
        (f"lora_te2_{TEXT_LAYER}.lora_up.weight", "is a LoRA of Stable Diffusion XL"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_9_attn2_to_k.alpha", "belongs to no layer of this model"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_up.weight", "is a LoRA of Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "is a LoRA of Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj.alpha", "is a LoRA of Stable Diffusion 3"),
        ("x" * 50_000, "has a tensor whose name has 50,000 characters"),
    ],
)
def test_other_kinds_and_families_are_refused_by_name(
    name: str, message: str, whole_pipe: Pipeline, tmp_path: Path
) -> None:
    pipe = whole_pipe
    save_file({**LAYER, name: torch.ones(1)}, tmp_path / "x.safetensors")
    said = sentence_of(lambda: pipe.load_lora(tmp_path / "x.safetensors"))
    assert said is not None
    assert message in said
    assert pipe.loras.weights == {}


@pytest.mark.parametrize(
    ("version", "family"),
    [
        ("sdxl_base_v1-0", "Stable Diffusion XL"),
        ("sd_v2_768_v", "Stable Diffusion 2.x"),
        ("flux1", "Flux"),
        ("sd3m", "Stable Diffusion 3"),
    ],
)
def test_metadata_names_the_family_of_what_does_not_fit(
    version: str, family: str, oracle_folder: Path, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    said = {"ss_base_model_version": version}
    save_file({**LAYER, "lora_unet_x.alpha": torch.ones(1)}, tmp_path / "x.safetensors", said)
    with pytest.raises(ModelError, match=f"is a LoRA of {family}"):
        pipe.load_lora(tmp_path / "x.safetensors")
    save_file({**LAYER, next(iter(LAYER)): torch.ones(2, 32)}, tmp_path / "x.safetensors", said)
    with pytest.raises(ModelError, match=f"is a LoRA of {family}"):
        pipe.load_lora(tmp_path / "x.safetensors")
    save_file(LAYER, tmp_path / "x.safetensors", said)  # though it would fit
    with pytest.raises(ModelError, match=f"is a LoRA of {family}"):
        pipe.load_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("width", "family"), [(1024, "Stable Diffusion 2.x"), (2048, "Stable Diffusion XL")])
def test_widths_of_text_embeddings_name_the_family(
    width: int, family: str, oracle_folder: Path, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    base = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{base}.lora_down.weight": torch.ones(2, width), f"{base}.lora_up.weight": torch.ones(64, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"is a LoRA of {family}"):
        pipe.load_lora(tmp_path / "x.safetensors")


def test_two_names_of_one_layer_are_refused(oracle_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    twice = {f"unet.mid_block.attentions.0.proj_in.{role}": one.clone() for role, one in PAIR.items()}
    save_file({**LAYER, **twice}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="which are for one layer"):
        pipe.load_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("key", ["string_to_param.*", "emb_params", "clip_l", "<cat-toy>"])
def test_embeddings_in_a_lora_are_words_as_long_as_it_is_loaded(key: str, oracle_folder: Path, tmp_path: Path) -> None:
    vectors = torch.randn(2, 64)
    pipe, other = (Pipeline.from_pretrained(oracle_folder, "cpu") for _ in range(2))
    save_file({**LAYER, f"bundle_emb.My-Cat.{key}": vectors}, tmp_path / "x.safetensors")
    save_file(LAYER, tmp_path / "alone.safetensors")
    save_file({"emb_params": vectors}, tmp_path / "my-cat.safetensors")
    before = {name: one.clone() for name, one in pipe.text_encoder.state_dict().items()}
    own = pipe.text_encoder.config
    pipe.load_lora(tmp_path / "x.safetensors", weight=0.5)
    other.load_lora(tmp_path / "alone.safetensors", weight=0.5)
    other.load_textual_inversion(tmp_path / "my-cat.safetensors")
    one, two = (model("a red my-cat", seed=0, steps=1, trace=True) for model in (pipe, other))
    assert torch.equal(one.latents, two.latents)
    assert one.heatmaps[0].words.tokens("my-cat") == (3, 4)
    assert one.settings[0]["loras"] == {"x": 0.5}
    assert "learned_words" not in one.settings[0]
    pipe.loras.set_weight("x", 0)
    assert pipe.words("my-cat").tokens("my-cat") == (1, 2)
    pipe.loras.remove("x")
    assert pipe.text_encoder.config == own
    assert all(torch.equal(one, before[name]) for name, one in pipe.text_encoder.state_dict().items())
    assert len(pipe.words("my-cat").tokens("my-cat")) > 2
    pipe.save_pretrained(tmp_path / "again")
    pipe.load_lora(tmp_path / "x.safetensors")
    pipe.load_lora(tmp_path / "alone.safetensors")


def test_words_that_came_later_keep_their_vectors_when_a_lora_goes(oracle_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    save_file({**LAYER, "bundle_emb.first.emb_params": torch.ones(2, 64)}, tmp_path / "x.safetensors")
    save_file({"emb_params": torch.full((1, 64), 0.5)}, tmp_path / "second.safetensors")
    pipe.load_lora(tmp_path / "x.safetensors", weight=0.0)
    pipe.load_textual_inversion(tmp_path / "second.safetensors")
    before = pipe.encode_text(["a second red"]).embeddings
    pipe.loras.remove("x")
    assert torch.equal(pipe.encode_text(["a second red"]).embeddings, before)
    assert pipe.learned_words == ["second"]


@pytest.mark.parametrize(
    ("bundled", "message"),
    [
        ({"new.string_to_param.*": torch.ones(1, 32)}, "the vectors are 32 wide"),
        (
            {"new.emb_params": torch.ones(1, 64), "NEW.emb_params": torch.ones(1, 64)},
            "' is a token already, or nothing",
        ),
        ({"red.string_to_param.*": torch.ones(1, 64)}, "'red' is a token already"),
        ({"x.clip_l": torch.ones(1, 64), "x.clip_g": torch.ones(1, 64)}, "is an embedding of Stable Diffusion XL"),
        ({"x.string_to_param.*": torch.full((1, 64), torch.inf)}, "holds NaN or infinity"),
        ({"x.a": torch.ones(1, 64), "x.b": torch.ones(1, 64)}, "it holds 2 tensors"),
        ({"": torch.ones(1, 64)}, "or nothing"),
        ({"x" * 5000 + ".a": torch.ones(1, 64)}, "a tensor whose name has 5,013 characters"),
    ],
)
def test_embeddings_in_a_lora_that_cannot_be_words_are_refused(
    bundled: dict[str, Tensor], message: str, oracle_folder: Path, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    save_file({**LAYER, **{f"bundle_emb.{key}": one for key, one in bundled.items()}}, tmp_path / "x.safetensors")
    before = pipe.unet.mid_block.attentions[0].proj_in.weight.clone()
    said = sentence_of(lambda: pipe.load_lora(tmp_path / "x.safetensors"))
    assert said is not None
    assert message in said
    assert "x.safetensors" in said
    assert torch.equal(pipe.unet.mid_block.attentions[0].proj_in.weight, before)
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer.vocab)
    assert pipe.loras.weights == {}
