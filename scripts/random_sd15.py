"""Write a Stable Diffusion 1.5 of random weights as one half-precision file of 2.1 GB, laid out as the original's.

    python scripts/random_sd15.py sd15.safetensors
    gobelin verify sd15.safetensors --tokenizer src/gobelin/models/tiny
    gobelin generate "a castle" --model sd15.safetensors --tokenizer src/gobelin/models/tiny --steps 2 --dtype bfloat16

What it paints is noise; what opening and painting take, in memory and time, is what a trained one takes.
"""

import sys
from pathlib import Path

import torch

from gobelin.bench.picture_contenders import random_pipeline


def main() -> None:
    """The script."""
    random_pipeline(torch.float16).save_single_file(Path(sys.argv[1]), torch.float16)


if __name__ == "__main__":
    main()
