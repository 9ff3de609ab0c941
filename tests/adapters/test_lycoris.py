"""LoHa and LoKr files of LyCORIS: the layers of its own modules, and files that do not fit refused in one sentence."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from tests.conftest import relative_error, sentence_of
from torch import Tensor, nn

from gobelin.errors import ModelError
from gobelin.pipeline import Pipeline

LAYERS = {
    "unet": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "time_embedding.linear_1",
    ),
    "text_encoder": ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.self_attn.q_proj"),
}
MODULES: dict[str, tuple[type, dict[str, Any], set[str]]] = {
    "LoHa": (LohaModule, {"lora_dim": 3, "alpha": 2.0}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "LoHa, Tucker": (LohaModule, {"lora_dim": 3, "alpha": 2.0, "use_tucker": True}, {"hada_t1", "hada_t2"}),
    "LoKr": (LokrModule, {"lora_dim": 2, "alpha": 1.0}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "LoKr, Tucker": (LokrModule, {"lora_dim": 2, "alpha": 1.0, "use_tucker": True}, {"lokr_t2"}),
    "LoKr, both factored": (
        LokrModule,
        {"lora_dim": 2, "alpha": 1.0, "decompose_both": True},
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ),
    "LoKr, both whole": (LokrModule, {"lora_dim": 2, "alpha": 1.0, "full_matrix": True}, {"lokr_w1", "lokr_w2"}),
    "LoKr, factor 4": (LokrModule, {"lora_dim": 2, "alpha": 1.0, "factor": 4}, {"lokr_w1"}),
}
PREFIXES = {
    "kohya": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "LyCORIS": {"unet": "lycoris_", "text_encoder": "lycoris_"},
}


def lycoris(pipe: Pipeline, kind: str) -> dict[tuple[str, str], Any]:
    """LyCORIS' modules of random numbers, one over a copy of each layer, by network and layer."""
    module, options, _ = MODULES[kind]
    generator = torch.Generator().manual_seed(1)
    made = {}
    for network, names in LAYERS.items():
        for name in names:
            layer = copy.deepcopy(getattr(pipe, network).get_submodule(name))
            made[network, name] = module("x", layer, **options)
            for parameter in made[network, name].parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return made


def tensors_of(modules: dict[tuple[str, str], Any], layout: str) -> dict[str, Tensor]:
    """Their tensors, as LyCORIS saves them."""
    return {
        f"{PREFIXES[layout][network]}{name.replace('.', '_')}.{role}": tensor.detach().clone()
        for (network, name), module in modules.items()
        for role, tensor in module.custom_state_dict().items()
    }


