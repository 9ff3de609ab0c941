"""Fused blocks: the same numbers as a narrow network's own, up to rounding, and never those that it had before."""

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from gobelin.attention import AttentionEdit
from gobelin.checkpoint import Model
from gobelin.engines.eager import EagerEngine, PreparedDecoder, PreparedUNet
from gobelin.engines.fused_blocks import FusedBlocks, fusing_pays
from gobelin.kernels.fused_layer import computes_fused_layers
from gobelin.layers import ResnetBlock2D, Upsample2D
from gobelin.operations import Conv2d
from gobelin.pipeline import Pipeline
from gobelin.shortcuts import DeepFeatures, Shortcuts
from gobelin.unet import Transformer2DModel, UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

pytestmark = pytest.mark.skipif(
    not computes_fused_layers(torch.float32), reason="needs a C++ compiler and a CPU with AVX2"
)
EXACT = 3e-6  # relative root mean square in float32, after some sixty layers


def narrow_unet(dtype: torch.dtype = torch.float32) -> UNet:
    torch.manual_seed(0)
    config = UNetConfig.of(
        *(24, 36, 60), attention=(True, True, False), layers_per_block=1, cross_attention_dim=22, attention_head_dim=2,
        norm_num_groups=6,
    )  # fmt: skip
    return UNet(config).to(dtype).requires_grad_(False).eval()


def inputs(dtype: torch.dtype, batch: int = 2, height: int = 8, width: int = 8) -> tuple[Tensor, ...]:
    latents = torch.randn(batch, 4, height, width).to(dtype)
    mask = torch.arange(7) < torch.randint(1, 8, (batch, 1))
    return latents, torch.rand(batch) * 999, torch.randn(batch, 7, 22).to(dtype), mask


def fused(unet: UNet) -> PreparedUNet:
    return PreparedUNet(unet, FusedBlocks(unet)).updated()


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def in_use(unet: UNet) -> set[nn.Module]:
    """The modules that have another forward while the fused blocks are in use."""
    blocks = FusedBlocks(unet)
    blocks.update()
    with blocks.in_use():
        return {module for module in unet.modules() if "forward" in vars(module)}


@torch.no_grad()
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 7, 5), (2, 1, 9), (5, 16, 16)])
def test_it_computes_what_the_network_does(batch: int, height: int, width: int) -> None:
    unet, given = narrow_unet(), inputs(torch.float32, batch, height, width)
    assert {type(one) for one in in_use(unet)} == {ResnetBlock2D, Transformer2DModel, Upsample2D, Conv2d}
    ours = fused(unet)(*given)
    assert not torch.equal(ours, unet(*given))
    assert error(ours, unet.double()(given[0].double(), given[1], given[2].double(), given[3])) <= EXACT
    assert not any("forward" in vars(module) for module in unet.modules())


@torch.no_grad()
def test_in_bfloat16_it_is_no_farther_from_float32_than_the_network() -> None:
    if not computes_fused_layers(torch.bfloat16):
        pytest.skip("needs a CPU with AVX512-BF16")
    unet, given = narrow_unet(torch.bfloat16), inputs(torch.bfloat16, 6)
    ours, plain = fused(unet)(*given), unet(*given)
    truth = unet.float()(given[0].float(), given[1], given[2].float(), given[3])
    assert error(ours, truth) <= 1.1 * error(plain, truth)


@torch.no_grad()
def test_tracing_changes_no_bit() -> None:
    unet, given = narrow_unet(), inputs(torch.float32)
    runner = fused(unet)
    traced, maps = runner.trace(*given, rows=slice(1, None))
    assert torch.equal(traced, runner(*given))
    kept, _ = runner.trace(*given, sites="*", edits=[AttentionEdit(change=lambda site, probs: probs, sites="*")])
    assert torch.equal(kept, traced)
    _, plain = unet.trace(*given, rows=slice(1, None))
    assert list(maps) == list(plain)
    assert all(error(maps[site], plain[site]) < 1e-5 for site in maps)
    changed, _ = runner.trace(*given, edits=[AttentionEdit(change=lambda site, probs: probs.roll(1, -1))])
    assert not torch.equal(changed, traced)


