"""The files of a CLIP tokenizer's folder, read and written as transformers does.

Layouts: ``tokenization_utils_base.py`` and ``tokenization_utils_tokenizers.py`` of transformers 5.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from gobelin.errors import ModelError
from gobelin.formats.files import is_there, read_json, read_text, write_json, write_text
from gobelin.validation import shown

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MIN_VOCABULARY = 2 * 256 + 2
"""Bytes, bytes that end a word, and markers."""
LONGEST_ADDED = 1000
"""Characters of an added token or word."""
_MOST_ADDED = 10_000  # tokens, whose table is read in a fraction of a second; trained words are a few
_LONGEST_TABLE = 500_000  # characters of all added tokens
_UNLIMITED = 10**6  # transformers writes 10³⁰ where no length was set
_MERGES_HEADER = "#version: 0.2"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The contents of a tokenizer's folder.

    ``source`` names the files of the vocabulary. ``added`` are the added tokens in the order in which transformers adds
    them, and ``numbers`` the ids that files give to some, each with its file.
    """

    source: str
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    max_length: int
    added: list[AddedToken]
    numbers: dict[str, tuple[int, Path]]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read a tokenizer's folder, or that of a model which has one in ``tokenizer``.

    Raises :class:`ModelError` that names the file and what is wrong.

    The vocabulary and the merges are those of ``tokenizer.json`` where there is one, and of ``vocab.json`` and
    ``merges.txt`` where not; added tokens stand in ``tokenizer_config.json``, or in ``special_tokens_map.json``,
    ``added_tokens.json`` and ``tokenizer.json``.
    """
    folder = _tokenizer_folder(folder)
    config = folder / "tokenizer_config.json"
    said = read_json(config) if is_there(config) else {}
    length = said.get("model_max_length", 77)
    if not isinstance(length, int) or length < 3:
        raise ModelError(f"{config}: model_max_length is {length!r}, expected 3 tokens or more")
    if is_there(folder / "tokenizer.json"):
        source = str(folder / "tokenizer.json")
        vocab, merges = _from_tokenizer_json(folder / "tokenizer.json")
    else:
        source = f"{folder / 'vocab.json'} with merges.txt"
        merges = _read_merges(folder / "merges.txt")
        vocab = read_json(folder / "vocab.json")
    added, numbers = _read_added(folder, said)
    try:
        refuse_other_vocabulary({*vocab, *numbers})
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    return TokenizerFiles(
        source=source,
        vocab=vocab,
        merges=merges,
        max_length=length if length < _UNLIMITED else 77,
        added=added,
        numbers=numbers,
    )


def _tokenizer_folder(given: Path) -> Path:
    """Find the folder that has the vocabulary: the one given, or the ``tokenizer`` in it."""
    for folder in (given, given / "tokenizer"):
        if any(is_there(folder / name) for name in ("tokenizer.json", "vocab.json", "merges.txt")):
            return folder
    raise ModelError(f"{given} has no tokenizer: expected tokenizer.json in it, or vocab.json and merges.txt")


def write_tokenizer_files(
    folder: Path,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    max_length: int,
    added: Mapping[int, AddedToken],
) -> None:
    """Write the files that transformers' ``CLIPTokenizer`` reads; ``added`` are all added tokens by their ids.

    Files that another tokenizer left in the folder, and that would be read in place of these, are removed.
    """
    for left in ("tokenizer.json", "added_tokens.json"):
        (folder / left).unlink(missing_ok=True)
    write_json(folder / "vocab.json", vocab)
    write_text(folder / "merges.txt", "\n".join([_MERGES_HEADER, *(" ".join(pair) for pair in merges)]) + "\n")
    write_json(folder / "special_tokens_map.json", _SPECIAL)
    config: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, **_SPECIAL}
    plain = [AddedToken(token, special=True) for token in (BOS, EOS)]
    if any(token not in plain for token in added.values()):
        config["added_tokens_decoder"] = {
            str(number): {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
            for number, token in sorted(added.items())
        }
        beyond = {token.content: number for number, token in added.items() if token.content not in vocab}
        write_json(folder / "added_tokens.json", beyond)  # for programs that read no configuration
    write_json(folder / "tokenizer_config.json", config)


def refuse_other_vocabulary(vocab: Collection[str]) -> None:
    """Raise :class:`ModelError` for a vocabulary without the tokens that begin and end a text."""
    if missing := [token for token in (BOS, EOS) if token not in vocab]:
        raise ModelError(f"the vocabulary lacks {missing[0]!r}: it is not a CLIP tokenizer's")


def _from_tokenizer_json(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read vocabulary and merges of a file of the ``tokenizers`` library."""
    model = read_json(file).get("model")
    try:
        if not isinstance(model, dict) or not isinstance(model["vocab"], dict):
            raise ValueError("no vocabulary")
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
        return model["vocab"], [(left, right) for left, right in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} is not a byte-pair tokenizer's: {error!r}") from error


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """Read the pairs of ``merges.txt``."""
    try:
        lines = read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if bad := [pair for pair in pairs if len(pair) != 2]:
        raise ModelError(f"{file}: {shown(' '.join(bad[0]))} is not a pair of symbols")
    return [(left, right) for left, right in pairs]