@pytest.mark.parametrize("layout", PREFIXES)
@pytest.mark.parametrize("kind", MODULES)
def test_layers_are_those_of_lycoris_and_come_back_bit_for_bit(kind, layout, oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    modules = lycoris(pipe, kind)
    tensors = tensors_of(modules, layout)
    assert MODULES[kind][2] <= {name.rsplit(".", 1)[1] for name in tensors}
    save_file(tensors, tmp_path / "x.safetensors")
    before = copy.deepcopy(pipe.unet.state_dict()), copy.deepcopy(pipe.text_encoder.state_dict())
    pipe.load_lora(tmp_path / "x.safetensors")
    for (network, name), module in modules.items():
        layer, theirs = getattr(pipe, network).get_submodule(name), module.org_module[0]
        linear = isinstance(layer, nn.Linear)
        hidden = torch.randn(2, 7, layer.in_features) if linear else torch.randn(2, layer.in_channels, 7, 6)
        plain = theirs(hidden)
        module.apply_to()
        assert relative_error(layer(hidden), theirs(hidden)) < 3e-6, name
        assert relative_error(layer(hidden), plain) > 0.05, name
        module.restore()
        pipe.loras.set_weight("x", -0.5)
        assert relative_error(layer(hidden), plain - 0.5 * (module(hidden) - plain)) < 3e-6
        pipe.loras.set_weight("x", 1.0)
    pipe.loras.remove("x")
    assert all(torch.equal(one, before[0][name]) for name, one in pipe.unet.state_dict().items())
    assert all(torch.equal(one, before[1][name]) for name, one in pipe.text_encoder.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "alpha", "scale"),
    [
        ("LoHa", None, 1.0),
        ("LoHa", 0.0, 0.0),
        ("LoHa", 6.0, 2.0),
        ("LoKr", None, 1.0),
        ("LoKr", 4.0, 2.0),
        ("LoKr, both factored", 4.0, 2.0),
        ("LoKr, both whole", 4.0, 1.0),
        ("LoKr, both whole", None, 1.0),
    ],
)
def test_alpha_over_the_rank_is_the_strength_where_there_is_a_rank(kind, alpha, scale, oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    modules = lycoris(pipe, kind)
    tensors = {name: one for name, one in tensors_of(modules, "kohya").items() if not name.endswith(".alpha")}
    if alpha is not None:
        tensors |= {f"{name.split('.')[0]}.alpha": torch.tensor(alpha) for name in tensors}
    save_file(tensors, tmp_path / "x.safetensors")
    before = {key: getattr(pipe, key[0]).get_submodule(key[1]).weight.clone() for key in modules}
    pipe.load_lora(tmp_path / "x.safetensors")
    for key, module in modules.items():
        change = getattr(pipe, key[0]).get_submodule(key[1]).weight - before[key]
        expected = module.get_weight(module.shape) / module.scale * scale
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


WHERE = "lora_unet_mid_block_attentions_0_proj_in"  # [64, 64, 1, 1]
CONV = "lora_unet_mid_block_resnets_0_conv1"  # [64, 64, 3, 3]
LOHA = {f"hada_w{side}_{one}": torch.ones(shape) for side in (1, 2) for one, shape in (("a", (64, 2)), ("b", (2, 64)))}
CORES = {"hada_t1": torch.ones(2, 2, 3, 3), "hada_t2": torch.ones(2, 2, 3, 3)}
TUCKER = {name: torch.ones(2, 64) for name in LOHA} | CORES
LOKR = {"lokr_w1": torch.ones(8, 8), "lokr_w2_a": torch.ones(8, 2), "lokr_w2_b": torch.ones(2, 8)}


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: one for key, one in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("layer", "tensors", "message"),
    [
        (WHERE, without(LOHA, "hada_w2_b"), f"lacks the hada_w2_b that goes with '{WHERE}.hada_w1_a'"),
        (WHERE, without(LOKR, "lokr_w1"), f"lacks the lokr_w1 that goes with '{WHERE}.lokr_w2_a'"),
        (WHERE, without(LOKR, "lokr_w2_b"), "lacks the lokr_w2_b that goes with"),
        (CONV, without(TUCKER, "hada_t2"), "lacks the hada_t2 that goes with"),
        (WHERE, LOKR | {"lokr_w1_a": torch.ones(8, 2)}, "lokr_w1_a' beside"),
        (WHERE, LOKR | {"lokr_t1": torch.ones(2, 2, 1, 1)}, "lokr_t1', which belongs to no layer"),
        (WHERE, LOKR | LOHA, "which one layer cannot both have"),
        (WHERE, {"alpha": torch.tensor(1.0)}, "lacks the "),
        (WHERE, LOHA | {"hada_w1_a": torch.ones(64, 3)}, "no common rank"),
        (WHERE, LOHA | {"hada_w1_a": torch.ones(64, 3), "hada_w1_b": torch.ones(3, 64)}, "no common rank"),
        (WHERE, LOHA | {"hada_w1_a": torch.ones(32, 2)}, "no common rank"),
        (WHERE, LOHA | {"hada_w1_a": torch.ones(64)}, "no common rank"),
        (WHERE, LOHA | {"hada_w1_a": torch.ones(64, 0), "hada_w1_b": torch.ones(0, 64)}, "no common rank"),
        (CONV, TUCKER | {"hada_t1": torch.ones(2, 3, 3, 3)}, "no common rank"),
        (CONV, TUCKER | {"hada_t1": torch.ones(2, 2, 3)}, "no common rank"),
        (CONV, TUCKER | {"hada_t1": torch.ones(2, 2, 1, 1)}, "no common rank"),
        (WHERE, LOKR | {"lokr_w1": torch.ones(8)}, "no common rank"),
        (WHERE, LOKR | {"lokr_w1": torch.ones(8, 8, 1, 1)}, "no common rank"),
        (WHERE, LOKR | {"lokr_w2_b": torch.ones(3, 8)}, "no common rank"),
        (
            WHERE,
            without(LOKR, "lokr_w1") | {"lokr_w1_a": torch.ones(8, 3), "lokr_w1_b": torch.ones(3, 8)},
            "no common rank",
        ),
        (WHERE, LOHA | {"hada_w2_b": torch.full((2, 64), torch.nan)}, "holds NaN or infinity"),
        (WHERE, LOKR | {"lokr_w1": torch.ones(8, 8, dtype=torch.int8)}, "is of whole numbers"),
        (WHERE, LOHA | {"alpha": torch.tensor(torch.inf)}, "alpha' is inf, expected a number"),
        (
            WHERE,
            LOKR | {"lokr_w1": torch.ones(10**5, 8)},
            "is for another model: mid_block.attentions.0.proj_in is [64, 64, 1, 1] here, and the LoKr changes one of "
            "[800000, 64]",
        ),
        (CONV, LOHA, "and the LoHa changes one of [64, 64]"),
        (WHERE, TUCKER, "and the LoHa changes one of [64, 64, 3, 3]"),
        (WHERE, LOHA | {"dora_scale": torch.ones(64, 1)}, "is a DoRA"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(layer, tensors, message, oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    before = copy.deepcopy(pipe.unet.state_dict())
    save_file({f"{layer}.{name}": one.clone() for name, one in tensors.items()}, tmp_path / "x.safetensors")
    said = sentence_of(lambda: pipe.load_lora(tmp_path / "x.safetensors"))
    assert said is not None
    assert message in said
    assert all(torch.equal(one, before[name]) for name, one in pipe.unet.state_dict().items())
    assert pipe.loras.weights == {}


def test_the_tensors_that_are_refused_when_changed_are_added_as_they_are(oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    whole = without(without(LOKR, "lokr_w2_a"), "lokr_w2_b") | {"lokr_w2": torch.ones(8, 8, 1, 1)}
    flat = LOHA | {"hada_w1_b": torch.ones(2, 64 * 9), "hada_w2_b": torch.ones(2, 64 * 9)}
    for layer, tensors in ((WHERE, LOHA), (WHERE, LOKR), (CONV, TUCKER), (WHERE, whole), (CONV, flat)):
        save_file({f"{layer}.{name}": one.clone() for name, one in tensors.items()}, tmp_path / "x.safetensors")
        pipe.loras.remove(pipe.load_lora(tmp_path / "x.safetensors"))


def test_widths_of_text_embeddings_name_the_family(oracle_folder: Path, tmp_path: Path) -> None:
    base = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {name: torch.ones(64, 2) if name.endswith("a") else torch.ones(2, 1024) for name in LOHA}
    save_file({f"{base}.{name}": one for name, one in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"is a LoRA of Stable Diffusion 2\.x"):
        Pipeline.from_pretrained(oracle_folder, "cpu").load_lora(tmp_path / "x.safetensors")
