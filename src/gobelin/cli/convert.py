"""``gobelin convert``: write a model as a diffusers folder, as a single file, or as ONNX."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gobelin.cli.options import Positional, parse
from gobelin.cli.painting_options import ModelOptions
from gobelin.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Convert(ModelOptions):
    """Write a model as a diffusers folder or, where the name ends in .safetensors, as an original single file.

    Every tensor of the three networks is kept. Left behind are moving averages (EMA), the tables of the noise schedule
    and the optimizer's state, and the tokenizer where the target is a single file, which has no place for it.

    Some examples:
      gobelin convert model.safetensors folder
      gobelin convert model.ckpt folder --allow-pickle --ema
      gobelin convert folder model.safetensors --dtype float16
      gobelin convert model.safetensors folder --onnx
    """

    source: Positional[str]
    """A diffusers folder, a .safetensors or .ckpt file, or a Hub name."""
    target: Positional[Path]
    """A folder, or a file whose name ends in .safetensors."""
    dtype: Literal["own", "float32", "bfloat16", "float16"] = "own"
    """The precision of the written weights; own keeps that of the source."""
    onnx: bool = False
    """Write unet.onnx, vae_decoder.onnx and text_encoder.onnx into the folder, and nothing else."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin convert``."""
    options = parse(Convert, "convert", arguments)
    suffix = options.target.suffix.lower()
    single = suffix in (".safetensors", ".sft")
    if suffix in (".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx"):
        raise UsageError(
            f"{options.target} would be a {suffix} file, which Gobelin does not write: give a .safetensors, or a folder"
        )
    if options.onnx and single:
        raise UsageError(f"{options.target} would be one file, and --onnx writes three: give a folder")
    if options.target.exists() and (single or options.target.is_file() or any(options.target.iterdir())):
        raise UsageError(f"{options.target} exists already: choose another name")
    import torch  # PyTorch is imported after the options are read: help and mistakes are quick

    from gobelin.checkpoint import open_model
    from gobelin.checkpoint.diffusers_folder import save_folder
    from gobelin.checkpoint.single_file import save_single_file

    dtype = None if options.dtype == "own" else getattr(torch, options.dtype)
    model = open_model(options.source, torch.device("cpu"), dtype, **options.files())
    if options.onnx:
        from gobelin.checkpoint.onnx_files import save_onnx

        save_onnx(model, options.target)
        print(options.target)
        return
    if single and (words := model.tokenizer.own_words()):
        print(
            f"gobelin: the words {', '.join(words[:5])} of the tokenizer have no place in a single file: give this "
            "tokenizer's folder as --tokenizer where it is opened",
            file=sys.stderr,
        )
    write = save_single_file if single else save_folder
    write(model, options.target)
    print(options.target)