def _read_added(folder: Path, config: dict[str, Any]) -> tuple[list[AddedToken], dict[str, tuple[int, Path]]]:
    """Read a folder's added tokens, in the order in which transformers adds them, and the numbers that files give.

    ``added_tokens_decoder`` in the configuration is all of them where it stands there; without, they are those of
    ``special_tokens_map.json``, ``added_tokens.json`` and ``tokenizer.json`` (``tokenization_utils_base.py``,
    ``_from_pretrained``).
    """
    source = folder / "tokenizer_config.json"
    given = {name: _added_token(config[name], source) for name in _NAMED_TOKENS if config.get(name) is not None}
    extra = _added_list(config.get("extra_special_tokens") or config.get("additional_special_tokens"), source)
    late: list[AddedToken] = []  # which transformers takes for special after added_tokens.json is read
    numbered: dict[int, tuple[AddedToken, Path]] = {}
    if "added_tokens_decoder" in config:
        for number, token in _entries(config["added_tokens_decoder"], source):
            numbered[_number(number, source)] = _added_token(token, source), source
    else:
        if is_there(file := folder / "special_tokens_map.json"):
            content = read_json(file)
            special = {name: content[name] for name in _NAMED_TOKENS if content.get(name) is not None}
            given |= {name: _added_token(token, file, special=True) for name, token in special.items()}
            extra += _added_list(content.get("extra_special_tokens"), file)
            late = [] if extra else _added_list(content.get("additional_special_tokens"), file)
        if is_there(file := folder / "added_tokens.json"):
            known = [token.content for token in (*given.values(), *extra)]
            for word, number in read_json(file).items():
                numbered[_number(number, file)] = _added_token({"content": word}, file, special=word in known), file
        if is_there(file := folder / "tokenizer.json"):
            for token in _listed(read_json(file).get("added_tokens"), file):
                number = token.get("id") if isinstance(token, dict) else None
                numbered[_number(number, file)] = _added_token(token, file), file
    if (count := len(numbered) + len(extra) + len(late)) > _MOST_ADDED:
        raise ModelError(f"{folder} has {count:,} added tokens: expected {_MOST_ADDED:,} at most")
    if sum(len(token.content) for token, _ in numbered.values()) > _LONGEST_TABLE:
        raise ModelError(f"{folder} has added tokens of more than {_LONGEST_TABLE:,} characters in all")
    added = [token for _, (token, _) in sorted(numbered.items())]
    by_content = {token.content: token for token in added}
    named = {name: AddedToken(token, special=True) for name, token in _SPECIAL.items()}
    named |= {name: by_content.get(token.content, token) for name, token in given.items()}
    for name, expected in _SPECIAL.items():
        if name != "unk_token" and named[name].content != expected:
            raise ModelError(f"{folder}: {name} is {named[name].content!r}, and a CLIP tokenizer's is {expected!r}")
    special = [*(named[name] for name in _NAMED_TOKENS if name in named), *extra, *late]
    added += [token for token in special if token.content not in by_content]
    return added, {token.content: (number, file) for number, (token, file) in numbered.items()}


def _added_list(tokens: object, file: Path) -> list[AddedToken]:
    """Read a list of special tokens."""
    return [_added_token(token, file) for token in _listed(tokens, file)]


def _listed(tokens: object, file: Path) -> list[Any]:
    """Return the tokens of a list, or of an object that names them; none of nothing."""
    tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens or []
    if not isinstance(tokens, list):
        raise ModelError(f"{file}: its added tokens are {shown(tokens)}, expected a list")
    return tokens


def _entries(table: object, file: Path) -> list[tuple[str, Any]]:
    """Return the entries of an object."""
    if not isinstance(table, dict):
        raise ModelError(f"{file}: added_tokens_decoder is {shown(table)}, expected an object")
    return list(table.items())


def _number(given: object, file: Path) -> int:
    """Read a token's number; an object's key is text."""
    number = int(given) if isinstance(given, str) and re.fullmatch(r"[0-9]{1,9}", given) else given
    if type(number) is not int or not 0 <= number < 10**9:
        raise ModelError(f"{file}: the number of an added token is {shown(given)}, expected a whole number")
    return number


def _added_token(given: object, file: Path, special: bool | None = None) -> AddedToken:
    """Make a token of what a file says of it: its text alone, which makes it special, or an object with flags.

    ``special`` takes the place of that flag.
    """
    said = given if isinstance(given, dict) else {"content": given, "special": True}
    content, flags = said.get("content"), {name: said[name] for name in _FLAGS if name in said}
    flags |= {} if special is None else {"special": special}
    if not isinstance(content, str) or not 0 < len(content) <= LONGEST_ADDED or not _is_unicode(content):
        raise ModelError(
            f"{file}: an added token is {shown(content)}, expected text of 1 to {LONGEST_ADDED:,} characters"
        )
    if bad := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise ModelError(f"{file}: {bad[0]} of {content!r} is {shown(flags[bad[0]])}, expected true or false")
    return AddedToken(content, **flags)


def _is_unicode(text: str) -> bool:
    """Tell whether a text has no half characters, which JSON can spell."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
