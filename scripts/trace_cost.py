"""What looking costs: a guided U-Net pass with and without a trace, side by side.

    python scripts/trace_cost.py sd15 --pairs 9
    python scripts/trace_cost.py shipped --pairs 300 --sharp

Passes alternate, so that what slows the machine slows both; printed are the median and the quartiles of the ratio of
neighbours. At the size of Stable Diffusion 1.5, 512×512 pixels, weights are random.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from gobelin.look.heatmaps import sharp_trace
from gobelin.pipeline import Pipeline
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("sd15", "shipped"))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--sharp", action="store_true", help="what sharp maps are made of, in place of all words")
    options = parser.parse_args()

    if options.size == "sd15":
        unet, length = UNet(UNetConfig.sd15()).eval(), 77
    else:
        pipeline = Pipeline.from_pretrained(None, "cpu")
        unet, length = pipeline.unet, pipeline.tokenizer.max_length
    side = unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, side, side, generator=generator)
    text_embeddings = torch.randn(2, length, unet.config.cross_attention_dim, generator=generator)
    timesteps = torch.tensor([500.0, 500.0])
    sites = sharp_trace(unet.attention_sites, (side, side)).sites if options.sharp else None

    def plain() -> None:
        unet(latents, timesteps, text_embeddings)

    def traced() -> None:
        unet.trace(latents, timesteps, text_embeddings, sites=sites, rows=slice(1, None))

    _, maps = unet.trace(latents, timesteps, text_embeddings, sites=sites, rows=slice(1, None))
    plain()
    seconds = np.array([(timed(plain), timed(traced)) for _ in range(options.pairs)])
    low, middle, high = np.percentile(seconds[:, 1] / seconds[:, 0], [25, 50, 75])
    kept = sum(probs.nbytes for probs in maps.values()) / 1e6
    transient = max(site.heads * probs.nbytes for site, probs in maps.items()) / 1e6
    print(
        f"{options.size}, {len(maps)} of {len(unet.attention_sites)} sites: {np.median(seconds[:, 0]):.4f} s a pass,"
        f" traced {middle - 1:+.1%} (quartiles {low - 1:+.1%} to {high - 1:+.1%}, {options.pairs} pairs); an image's"
        f" maps are {kept:.1f} MB, the largest site's before the mean over heads {transient:.1f} MB"
    )


def timed(run: Callable[[], None]) -> float:
    """How many seconds it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
