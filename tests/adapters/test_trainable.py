"""Adapters that are trained: nothing at the start, the base left alone, and the arithmetic of LyCORIS' own modules."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lycoris.functional.general import factorization
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from tests.conftest import fill_, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.adapters.trainable import (
    adapter_config,
    adapter_deltas,
    adapter_parameters,
    add_adapters_,
    kronecker_sizes,
    remove_adapters_,
)
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import UsageError
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

KINDS = ("lora", "loha", "lokr")
TARGETS = ("attention", "transformer", "all")


def unet() -> UNet:
    """A U-Net with every kind of layer: transformers, strided and 1×1 convolutions."""
    config = UNetConfig.of(
        16, 32, attention=(True, False), layers_per_block=1, cross_attention_dim=24, attention_head_dim=2,
        norm_num_groups=8,
    )  # fmt: skip
    return fill_(UNet(config), 1)


def text_encoder() -> TextEncoder:
    return fill_(TextEncoder(TextEncoderConfig.of(24, layers=2, heads=2, vocab_size=40)), 2)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 6, generator=generator).to(dtype)
    return latents, torch.tensor([7.0, 801.0]), torch.randn(2, 5, 24, generator=generator).to(dtype)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def trained_(network: nn.Module, seed: int = 5, size: float = 0.05) -> nn.Module:
    """The network with adapters as if they had learned something."""
    generator = seeded(seed)
    for parameter in adapter_parameters(network):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return network


def loss_of(network: UNet, dtype: torch.dtype = torch.float32) -> Tensor:
    """Predict a fixed target."""
    latents, timesteps, text = inputs(dtype)
    return F.mse_loss(network(latents, timesteps, text).float(), latents.roll(1, 0).float())


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_same_at_the_start_and_after_removal_and_so_is_every_layer(kind, targets):
    ids = torch.tensor([[38, 1, 2, 39, 39]])
    for network, arguments in ((unet(), inputs()), (text_encoder(), (ids,))):
        before = network(*arguments)
        classes = {name: type(layer) for name, layer in network.named_modules()}
        parameters, content = dict(network.named_parameters()), copy.deepcopy(network.state_dict())
        add_adapters_(network, AdapterConfig(kind=kind, targets=targets, rank=3), seeded())
        assert torch.equal(network(*arguments), before)
        assert parameters.items() <= dict(network.named_parameters()).items()
        trained_(network)
        assert not torch.allclose(network(*arguments), before)
        remove_adapters_(network)
        assert {name: type(layer) for name, layer in network.named_modules()} == classes
        assert list(network.state_dict()) == list(content)
        assert all(one is parameters[name] for name, one in network.named_parameters())
        assert all(torch.equal(one, content[name]) for name, one in network.state_dict().items())
        assert torch.equal(network(*arguments), before)


def last_names(network: nn.Module) -> set[str]:
    """The ends of the adapted layers' names, without numbers of blocks."""
    return {".".join(name.split(".")[-2:]) for name in adapter_deltas(network)}


