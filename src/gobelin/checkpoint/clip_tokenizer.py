"""CLIP's vocabulary, which single files do not carry: where it may be found on this machine."""

import gzip
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from gobelin.errors import ModelError
from gobelin.tokenizer import BOS, EOS, WORD_END, Tokenizer

CLIP = "openai/clip-vit-large-patch14"
_MERGES = 49152 - 256 - 2  # of its vocabulary, beside bytes and markers (CLIP's ``simple_tokenizer.py``)


def find_tokenizer(beside: Path) -> Tokenizer:
    """CLIP's tokenizer: beside a file, in the Hub's cache, or from an installed ``open_clip``.

    Raises :class:`ModelError` that says where it was looked for.
    """
    for folder in (beside.parent, beside.parent / "tokenizer", *_cached()):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return Tokenizer.from_pretrained(folder)
    found = find_spec("open_clip")
    if found and found.origin and (file := Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz")).is_file():
        return clip_tokenizer(file)
    raise ModelError(
        f"{beside} carries no tokenizer, and CLIP's is not beside it (vocab.json, merges.txt), not in the Hub's cache "
        f"({CLIP}) and not in an installed open_clip: give its folder as tokenizer, or pip install --no-deps "
        "open_clip_torch"
    )


def clip_tokenizer(file: Path) -> Tokenizer:
    """CLIP's tokenizer from the list of merges that its code carries, ``bpe_simple_vocab_16e6.txt.gz``."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : _MERGES + 1])]
    symbols = _byte_symbols()
    words = [*symbols, *(symbol + WORD_END for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    return Tokenizer({word: index for index, word in enumerate(words)}, merges)


def _byte_symbols() -> list[str]:
    """The character that stands for each byte, in CLIP's order: the printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def _cached() -> Iterator[Path]:
    """The folders of CLIP in the Hub's cache, newest first."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = cache / f"models--{CLIP.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir():
        yield from sorted(snapshots.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
