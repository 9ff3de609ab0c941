"""Prompt to token ids, and the tokens that each word became.

Byte-pair encoding as CLIP has it (Radford et al. 2021, section 2.4), run by the ``tokenizers`` library: lower
case, 256 byte symbols, words that end in ``</w>``, BOS first, then EOS as end and padding.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor

from gobelin.errors import ModelError, UsageError
from gobelin.formats.files import read_json, write_json, write_text

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WORD = re.compile(r"[^\W_](?:\S*[^\W_])?")
UNLIMITED = 10**6  # transformers writes 10³⁰ where no length was set
MIN_VOCABULARY = 2 * 256 + 2
MERGES_HEADER = "#version: 0.2"


@dataclass(frozen=True, kw_only=True)
class WordSpan:
    """A word of a text: its characters ``text[start:end]``, and the positions of its tokens, BOS being 0."""

    word: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of a text: its id, and its characters ``text[start:end]``."""

    id: int
    start: int
    end: int

    def moved(self, by: int) -> "Token":
        """The same so many characters further on."""
        return replace(self, start=self.start + by, end=self.end + by)


Word = str | int | tuple[str, int]
"""A word or phrase wherever it stands, one occurrence of it, or a word by its number in the prompt."""

PARTS = ("bos", "eos", "padding")


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of a prompt and where their tokens are, among ``length`` of which ``end`` is the first EOS."""

    text: str
    spans: tuple[WordSpan, ...]
    end: int
    length: int

    def __len__(self) -> int:
        return len(self.spans)

    def tokens(self, key: Word) -> tuple[int, ...]:
        """The positions of a word's tokens: ``"circle"`` and ``"red circle"`` wherever they stand, ``("circle", 1)``
        the second of them, ``3`` the fourth word.

        Case does not matter. Raises :class:`UsageError` with the words there are.
        """
        there = ", ".join(dict.fromkeys(span.word for span in self.spans)) or "none"
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise UsageError(f"there is no word number {key}: the prompt has {len(self)}, {there}")
            return self.spans[key].tokens
        phrase, occurrence = (key, None) if isinstance(key, str) else key
        wanted = [word.lower() for word in WORD.findall(phrase)]
        spoken = [span.word.lower() for span in self.spans]
        starts = [start for start in range(len(self)) if wanted and spoken[start : start + len(wanted)] == wanted]
        if not starts:
            raise UsageError(f"{phrase!r} is not in the prompt, whose words are {there}")
        if occurrence is not None:
            if not -len(starts) <= occurrence < len(starts):
                raise UsageError(
                    f"{phrase!r} occurs {len(starts)} times in the prompt: there is no number {occurrence} of it, "
                    "the first being 0"
                )
            starts = [starts[occurrence]]
        found = [span for start in starts for span in self.spans[start : start + len(wanted)]]
        return tuple(dict.fromkeys(token for span in found for token in span.tokens))

    def part(self, part: str) -> tuple[int, ...]:
        """The positions of "bos", "eos" or "padding"."""
        if part not in PARTS:
            raise UsageError(f"unknown part {part!r}: the choices are {', '.join(PARTS)}")
        return {"bos": (0,), "eos": (self.end,), "padding": tuple(range(self.end + 1, self.length))}[part]


class Tokenizer:
    """A byte-pair tokenizer of CLIP's kind, loaded from ``vocab.json`` and ``merges.txt`` or trained on texts."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], max_length: int = 77):
        if missing := [token for token in (BOS, EOS) if token not in vocab]:
            raise ModelError(f"the vocabulary lacks {missing[0]!r}: it is not a CLIP tokenizer's")
        self.vocab = vocab
        self.merges = list(merges)
        self.max_length = max_length
        try:
            self._engine = _engine(models.BPE(vocab, self.merges, end_of_word_suffix=WORD_END, unk_token=EOS))
        except Exception as error:  # the library's own, of no particular type
            raise ModelError(f"the vocabulary and the merges do not make a tokenizer: {error}") from error
        self._engine.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS)])
        self._meanings: dict[int, tuple[int, ...]] = {}

    @property
    def eos(self) -> int:
        """The id of the token that ends a text and pads it."""
        return self.vocab[EOS]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 2048, max_length: int = 77) -> Self:
        """Learn the merges from texts; the vocabulary is laid out as CLIP's and holds ``vocab_size`` at most.

        All 256 byte symbols and their word-end forms are in it, so that no text is ever unknown.
        """
        engine = _engine(models.BPE(end_of_word_suffix=WORD_END))
        if vocab_size < MIN_VOCABULARY:
            raise UsageError(f"vocab_size is {vocab_size}: give {MIN_VOCABULARY} (bytes and markers) or more")
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        alphabet = symbols + [symbol + WORD_END for symbol in symbols]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            show_progress=False,
            initial_alphabet=symbols,
            end_of_word_suffix=WORD_END,
        )
        engine.train_from_iterator(texts, trainer)
        merges = [(left, right) for left, right in json.loads(engine.to_str())["model"]["merges"]]
        merges = merges[: vocab_size - len(alphabet) - 2]
        tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), BOS, EOS])
        return cls({token: index for index, token in enumerate(tokens)}, merges, max_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read ``vocab.json``, ``merges.txt`` and, for the length, ``tokenizer_config.json``.

        Without the first two, ``tokenizer.json`` is read, which is all that newer transformers write.
        """
        folder = Path(folder)
        config = folder / "tokenizer_config.json"
        length = read_json(config).get("model_max_length", 77) if config.is_file() else 77
        if not isinstance(length, int) or length < 3:
            raise ModelError(f"{config}: model_max_length is {length!r}, expected 3 tokens or more")
        length = length if length < UNLIMITED else 77
        if not (folder / "merges.txt").exists() and (folder / "tokenizer.json").exists():
            return cls(*_from_tokenizer_json(folder / "tokenizer.json"), length)
        merges_file = folder / "merges.txt"
        try:
            lines = merges_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{merges_file} cannot be read: {error}") from error
        lines = [line for line in lines if line.strip() and not line.startswith("#version")]
        if bad := [line for line in lines if len(line.split()) != 2]:
            raise ModelError(f"{merges_file}: {bad[0]!r} is not a pair of symbols")
        merges = [(left, right) for left, right in map(str.split, lines)]
        return cls(read_json(folder / "vocab.json"), merges, length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers' ``CLIPTokenizer`` reads."""
        if self._meanings:
            raise UsageError("words were added to this tokenizer, which its files have no place for: save without them")
        folder = Path(folder)
        write_json(folder / "vocab.json", self.vocab)
        lines = [MERGES_HEADER, *(" ".join(pair) for pair in self.merges)]
        write_text(folder / "merges.txt", "\n".join(lines) + "\n")
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
        write_json(folder / "special_tokens_map.json", special)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.max_length}
        write_json(folder / "tokenizer_config.json", {**config, **special})

    def add_word(self, word: str, token_ids: Sequence[int]) -> None:
        """From now on ``word``, wherever it stands in a text, is these tokens; they are all of that word.

        Raises :class:`UsageError` for a word that the tokenizer has already.
        """
        self.refuse_known(word)
        self._engine.add_special_tokens([AddedToken(word, single_word=True, normalized=False)])
        spoken = self._engine.token_to_id(word)
        assert spoken is not None
        self._meanings[spoken] = tuple(token_ids)

    def refuse_known(self, word: str) -> None:
        """Raise :class:`UsageError` for a word that cannot be added."""
        known = any(self._engine.token_to_id(one) is not None for one in (word, f"{word.lower()}{WORD_END}"))
        if not word.strip() or known:
            raise UsageError(f"{word!r} is a token already, or nothing: give another word for what is added")

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids, each text cut or padded to ``max_length``: BOS, the text, EOS, and EOS as padding."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [self.padded([token.id for token in self.tokens(text)]) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.max_length)

    def padded(self, token_ids: Sequence[int]) -> list[int]:
        """Ids of a text between BOS and EOS, cut or padded with EOS to ``max_length``."""
        kept = list(token_ids)[: self.max_length - 2]
        return [self.vocab[BOS], *kept, *[self.eos] * (self.max_length - 1 - len(kept))]

    def tokens(self, text: str) -> list[Token]:
        """The tokens of a text, without BOS and EOS, however many there are."""
        encoding = self._engine.encode(text)
        return [
            Token(id=token_id, start=start, end=end)
            for spoken, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            for token_id in self._meanings.get(spoken, (spoken,))
        ]

    def words(self, text: str) -> Words:
        """The words of a text, to be asked for their tokens."""
        tokens = self.tokens(text)[: self.max_length - 2]
        return self.words_at(text, [(token, place + 1) for place, token in enumerate(tokens)], self.max_length)

    def words_at(self, text: str, tokens: Sequence[tuple[Token, int]], length: int) -> Words:
        """The words of a text whose tokens stand at these positions; of what has no token there is nothing.

        A word is what stands between spaces, less the punctuation around it.
        """
        spans, first = [], 0
        for match in WORD.finditer(text):
            start, end = match.span()
            while first < len(tokens) and tokens[first][0].end <= start:
                first += 1
            last = first
            while last < len(tokens) and tokens[last][0].start < end:
                last += 1
            if places := tuple(place for _, place in tokens[first:last]):
                spans.append(WordSpan(word=match.group(), start=start, end=end, tokens=places))
        return Words(text=text, spans=tuple(spans), end=(tokens[-1][1] if tokens else 0) + 1, length=length)


def _from_tokenizer_json(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a file of the ``tokenizers`` library."""
    content = read_json(file)
    try:
        model, added = content["model"], content.get("added_tokens", [])
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
        vocab = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        return vocab, [(left, right) for left, right in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} is not a byte-pair tokenizer's: {error!r}") from error


def _engine(model: models.BPE) -> Engine:
    engine = Engine(model)
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return engine
