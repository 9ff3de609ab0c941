"""The work of ``gobelin show``: a U-Net without weights, taken apart."""

import torch
from rich.console import Console
from rich.table import Table

from gobelin.checkpoint.shipped import find_model
from gobelin.cli.show import Show
from gobelin.errors import UsageError
from gobelin.formats.component import config_from_json
from gobelin.formats.files import read_json
from gobelin.formats.weights import parameter_count
from gobelin.look.attention_shapes import SiteShapes, trace_shapes
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAEConfig

_PRESETS = {"nano": 32, "tiny": 32, "small": 32, "sd15": 77}  # and how many tokens their prompts have


def show_shapes(options: Show) -> None:
    """Print the module tree, the first transformer step by step, and a table of every attention."""
    unet_config, factor, length = _find_model(options.model)
    side = unet_config.sample_size * factor
    height, width = (side if given is None else given for given in (options.height, options.width))
    if height < factor or width < factor or height % factor or width % factor:
        raise UsageError(f"{width}×{height} pixels: this model paints sizes that are multiples of {factor}")
    with torch.device("meta"):
        unet = UNet(unet_config)
    if not options.no_tree:
        print(unet)
        print()
    print(f"{parameter_count(unet):,} parameters in {len(unet.state_dict())} tensors\n")
    _print_shapes(
        trace_shapes(unet_config, height // factor, width // factor, length),
        unet_config,
        height,
        width,
        factor,
        length,
    )


def _find_model(model: str) -> tuple[UNetConfig, int, int]:
    """Read (U-Net configuration, pixels a latent, tokens a prompt) of a preset or a folder."""
    if model in _PRESETS:
        vae = getattr(VAEConfig, model)()
        return getattr(UNetConfig, model)(), vae.factor, _PRESETS[model]
    folder = find_model(model or None)
    if not folder.is_dir():
        raise UsageError(f"{model!r} is neither a folder nor a preset: the presets are {', '.join(_PRESETS)}")
    unet, vae = (folder / part / "config.json" for part in ("unet", "vae"))
    text = read_json(folder / "text_encoder" / "config.json")
    return (
        config_from_json(UNetConfig, read_json(unet), unet),
        config_from_json(VAEConfig, read_json(vae), vae).factor,
        text.get("max_position_embeddings", 77),
    )


def _print_shapes(
    sites: list[SiteShapes], config: UNetConfig, height: int, width: int, factor: int, length: int
) -> None:
    """Print the first transformer step by step, then a table with every site."""
    first, cross = sites[0], next(site for site in sites if site.kind == "cross")
    h, w = height // factor, width // factor
    channels = first.output[-1]
    heads, head = first.query[1], first.query[-1]
    patches = first.query[2]
    print(f"A {width}×{height} image is [1, {config.in_channels}, {h}, {w}] latents; a prompt is {length} tokens.")
    print(f"conv_in makes them [1, {config.block_out_channels[0]}, {h}, {w}].\n")
    print(f"The first transformer ({first.name.rsplit('.', 1)[0]}):")
    print(f"  its {first.grid[0]}×{first.grid[1]} feature map is a row of patches, x = [1, {patches}, {channels}]")
    print("  attn1: every patch looks at every patch")
    print(f"    q, k, v = to_q(x), to_k(x), to_v(x), each [1, {patches}, {channels}]")
    print(f"      → {heads} heads of width {head}: {list(first.query)}")
    print(f"    probs  = softmax(q @ kᵀ / √{head}) → {list(first.probs)}; each row sums to 1")
    print(f"    output = to_out(probs @ v) → {list(first.output)}; x = x + output")
    print("  attn2: every patch looks at every word")
    print(f"    q = to_q(x) → {list(cross.query)}")
    print(
        f"    k, v = to_k(text), to_v(text): Linear({config.cross_attention_dim} → {cross.output[-1]}) "
        f"→ {list(cross.key)}"
    )
    print(f"    probs  = softmax(q @ kᵀ / √{head}) → {list(cross.probs)}")
    print(f"    output = to_out(probs @ v) → {list(cross.output)}; x = x + output")
    print("  then the feed-forward; and back to a feature map, added to what came in\n")
    table = Table(title="Every attention site, in order", title_justify="left")
    for column in ("site", "kind", "feature map", "q", "k, v", "probs", "output"):
        table.add_column(column, no_wrap=True)
    for site in sites:
        table.add_row(
            site.name,
            site.kind,
            f"{site.grid[0]}×{site.grid[1]}",
            *(str(list(shape)) for shape in (site.query, site.key, site.probs, site.output)),
        )
    Console(width=200).print(table)
    kinds = [site.kind for site in sites]
    print(f"{kinds.count('self')} self-attentions (attn1), {kinds.count('cross')} cross-attentions (attn2).")