ATTENTION = {f"{attn}.to_{one}" for attn in ("attn1", "attn2") for one in "qkv"} | {"to_out.0"}
TRANSFORMER = ATTENTION | {"0.proj_in", "0.proj_out", "1.proj_in", "1.proj_out", "0.proj", "net.2"}
RESNETS = {f"{number}.{one}" for number in (0, 1) for one in ("conv1", "conv2", "time_emb_proj", "conv_shortcut")}
TEXT_ATTENTION = {f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")}


@pytest.mark.parametrize(
    ("targets", "of_unet", "of_text"),
    [
        ("attention", ATTENTION, TEXT_ATTENTION),
        ("transformer", TRANSFORMER, TEXT_ATTENTION | {"mlp.fc1", "mlp.fc2"}),
        ("all", TRANSFORMER | RESNETS | {"0.conv"}, TEXT_ATTENTION | {"mlp.fc1", "mlp.fc2"}),
    ],
)
def test_targets_are_the_layers_of_their_names(targets, of_unet, of_text):
    for network, expected in ((unet(), of_unet), (text_encoder(), of_text)):
        add_adapters_(network, AdapterConfig(targets=targets), seeded())
        assert last_names(network) == expected


def test_of_stable_diffusion_the_targets_are_kohyas():
    """sd-scripts prints "create LoRA for U-Net: 192 modules", and 72 for the text encoder; with a conv_dim 278."""
    with torch.device("meta"):
        networks = {"unet": UNet(UNetConfig.sd15()), "text_encoder": TextEncoder(TextEncoderConfig.sd15())}
    counts = {}
    for targets in TARGETS:
        for name, original in networks.items():
            network = copy.deepcopy(original)
            add_adapters_(network, AdapterConfig(targets=targets, rank=1), seeded())
            counts[targets, name] = len(adapter_deltas(network))
    assert counts == {
        ("attention", "unet"): 128,
        ("attention", "text_encoder"): 48,
        ("transformer", "unet"): 192,
        ("transformer", "text_encoder"): 72,
        ("all", "unet"): 278,
        ("all", "text_encoder"): 72,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_reduces_the_loss_and_leaves_the_base_as_it_was(kind, checkpointing):
    network = unet()
    network.gradient_checkpointing = checkpointing
    before = copy.deepcopy(network.state_dict())
    add_adapters_(network, AdapterConfig(kind=kind, targets="all", rank=2), seeded())
    adapters = adapter_parameters(network)
    assert [one for one in network.parameters() if one.requires_grad] == adapters
    optimizer = torch.optim.Adam(adapters, lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(one.grad is not None for one in adapters)
    own = {name: one for name, one in network.named_parameters() if ".adapter." not in name}
    assert all(one.grad is None for one in own.values())
    assert own.keys() == before.keys()
    assert all(torch.equal(one, before[name]) for name, one in own.items())


def test_checkpointing_changes_no_gradient():
    network = unet()
    add_adapters_(network, AdapterConfig(kind="lokr", targets="all", rank=2), seeded())
    trained_(network)
    gradients = []
    for network.gradient_checkpointing in (False, True):
        gradients.append(torch.autograd.grad(loss_of(network), adapter_parameters(network)))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_may_be_of_half_precision_and_adapters_are_float32(kind, dtype):
    network = unet().to(dtype)
    base = copy.deepcopy(network).float()
    for one in (network, base):
        add_adapters_(one, AdapterConfig(kind=kind, targets="all", rank=2), seeded())
        trained_(one)
    assert {one.dtype for one in adapter_parameters(network)} == {torch.float32}
    assert network.conv_in.weight.dtype == dtype
    output = network(*inputs(dtype))
    assert output.dtype == dtype
    assert relative_error(output.float(), base(*inputs())) < (0.05 if dtype == torch.bfloat16 else 0.01)
    loss_of(network, dtype).backward()
    assert all(one.grad.dtype == torch.float32 and one.grad.isfinite().all() for one in adapter_parameters(network))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_them_in_bfloat16_with_the_gradients_of_float32(kind):
    network = unet()
    add_adapters_(network, AdapterConfig(kind=kind, targets="all", rank=2), seeded())
    trained_(network)
    exact = torch.autograd.grad(loss_of(network), adapter_parameters(network))
    seen: dict[str, torch.dtype] = {}
    for name in ("mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"):
        network.get_submodule(name).adapter.register_forward_hook(
            lambda module, arguments, output, name=name: seen.update({name: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(network)
    assert set(seen.values()) == {torch.bfloat16}
    assert len(seen) == 2
    rounded = torch.autograd.grad(loss, adapter_parameters(network))
    for one, other in zip(rounded, exact, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_under_autocast_the_change_of_the_weight_is_computed_in_float32(kind):
    network = nn.ModuleDict({"block": Attn1(nn.Linear(24, 36))})
    add_adapters_(network, AdapterConfig(kind=kind, rank=2), seeded())
    trained_(network)
    weights = []
    with torch.autocast("cpu", torch.bfloat16):
        network["block"].attn1["to_q"].adapter(torch.ones(1, 24), lambda _, weight: weights.append(weight) or weight)
    assert torch.equal(weights[0], next(iter(adapter_deltas(network).values())).delta_weight())


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_one_adapter_and_draws_from_no_other_generator(kind):
    def drawn(seed: int) -> list[Tensor]:
        network = unet()
        torch.manual_seed(seed + 1)
        state = torch.get_rng_state()
        add_adapters_(network, AdapterConfig(kind=kind, targets="all", rank=2), seeded(seed))
        assert torch.equal(torch.get_rng_state(), state)
        return adapter_parameters(network)

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(first, other, strict=True))


LAYERS = {
    "linear": lambda: nn.Linear(24, 36),
    "linear of a prime": lambda: nn.Linear(24, 37, bias=False),
    "1x1": lambda: nn.Conv2d(24, 36, 1),
    "3x3": lambda: nn.Conv2d(24, 36, 3, padding=1),
    "3x3 stride 2": lambda: nn.Conv2d(24, 36, 3, stride=2, padding=1),
}
LYCORIS = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}


class Attn1(nn.Module):
    """One layer where an attention's is looked for."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": layer})


@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("kind", "factor"), [("lora", None), ("loha", None), ("lokr", None), ("lokr", 4)])
def test_a_layer_is_lycoris_module_of_the_same_numbers(kind, factor, layer, rank):
    base: Any = LAYERS[layer]()
    model = nn.ModuleDict({"block": Attn1(base)})
    add_adapters_(model, AdapterConfig(kind=kind, rank=rank, alpha=1.5, factor=factor), seeded())
    trained_(model, size=0.3)
    (delta,) = adapter_deltas(model).values()
    with torch.random.fork_rng():
        options = {"factor": factor or -1} if kind == "lokr" else {}
        theirs = LYCORIS[kind]("x", base, lora_dim=rank, alpha=1.5, **options)
    theirs.load_state_dict(delta.tensors() | {"alpha": theirs.alpha})
    assert {name: one.shape for name, one in theirs.custom_state_dict().items() if name != "alpha"} == {
        name: one.shape for name, one in delta.tensors().items()
    }
    whole = kind == "lokr" and len(delta.w2) == 1
    assert theirs.alpha == (rank if whole else 1.5)
    theirs.apply_to()
    hidden = torch.randn(2, 24, 9, 8) if "x" in layer else torch.randn(2, 7, 24)
    ours = model["block"].attn1["to_q"](hidden)
    assert relative_error(ours, base(hidden)) < 2e-6
    theirs.restore()
    assert not torch.allclose(ours, base(hidden), atol=0.01)
    merged = base.weight + delta.delta_weight().reshape(base.weight.shape)
    plain = F.linear(hidden, merged, base.bias) if "x" not in layer else base._conv_forward(hidden, merged, base.bias)
    assert relative_error(ours, plain) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_they_begin_with_numbers_of_lycoris_size(kind):
    base = nn.Linear(1600, 1600)
    model = nn.ModuleDict({"block": Attn1(base)})
    add_adapters_(model, AdapterConfig(kind=kind, rank=8), seeded())
    theirs = LYCORIS[kind]("x", base, lora_dim=8, factor=-1).state_dict()
    for name, one in next(iter(adapter_deltas(model).values())).tensors().items():
        torch.testing.assert_close(one.std(), theirs[name].std(), rtol=0.15, atol=0)


def test_of_kronecker_products_the_sizes_are_lycoris():
    for factor in (None, 1, 2, 3, 4, 7, 8, 12, 16, 100, 400):
        for width in (*range(1, 400), 640, 768, 1280, 2560, 3072, 5120, 10240):
            assert kronecker_sizes(width, factor) == factorization(width, factor or -1), (width, factor)


def test_lora_takes_no_product_of_the_size_of_the_weight():
    network = nn.ModuleDict({"block": Attn1(nn.Linear(512, 512, bias=False))})
    add_adapters_(network, AdapterConfig(rank=2), seeded())
    with FlopCounterMode(display=False) as counter:
        network["block"].attn1["to_q"](torch.ones(3, 512))
    assert counter.get_total_flops() == 2 * 3 * (512 * 512 + 2 * (512 + 512))


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_size_of_the_weight_no_more_than_the_change_is_kept_for_the_backward_pass(kind):
    network = nn.ModuleDict({"block": Attn1(nn.Linear(256, 256))})
    add_adapters_(network, AdapterConfig(kind=kind, rank=2), seeded())
    base, kept = network["block"].attn1["to_q"].weight, []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        network["block"].attn1["to_q"](torch.ones(3, 256, requires_grad=True))
    large = {one.data_ptr() for one in kept if one.numel() == 256 * 256} - {base.data_ptr()}
    assert len(large) == (0 if kind == "lora" else 1)


def test_alpha_over_the_rank_is_the_strength():
    outputs = []
    for alpha in (None, 8.0, 4.0):
        network = nn.ModuleDict({"block": Attn1(nn.Linear(8, 8, bias=False))})
        add_adapters_(network, AdapterConfig(rank=8, alpha=alpha), seeded())
        trained_(network)
        outputs.append(next(iter(adapter_deltas(network).values())).delta_weight())
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[0] / 2)


def test_a_network_can_be_copied_and_its_copy_has_adapters_of_its_own():
    network = unet()
    add_adapters_(network, AdapterConfig(rank=2), seeded())
    copied = copy.deepcopy(network)
    trained_(network)
    assert not torch.equal(adapter_parameters(network)[1], adapter_parameters(copied)[1])
    assert adapter_config(copied) == AdapterConfig(rank=2)
    copied.load_state_dict(network.state_dict())
    assert torch.equal(copied(*inputs()), network(*inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dora"}, "kind is 'dora': give one of 'lora', 'loha', 'lokr'"),
        ({"rank": 0}, "rank is 0: give a whole number of 1 or more"),
        ({"alpha": 0.0}, "alpha is 0.0: give a number above 0"),
        ({"alpha": math.inf}, "alpha is inf: give a number above 0"),
        ({"targets": "unet"}, "targets is 'unet': give one of 'attention', 'transformer', 'all'"),
        ({"factor": 4}, "factor is 4, and the adapter a lora: only a lokr has a factor"),
        ({"kind": "lokr", "factor": -1}, "factor is -1: give a whole number of 1 or more"),
    ],
)
def test_what_no_adapter_can_be_is_refused(options, message):
    with pytest.raises(UsageError) as error:
        AdapterConfig(**options)
    assert str(error.value) == message


def test_adapters_twice_or_nowhere_are_refused():
    network = unet()
    with pytest.raises(UsageError, match="this UNet has no adapters: add them first, with add_adapters_"):
        adapter_config(network)
    add_adapters_(network, AdapterConfig(), seeded())
    with pytest.raises(UsageError, match="this network has adapters already: remove them first"):
        add_adapters_(network, AdapterConfig(), seeded())
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="this Sequential has no layers of the targets 'attention'"):
        add_adapters_(other, AdapterConfig(), seeded())
    assert other[0].weight.requires_grad
