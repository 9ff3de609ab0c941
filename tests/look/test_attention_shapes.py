"""The shape trace against what the network really computes."""

import torch

from gobelin.layers import Attention
from gobelin.look.attention_shapes import trace_shapes
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig


def test_sd15_has_sixteen_of_each_at_the_published_sizes():
    sites = trace_shapes(UNetConfig.sd15(), 64, 64)
    for kind in ("self", "cross"):
        chosen = [site for site in sites if site.kind == kind]
        assert len(chosen) == 16
        assert [site.grid[0] for site in chosen].count(64) == 5
        assert [site.grid[0] for site in chosen].count(8) == 1
    by_name = {site.name: site for site in sites}
    assert by_name["down_blocks.1.attentions.0.transformer_blocks.0.attn2"].probs == (1, 8, 1024, 77)
    assert by_name["mid_block.attentions.0.transformer_blocks.0.attn1"].query == (1, 8, 64, 160)


def test_the_trace_is_what_runs_also_at_odd_sizes():
    config = UNetConfig.nano()
    unet = UNet(config)
    ran = []
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda _, inputs, output, name=name: ran.append((name, tuple(output.shape))))
    unet(torch.randn(1, 4, 9, 14), torch.zeros(1), torch.randn(1, 5, config.cross_attention_dim))
    assert [(site.name, site.output) for site in trace_shapes(config, 9, 14, length=5)] == ran
