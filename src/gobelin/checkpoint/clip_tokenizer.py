"""Find CLIP's tokenizer on this machine: single files of Stable Diffusion do not carry it."""

import gzip
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from gobelin.errors import ModelError
from gobelin.formats.files import is_there, read_json
from gobelin.tokenizer import BOS, EOS, WORD_END, Tokenizer

_CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
_MERGES = 49152 - 256 - 2  # lines of the list that make tokens; the rest is unused (CLIP's ``simple_tokenizer.py``)


def find_clip_tokenizer(beside: Path) -> Tokenizer:
    """Find CLIP's tokenizer: beside a file, in the Hub's cache, or in an installed ``open_clip``.

    Raises :class:`ModelError` that lists these places where none has it.
    """
    for folder in (beside.parent, beside.parent / "tokenizer", *_cached_folders()):
        if (is_there(folder / "vocab.json") and is_there(folder / "merges.txt")) or _is_newer(folder):
            return Tokenizer.from_pretrained(folder)
    found = find_spec("open_clip")
    if found and found.origin and (file := Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz")).is_file():
        return read_bpe_merges(file)
    raise ModelError(
        f"{beside} has no tokenizer, and CLIP's is not beside it (vocab.json, merges.txt), not in the Hub's cache "
        f"({_CLIP_REPOSITORY}) and not in an installed open_clip: give its folder as tokenizer, or pip install "
        "--no-deps open_clip_torch"
    )


def _is_newer(folder: Path) -> bool:
    """Recognise a CLIP tokenizer as transformers 5 writes it, without vocab.json and merges.txt."""
    config = folder / "tokenizer_config.json"
    if not (is_there(folder / "tokenizer.json") and is_there(config)):
        return False
    return str(read_json(config).get("tokenizer_class", "")).startswith("CLIPTokenizer")


def read_bpe_merges(file: Path) -> Tokenizer:
    """Build CLIP's tokenizer from the merges that its code carries, ``bpe_simple_vocab_16e6.txt.gz``."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : _MERGES + 1])]
    symbols = _byte_symbols()
    words = [*symbols, *(symbol + WORD_END for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    return Tokenizer({word: index for index, word in enumerate(words)}, merges)


def _byte_symbols() -> list[str]:
    """List the character that stands for each byte, in CLIP's order: the printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def _cached_folders() -> Iterator[Path]:
    """Yield CLIP's folders in the Hub's cache, newest first."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = cache / f"models--{_CLIP_REPOSITORY.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir():
        yield from sorted(snapshots.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
