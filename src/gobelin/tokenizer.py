"""Prompt to token ids.

Byte-pair encoding as CLIP has it (Radford et al. 2021, section 2.4), run by the ``tokenizers`` library: lower
case, 256 byte symbols, words that end in ``</w>``, BOS first, then EOS as end and padding.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor

from gobelin.errors import ModelError, UsageError
from gobelin.formats.tokenizer_files import (
    BOS,
    EOS,
    LONGEST_ADDED,
    MIN_VOCABULARY,
    read_tokenizer_files,
    refuse_other_vocabulary,
    write_tokenizer_files,
)
from gobelin.validation import shown
from gobelin.words import Token, TokenKind, Words, WordSpan, is_spoken, split_words

WORD_END = "</w>"
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_LETTER, _MARK = r"[^\W\d_]", r"[\u0300-\u036f]"  # marks follow the letter that they change


class Tokenizer:
    """A byte-pair tokenizer of CLIP's kind, loaded from ``vocab.json`` and ``merges.txt`` or trained on texts."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        max_length: int = 77,
        added: Sequence[AddedToken] = (),
    ):
        """Make the tokenizer of a vocabulary, its merges, and what is ``added`` to it, in that order.

        What is added is found in a text before anything else, as transformers' ``CLIPTokenizer`` finds it, and has the
        next free ids; ``vocab`` holds it afterwards.
        """
        self.merges = list(merges)
        self.max_length = max_length
        try:
            self._engine = _engine(models.BPE(vocab, self.merges, end_of_word_suffix=WORD_END, unk_token=EOS))
            said = [token.content for token in added]
            plain = [AddedToken(token, special=True) for token in (BOS, EOS) if token in vocab and token not in said]
            self._engine.add_tokens([*plain, *added])  # of a token that comes twice, the last one's flags count
        except Exception as error:  # the library's own, of no particular type
            what = " ".join(str(error)[:200].split())
            raise ModelError(f"the vocabulary and the merges do not make a tokenizer: {what}") from error
        self._added = self._engine.get_added_tokens_decoder()
        self._own = vocab
        self.vocab = vocab | {token.content: number for number, token in self._added.items()}
        refuse_other_vocabulary(self.vocab)
        self._learned: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, str] = {}
        self._find_learned()

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

    def own_words(self) -> list[str]:
        """List the words that were added to the vocabulary, but for those that begin and end a text."""
        return [token.content for token in self._added.values() if token.content not in (BOS, EOS)]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a tokenizer's folder as transformers' ``CLIPTokenizer`` does (``tokenization_utils_base.py``).

        The vocabulary and the merges are those of ``tokenizer.json`` where there is one, and of ``vocab.json`` and
        ``merges.txt`` where not; added tokens stand in ``tokenizer_config.json``, or in ``special_tokens_map.json``,
        ``added_tokens.json`` and ``tokenizer.json``. Raises :class:`ModelError` that names the file and what is wrong.
        """
        files = read_tokenizer_files(Path(folder))
        try:
            tokenizer = cls(files.vocab, files.merges, files.max_length, files.added)
        except ModelError as error:
            raise ModelError(f"{files.source}: {error}") from error
        for content, (number, where) in files.numbers.items():
            if tokenizer.vocab[content] != number:
                raise ModelError(
                    f"{where}: {shown(content)} has the number {number}, and transformers gives it "
                    f"{tokenizer.vocab[content]}: which row of the text encoder was trained for it cannot be told"
                )
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers' ``CLIPTokenizer`` reads."""
        self.refuse_learned()
        write_tokenizer_files(Path(folder), self._own, self.merges, self.max_length, self._added)

    def add_word(self, word: str, token_ids: Sequence[int], file_name: str | None = None) -> None:
        """From now on ``word``, wherever it stands in a text, is these tokens; they are all of that word.

        Case does not matter, as in AUTOMATIC1111's web UI, which compares the tokens of lower case
        (``modules/textual_inversion/textual_inversion.py``); letters beside the word make it another one.
        ``file_name`` is what ComfyUI calls it. Raises :class:`UsageError` for a word that the tokenizer has already.
        """
        self.refuse_known(word)
        self._learned[_folded(word)] = tuple(token_ids)
        self._files[_folded(file_name or word)] = word
        self._find_learned()

    def remove_word(self, word: str) -> None:
        """Take a word out again that :meth:`add_word` added."""
        del self._learned[_folded(word)]
        self._files = {name: one for name, one in self._files.items() if one != word}
        self._find_learned()

    def refuse_learned(self) -> None:
        """Raise :class:`UsageError` where :meth:`add_word` has added words, which a model's files have no place for."""
        if self._learned:
            words = ", ".join(map(repr, self._learned))
            raise UsageError(
                f"this model has learned words loaded ({words}), which its files have no place for: open it anew "
                "without them, and save that"
            )

    @property
    def first_free(self) -> int:
        """The number after those of all tokens and added words."""
        return 1 + max(max(self.vocab.values()), *(max(ids) for ids in self._learned.values()), -1)

    def knows(self, word: str) -> bool:
        """Tell whether a word is one token already, or was added."""
        tokens = (word, f"{word.lower()}{WORD_END}")
        return _folded(word) in self._learned or any(self._engine.token_to_id(one) is not None for one in tokens)

    def refuse_known(self, word: str) -> None:
        """Raise :class:`UsageError` for a word that cannot be added."""
        if len(word) > LONGEST_ADDED:
            raise UsageError(f"a word of {len(word):,} characters was to be added: give {LONGEST_ADDED:,} at most")
        if not word.strip() or self.knows(word):
            raise UsageError(
                f"{word!r} is a token already, or nothing: give what is added another word, by renaming its file or as "
                "token="
            )

    def find_by_file(self, name: str) -> str:
        """Find the added word that ComfyUI calls ``embedding:NAME``: by its file's name, or its own.

        Folders and a file's suffix are left out, and case does not matter. Raises :class:`UsageError` for none.
        """
        stem = re.split(r"[\\/]", name)[-1]
        for suffix in ("", ".safetensors", ".pt", ".bin"):
            key = _folded(stem.removesuffix(suffix))
            if key in self._files:
                return self._files[key]
            if key in self._learned:
                return stem.removesuffix(suffix)
        there = shown(", ".join(self._files.values())) if self._files else "none"
        raise UsageError(
            f"the prompt has {shown(f'embedding:{name}')}, and no such embedding is loaded (loaded: {there}): give its "
            "file to load_textual_inversion (--inversion)"
        )

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
        tokens: list[Token] = []
        start = 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            tokens += self._plain_tokens(text, start, found.start())
            start = found.end()
            ids = self._by_length[(found.lastindex or 0) - 1]
            tokens += [Token(id=one, start=found.start(), end=start, whole=True) for one in ids]
        return tokens + self._plain_tokens(text, start, len(text))

    def _find_learned(self) -> None:
        """Compile what finds the added words in a text, the longest first, one group each.

        A word that begins or ends with a letter is none beside other letters, as CLIP's pieces are of letters alone.
        """
        groups = []
        words = sorted(self._learned, key=len, reverse=True)
        for word in words:
            forms = {word, unicodedata.normalize("NFD", word)}
            body = "|".join(r"\s+".join(map(re.escape, form.split(" "))) for form in forms)
            before = rf"(?<!{_LETTER})" if word[0].isalpha() else ""
            after = rf"(?!{_LETTER}|{_MARK})" if word[-1].isalpha() else ""
            groups.append(f"{before}({body}){after}")
        self._by_length = [self._learned[word] for word in words]
        self._pattern = re.compile("|".join(groups), re.IGNORECASE) if groups else None

    def _plain_tokens(self, text: str, start: int, end: int) -> list[Token]:
        """The tokens of ``text[start:end]``, in which no added word is."""
        encoding = self._engine.encode(text[start:end])
        return [
            Token(id=number, start=start + first, end=start + last, whole=number in self._added)
            for number, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def words(self, text: str) -> Words:
        """Find the words of a plain text, and their tokens, in one chunk.

        A prompt as people write it, long or with weights, has its words in :meth:`gobelin.Pipeline.words`.
        """
        return self.words_of(text, [self.tokens(text)[: self.max_length - 2]])

    def words_of(self, text: str, chunks: Sequence[Sequence[Token]], borders: Collection[int] = ()) -> Words:
        """Find the words of a text whose tokens were put into chunks of ``max_length`` each.

        Words end at ``borders`` too, where weights change. A word without a token is left out.
        """
        kinds: list[TokenKind] = []
        placed: list[tuple[Token, int]] = []
        for number, chunk in enumerate(chunks):
            placed += [(token, number * self.max_length + 1 + place) for place, token in enumerate(chunk)]
            kinds.append("bos")
            kinds.extend("text" for _ in chunk)
            kinds.append("eos")
            kinds.extend("padding" for _ in range(self.max_length - 2 - len(chunk)))
        spans, first = [], 0
        whole = sorted({(token.start, token.end) for token, _ in placed if token.whole})
        for word, start, end in _split_around(text, borders, whole):
            while first < len(placed) and placed[first][0].end <= start:
                first += 1
            last = first
            while last < len(placed) and placed[last][0].start < end:
                last += 1
            if positions := tuple(place for _, place in placed[first:last]):
                spans.append(WordSpan(word=word, start=start, end=end, tokens=positions))
        return Words(text=text, spans=tuple(spans), kinds=tuple(kinds))


def _split_around(
    text: str, borders: Collection[int], whole: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, int, int]]:
    """Split a text as :func:`split_words` does, but for what is ``whole``, which is a word each."""
    after = 0
    for start, end in (*whole, (len(text), len(text))):
        for word, first, last in split_words(text[after:start], [border - after for border in borders]):
            yield word, after + first, after + last
        after = end
        if start < end:
            word = text[start:end].strip()
            spoken = [place for place, character in enumerate(word) if is_spoken(character)] or [0, len(word) - 1]
            first = start + text[start:end].index(word)
            yield word[spoken[0] : spoken[-1] + 1], first + spoken[0], first + spoken[-1] + 1


def _folded(word: str) -> str:
    """Fold a word's case, spaces and Unicode form, as CLIP's normaliser does."""
    return " ".join(unicodedata.normalize("NFC", word).lower().split())


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