@torch.no_grad()
def test_shortcuts_are_taken_as_the_network_takes_them() -> None:
    unet, given = narrow_unet(), inputs(torch.float32)
    runner, ours, plain = fused(unet), DeepFeatures(), DeepFeatures()
    for merge in (0.0, 0.0, 0.5):
        fast, _ = runner.trace(*given, shortcuts=Shortcuts(merge_tokens=merge, deep=ours))
        truth, _ = unet.trace(*given, shortcuts=Shortcuts(merge_tokens=merge, deep=plain))
        assert error(fast, truth) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize(
    "write",
    [
        lambda unet: unet.mid_block.resnets[0].norm1.bias.data.add_(1),
        lambda unet: unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data.mul_(3),
        lambda unet: unet.up_blocks[0].upsamplers[0].conv.bias.data.add_(1),
    ],
)
def test_what_is_written_to_a_weight_is_seen(write: Callable[[UNet], object]) -> None:
    unet, given = narrow_unet(), inputs(torch.float32)
    runner = fused(unet)
    before = runner(*given)
    write(unet)
    after = runner.updated()(*given)
    assert error(after, before) > 1e-4
    assert error(after, unet(*given)) <= EXACT


@torch.no_grad()
def test_a_block_with_something_else_inside_goes_on_as_it_is() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    unet, given = narrow_unet(), inputs(torch.float32)
    every, heard = in_use(unet), []
    transformer = unet.mid_block.attentions[0]
    resnet = unet.mid_block.resnets[0]
    resnet.conv1.register_forward_hook(lambda *_: heard.append(1))
    alone = every - {resnet} | {resnet.conv1, resnet.conv2}  # its convolutions by themselves
    assert in_use(unet) == alone
    old = transformer.transformer_blocks[0].ff.net[2]
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    transformer.transformer_blocks[0].ff.net[2] = new
    assert in_use(unet) == alone - {transformer} | {transformer.proj_in, transformer.proj_out}
    assert error(fused(unet)(*given), unet(*given)) <= EXACT
    assert len(heard) == 2


@torch.no_grad()
def test_hooks_of_a_block_itself_are_called() -> None:
    unet, heard = narrow_unet(), []
    unet.mid_block.attentions[0].register_forward_hook(lambda *_: heard.append(1))
    fused(unet)(*inputs(torch.float32))
    assert heard == [1]


def test_where_gradients_are_kept_the_network_computes() -> None:
    unet, given = narrow_unet(), inputs(torch.float32)
    latents = given[0].requires_grad_()
    ours = torch.autograd.grad(fused(unet)(latents, *given[1:]).sum(), latents)[0]
    assert error(ours, torch.autograd.grad(unet(latents, *given[1:]).sum(), latents)[0]) <= EXACT


@torch.no_grad()
def test_threads_do_not_take_each_others_memory() -> None:
    unet = narrow_unet()
    runner = fused(unet)
    given = [inputs(torch.float32, batch) for batch in (1, 2, 3)]
    wanted = [runner(*one) for one in given]
    same: list[bool] = []

    def work(index: int) -> None:
        with torch.no_grad():
            same.extend(torch.equal(runner(*given[index]), wanted[index]) for _ in range(10))

    threads = [Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 30
    assert all(same)


def test_a_painting_that_begins_takes_nothing_from_one_that_runs() -> None:
    unet = narrow_unet()
    blocks = FusedBlocks(unet)
    blocks.update()
    before = in_use(unet)
    with blocks.in_use():
        blocks.update()
        with blocks.in_use():
            assert {module for module in unet.modules() if "forward" in vars(module)} == before
    assert in_use(unet) == before


def test_a_pipeline_paints_with_fused_blocks(clip_model: Callable[..., Model]) -> None:
    model = clip_model()
    pipe = Pipeline(model).to("cpu", "float32")
    engine = EagerEngine.of(pipe.model)
    assert isinstance(engine.unet, PreparedUNet)
    assert isinstance(engine.vae, PreparedDecoder)
    first = pipe("a red circle", seed=1, steps=2)
    assert torch.equal(first.latents, pipe("a red circle", seed=1, steps=2, trace=True).latents)
    plain = model.vae.latents_to_images(first.latents)
    assert error(engine.vae.latents_to_images(first.latents), plain) <= EXACT


def test_it_pays_for_narrow_networks_alone() -> None:
    with torch.device("meta"):
        assert not fusing_pays(UNet(UNetConfig.sd15()))
    assert not fusing_pays(UNet(UNetConfig.of(128, attention=(True,), cross_attention_dim=8, layers_per_block=1)))
    assert fusing_pays(narrow_unet())
    assert not fusing_pays(narrow_unet(torch.float16))
    assert fusing_pays(VAE(VAEConfig(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4)))
