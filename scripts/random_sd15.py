"""Write a Stable Diffusion 1.5 of random weights as one half-precision file of 2.1 GB, laid out as the original's.

    python scripts/random_sd15.py sd15.safetensors
    gobelin verify sd15.safetensors --tokenizer src/gobelin/models/tiny
    gobelin generate "a castle" --model sd15.safetensors --tokenizer src/gobelin/models/tiny --steps 2 --dtype bfloat16

What it paints is noise; what opening and painting take, in memory and time, is what a trained one takes.
"""

import argparse
from pathlib import Path

import torch

from gobelin.bench.picture_contenders import random_pipeline


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the model goes, *.safetensors")
    random_pipeline(torch.float16).save_single_file(parser.parse_args().file, torch.float16)


if __name__ == "__main__":
    main()
