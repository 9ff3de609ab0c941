"""The tokenizer against transformers' CLIPTokenizer, over the folder that ours saves."""

import json
import random
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.conftest import sentence_of
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from gobelin.errors import ModelError, UsageError
from gobelin.tokenizer import BOS, EOS, Tokenizer

CORPUS = [
    "a red circle above a blue square",
    "the blue circle isn't left of the yellow triangle, it's right of it",
    "two small stars and 35 large crosses on a light-grey background",
    "un carré vert à côté d'une étoile; ein größeres Dreieck",
] * 3
LENGTH = 16

words = st.text(st.characters(categories=("L", "N")) | st.sampled_from("aeiourstlnd"), min_size=1, max_size=12)
prompts = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*" ".join(CORPUS).split(), BOS, EOS, "</w>", "<|endoftext|", "  ", "\t", "\n"])).map(
        " ".join
    ),
    st.lists(words, max_size=30).map(" ".join),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=600, max_length=LENGTH)


@pytest.fixture(scope="module")
def roomy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=1000)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What tokens say, their bytes put together, with spaces between words."""
    names = {index: token for token, index in tokenizer.vocab.items()}
    # The alphabet lists the bytes that print first, as GPT-2's table does.
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    byte_of = {chr(byte): byte for byte in printing} | {chr(256 + n): byte for n, byte in enumerate(others)}
    text = b"".join(
        bytes(byte_of[symbol] for symbol in names[index].removesuffix("</w>"))
        + (b" " if names[index].endswith("</w>") else b"")
        for index in ids
    )
    return text.decode("utf-8")


@given(text=prompts)
@example(text="")
@example(text="A  RED\tcircle\n")
@example(text=f"{BOS}a {EOS} b{EOS}")
@example(text="a red circle above a blue square " * 20)
@example(text="日本の猫 🐈")
@example(text="ÉTOILE e\u0301toile ﬁn")
@example(text="İstanbul ΣΊΣΥΦΟΣ")
@example(text="\x00\x07 a\u00a0b\u2003c\u200bd")
def test_any_text_has_the_ids_that_transformers_gives_it(
    tokenizer: Tokenizer, oracle: CLIPTokenizer, text: str
) -> None:
    expected = oracle(text, padding="max_length", truncation=True).input_ids
    assert tokenizer(text).tolist() == [expected]


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", "a red circle", "a red circle above a blue square " * 3]
    batch = tokenizer(texts)
    assert batch.shape == (3, LENGTH)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, torch.cat([tokenizer(text) for text in texts]))
    assert tokenizer([]).shape == (0, LENGTH)


def test_ids_are_bos_the_text_eos_and_eos_as_padding(tokenizer: Tokenizer) -> None:
    bos, eos = tokenizer.vocab[BOS], tokenizer.vocab[EOS]
    (ids,) = tokenizer("red circle").tolist()
    assert ids == [bos, tokenizer.vocab["red</w>"], tokenizer.vocab["circle</w>"], *[eos] * (LENGTH - 3)]
    (long,) = tokenizer("red " * 50).tolist()
    assert long == [bos, *[tokenizer.vocab["red</w>"]] * (LENGTH - 2), eos]


def test_every_byte_is_in_the_vocabulary_within_and_at_the_end_of_a_word() -> None:
    small = Tokenizer.train(["a a a b"], vocab_size=514)
    symbols = pre_tokenizers.ByteLevel.alphabet()
    assert len(symbols) == 256
    assert small.vocab.keys() == {*symbols, *(f"{symbol}</w>" for symbol in symbols), BOS, EOS}
    assert sorted(small.vocab.values()) == list(range(514))
    assert (small.vocab[BOS], small.vocab[EOS]) == (512, 513)
    assert small.vocab[EOS] not in small("".join(map(chr, range(33, 300))))[0, :-1]


def test_training_fills_the_vocabulary_up_to_its_size_with_merges(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.vocab) == 600
    assert len(tokenizer.merges) == 600 - 514
    assert (tokenizer.vocab[BOS], tokenizer.vocab[EOS]) == (598, 599)


@given(text=st.lists(words, max_size=20).map(" ".join))
@example(text="A light-grey circle, isn't it (or “it's”)?")
@example(text="snake_case _private 3.5 x")
def test_the_tokens_of_a_word_spell_that_word(roomy: Tokenizer, text: str) -> None:
    (ids,) = roomy(text).tolist()
    spans = roomy.words(text).spans
    for span in spans:
        assert text[span.start : span.end] == span.word
        spelling = spelled(roomy, [ids[position] for position in span.tokens])
        assert spelling.replace(" ", "") == unicodedata.normalize("NFC", span.word).lower()
    if text.replace(" ", "").isalnum():
        assert [span.word for span in spans] == text.split()


def test_spans_are_the_words_without_punctuation_and_count_from_bos(roomy: Tokenizer) -> None:
    text = 'The RED circle, "light-grey" (isn\'t)'
    (ids,) = roomy(text).tolist()
    spans = roomy.words(text).spans
    assert [span.word for span in spans] == ["The", "RED", "circle", "light-grey", "isn't"]
    assert [span.tokens for span in spans[:3]] == [(1,), (2,), (3,)]
    assert [spelled(roomy, [ids[position] for position in span.tokens]) for span in spans[3:]] == [
        "light - grey ",
        "isn 't ",
    ]


def test_spans_leave_out_the_words_that_are_cut_off(tokenizer: Tokenizer) -> None:
    spans = tokenizer.words("red " * 50).spans
    assert [span.tokens for span in spans] == [(position,) for position in range(1, LENGTH - 1)]


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match="vocab_size is 500: give 514"):
        Tokenizer.train(CORPUS, 500)


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, folder: Path) -> None:
    again = Tokenizer.from_pretrained(folder)
    assert (again.vocab, again.merges, again.max_length) == (tokenizer.vocab, tokenizer.merges, LENGTH)
    assert torch.equal(again(CORPUS), tokenizer(CORPUS))


def test_a_folder_that_transformers_saved_opens_here(
    oracle: CLIPTokenizer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    oracle.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.max_length == LENGTH
    assert torch.equal(again(CORPUS), tokenizer(CORPUS))


def rewrite(folder: Path, **files: str) -> Path:
    Tokenizer.train(CORPUS, 514).save_pretrained(folder)
    for name, text in files.items():
        (folder / f"{name}.{'txt' if name == 'merges' else 'json'}").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab": json.dumps({"a": 0})}, r"lacks '<\|startoftext\|>'"),
        ({"vocab": json.dumps({BOS: 0})}, r"lacks '<\|endoftext\|>'"),
        ({"vocab": "not JSON"}, "vocab.json cannot be read"),
        ({"merges": "#version: 0.2\na b c\n"}, "merges.txt: 'a b c' is not a pair"),
    ],
)
def test_files_that_are_no_clip_tokenizer_are_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_pretrained(rewrite(tmp_path, **files))


def test_a_model_has_its_tokenizer_in_a_folder_of_its_own(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "tokenizer")
    assert torch.equal(Tokenizer.from_pretrained(tmp_path)(CORPUS), tokenizer(CORPUS))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ModelError, match=r"has no tokenizer: expected tokenizer\.json in it, or vocab\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (rewrite(tmp_path) / name).unlink()
    with pytest.raises(ModelError, match=name):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red circle,blue square", ["a", "red", "circle", "blue", "square"]),
        ("e\u0301toile, nai\u0308ve", ["e\u0301toile", "nai\u0308ve"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ภาษาไทย สวย", ["ภาษาไทย", "สวย"]),
        ("赤い円、青い四角。", ["赤い円", "青い四角"]),
        ("「猫」と犬", ["猫", "と犬"]),
        ("قطة حمراء، كلب", ["قطة", "حمراء", "كلب"]),
        ("🐈 🐕‍🦺, a cat", ["🐈", "🐕‍🦺", "a", "cat"]),
        ("light-grey, isn't 3.5 x", ["light-grey", "isn't", "3.5", "x"]),
        ("(a)[b]{c}<d>|e;f", ["a", "b", "c", "d", "e", "f"]),
        ("“red” „blue“ «vert»", ["red", "blue", "vert"]),
        ("... ,,, !!", []),
    ],
)
def test_words_of_every_script_and_style(roomy: Tokenizer, text: str, words: list[str]) -> None:
    found = roomy.words(text)
    assert [span.word for span in found.spans] == words
    taken = [token for span in found.spans for token in span.tokens]
    assert len(taken) == len(set(taken)), "no token is two words'"
    assert all(found.kinds[token] == "text" for token in taken)


@given(text=st.lists(words, max_size=60).map(" ".join), room=st.integers(1, 20), longer=st.integers(0, 30))
def test_kinds_name_every_position_of_every_chunk(tokenizer: Tokenizer, text: str, room: int, longer: int) -> None:
    tokens = tokenizer.tokens(text)
    room = min(room, tokenizer.max_length - 2)
    groups = [tokens[at : at + room] for at in range(0, max(1, len(tokens)), room)]
    found = tokenizer.words_of(text, groups).at_length(len(groups) * LENGTH + longer)
    assert found.length == len(found.kinds) == len(groups) * LENGTH + longer
    assert [list(chunk) for chunk in found.chunks()] == [
        list(range(number * LENGTH, (number + 1) * LENGTH)) for number in range(len(groups))
    ]
    places = [place for kind in ("bos", "text", "eos", "padding", "masked") for place in found.part(kind)]
    assert sorted(places) == list(range(found.length))
    assert len(found.part("bos")) == len(found.part("eos")) == len(groups)
    assert len(found.part("text")) == len(tokens)
    assert len(found.part("masked")) == longer


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("cat", "'cat' is not in the prompt, whose words are a, red, circle"),
        ("", "'' is not in the prompt"),
        (3, "there is no word number 3: the prompt has 3"),
        (-4, "there is no word number -4"),
        (("red", 1), "'red' occurs 1 times"),
        (2.5, "give"),
        (None, "give"),
        (("red",), "give"),
        (("red", "0"), "give"),
        (["red"], "give"),
        (True, "give"),
    ],
)
def test_words_that_are_not_there_are_said(roomy: Tokenizer, key, message: str) -> None:
    found = roomy.words("a red circle")
    with pytest.raises(UsageError, match=message) as raised:
        found.tokens(key)
    assert "\n" not in str(raised.value)


NEW = 600  # the first number beyond the vocabulary


def as_tokenizer_json(folder: Path, added: list[dict]) -> None:
    """Put ``tokenizer.json`` in the place of the vocabulary's two files, as transformers 5 saves."""
    file = folder / "tokenizer.json"
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.save(str(file))
    content = json.loads(file.read_text())
    content["added_tokens"] += added
    file.write_text(json.dumps(content))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def rewrite_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | fields))


def flags(content: str, **said: bool) -> dict:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"content": content, **plain, **said}


def decoder(*tokens: dict) -> dict:
    markers = [flags(BOS, normalized=False, special=True), flags(EOS, normalized=False, special=True)]
    return {str(NEW - 2 + place): token for place, token in enumerate((*markers, *tokens))}


ADDED = {
    "added_tokens.json": lambda f: rewrite_json(f / "added_tokens.json", **{"<sks-cat>": NEW, "Zxq": NEW + 1}),
    "special and numbered": lambda f: (
        rewrite_json(f / "added_tokens.json", **{"<sks-cat>": NEW}),
        rewrite_json(f / "special_tokens_map.json", additional_special_tokens=["<sks-cat>", "Zxq"]),
    ),
    "tokenizer.json": lambda f: as_tokenizer_json(
        f, [flags("<sks-cat>") | {"id": NEW}, flags("Zxq", normalized=False) | {"id": NEW + 1}]
    ),
    "decoder": lambda f: rewrite_json(
        f / "tokenizer_config.json", added_tokens_decoder=decoder(flags("<sks-cat>"), flags("Zxq"))
    ),
    "decoder and others, which do not count": lambda f: (
        rewrite_json(f / "tokenizer_config.json", added_tokens_decoder=decoder(flags("<sks-cat>"))),
        rewrite_json(f / "added_tokens.json", Zxq=NEW + 7),
    ),
    "decoder beside tokenizer.json": lambda f: (
        as_tokenizer_json(f, [flags("<sks-cat>", normalized=False) | {"id": NEW}]),
        rewrite_json(f / "tokenizer_config.json", added_tokens_decoder=decoder(flags("<sks-cat>", lstrip=True))),
    ),
    "single words": lambda f: rewrite_json(
        f / "tokenizer_config.json",
        added_tokens_decoder=decoder(flags("zxq", single_word=True), flags("<sks-cat>", normalized=False, rstrip=True)),
    ),
    "a marker that is normalised": lambda f: rewrite_json(
        f / "tokenizer_config.json", added_tokens_decoder={str(NEW - 1): flags(EOS, special=True)} | {}
    ),
    "special tokens as objects": lambda f: rewrite_json(
        f / "special_tokens_map.json", bos_token=flags(BOS), eos_token=flags(EOS, lstrip=True), pad_token=EOS
    ),
    "objects in the configuration": lambda f: (
        (f / "special_tokens_map.json").unlink(),
        rewrite_json(
            f / "tokenizer_config.json",
            eos_token=flags(EOS, rstrip=True) | {"__type": "AddedToken"},
            extra_special_tokens=["zxq"],
        ),
    ),
    "a word of the vocabulary": lambda f: rewrite_json(f / "special_tokens_map.json", mask_token="red</w>"),
}
TEXTS = [
    "<sks-cat>",
    "a <sks-cat> in red",
    "red <sks-cat>",
    "<sks-cat><sks-cat> x",
    "a<sks-cat>b",
    "<SKS-CAT>, <Sks-Cat>!",
    "zxq Zxq ZXQ zxqs rezxq zxq, (zxq) zxq1",
    f"{BOS} a {EOS} b {EOS.upper()}c",
    "red</w> square",
    "  <sks-cat>  \n zxq\t",
    "",
]


@pytest.fixture(params=ADDED)
def with_added(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    """The folder with tokens added in one of the ways that files have."""
    copy = tmp_path / "added"
    shutil.copytree(folder, copy)
    ADDED[request.param](copy)
    return copy


def test_added_tokens_are_those_of_transformers_wherever_files_have_them(with_added: Path, tmp_path: Path) -> None:
    theirs, ours = CLIPTokenizer.from_pretrained(with_added), Tokenizer.from_pretrained(with_added)
    ours.save_pretrained(tmp_path / "again")
    theirs_again = CLIPTokenizer.from_pretrained(tmp_path / "again")
    ours_again = Tokenizer.from_pretrained(tmp_path / "again")
    drawn = random.Random(0)
    parts = [*" ".join(TEXTS).split(" "), " ", "", "é"]
    for text in [*TEXTS, *("".join(drawn.choices(parts, k=5)) for _ in range(300))]:
        expected = theirs(text, padding="max_length", truncation=True).input_ids
        assert ours(text).tolist() == [expected], text
        assert theirs_again(text, padding="max_length", truncation=True).input_ids == expected, text
        assert ours_again(text).tolist() == [expected], text
    assert ours.vocab == theirs.get_vocab() == ours_again.vocab


def test_an_added_token_is_one_word(with_added: Path) -> None:
    ours = Tokenizer.from_pretrained(with_added)
    if "<sks-cat>" in ours.vocab:
        found = ours.words("a red <sks-cat>, and <sks-cat>")
        assert [span.word for span in found.spans] == ["a", "red", "sks-cat", "and", "sks-cat"]
        assert found.tokens("<sks-cat>") == found.tokens("sks-cat")
        assert len(found.tokens("<sks-cat>")) == 2


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("added_tokens.json", {"<x>": NEW + 5}, "'<x>' has the number 605, and transformers gives it 600"),
        ("added_tokens.json", {"red</w>": NEW}, r"'red</w>' has the number 600, and transformers gives it \d+"),
        ("added_tokens.json", {"<x>": -1}, "the number of an added token is -1"),
        ("added_tokens.json", {"<x>": 10**30}, "the number of an added token is 10"),
        ("added_tokens.json", {"<x>": True}, "the number of an added token is True"),
        ("added_tokens.json", {"x" * 1001: NEW}, "expected text of 1 to 1,000 characters"),
        ("added_tokens.json", {"": NEW}, "expected text of 1 to"),
        ("added_tokens.json", {"\ud800": NEW}, "expected text of 1 to"),
        ("added_tokens.json", {str(one): NEW + one for one in range(10_001)}, "has 10,001 added tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\], expected an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": flags("a")}}, "the number of an added token is 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"600": 3}}, "an added token is 3"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"600": flags("a") | {"lstrip": 1}}}, "lstrip of 'a' is 1"),
        ("tokenizer_config.json", {"extra_special_tokens": 7}, "its added tokens are 7, expected a list"),
        ("special_tokens_map.json", {"pad_token": "!"}, "pad_token is '!', and a CLIP tokenizer's is"),
        ("special_tokens_map.json", {"bos_token": {"content": "<s>"}}, "bos_token is '<s>'"),
    ],
)
def test_added_tokens_that_mean_nothing_are_refused(
    file: str, fields: dict, message: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rewrite_json(tmp_path / file, **fields)
    said = sentence_of(lambda: Tokenizer.from_pretrained(tmp_path))
    assert said is not None
    assert re.search(message, said)
    assert str(tmp_path) in said


def test_marks_of_byte_order_are_read_and_pointers_of_git_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("merges.txt", "vocab.json", "tokenizer_config.json"):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert torch.equal(Tokenizer.from_pretrained(tmp_path)(CORPUS), Tokenizer.from_pretrained(folder)(CORPUS))
    for name in ("merges.txt", "vocab.json"):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("written", ["EasyNegative", "easynegative", "EASYNEGATIVE", "easyNegative,", "(easynegative)"])
@pytest.mark.parametrize("around", ["a red {} x", "{}", "{} red", "red,{}", "red {}2", "red -{}-"])
def test_a_word_that_was_learned_is_found_in_any_case(tokenizer: Tokenizer, written: str, around: str) -> None:
    learning = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=77)
    learning.add_word("EasyNegative", [700, 701])
    text = around.format(written)
    plain = [token.id for token in tokenizer.tokens(text.replace(written.strip("(),"), " "))]
    learned = [token.id for token in learning.tokens(text)]
    assert [one for one in learned if one < 700] == plain
    assert [one for one in learned if one >= 700] == [700, 701]
    (span,) = learning.words(text).find("easynegative")
    assert span.word == written.strip("(),")


@pytest.mark.parametrize("text", ["easynegatives", "uneasynegative", "easy negative", "easynegativ", "easynegativé"])
def test_other_words_are_not_the_learned_one(tokenizer: Tokenizer, text: str) -> None:
    learning = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=77)
    learning.add_word("EasyNegative", [700])
    learning.add_word("easynegativ\u0065\u0301x", [701])
    assert [one.id for one in learning.tokens(text)] == [one.id for one in tokenizer.tokens(text)]


def test_the_longest_learned_word_counts_and_any_form_of_it(tokenizer: Tokenizer) -> None:
    learning = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=77)
    for number, word in enumerate(("bad-hands", "bad-hands-5", "My Style, v2", "étoile-1", "***", "<cat>", "İx")):
        learning.add_word(word, [700 + number])
    for text, ids, words in (
        ("bad-hands-5 Bad-Hands bad-hands-6", [701, 700, 700], ["bad-hands-5", "Bad-Hands", "bad-hands", "6"]),
        ("a my  style,\nV2!", [702], ["a", "my  style,\nV2"]),
        ("e\u0301toile-1", [703], ["e\u0301toile-1"]),
        ("***, <CAT>", [704, 705], ["***", "CAT"]),
    ):
        found = learning.words(text)
        assert [token.id for token in learning.tokens(text) if token.id >= 700] == ids
        assert [span.word for span in found.spans] == words
        assert found.find(words[-1]) == [found.spans[-1]]
    assert learning.words("my style, v2").has("My style v2")
    assert not learning.words("my style, v2").has("style")
    learning.remove_word("My Style, v2")
    assert [span.word for span in learning.words("my style, v2").spans] == ["my", "style", "v2"]


@pytest.mark.parametrize("word", ["", "  ", "red", "RED", BOS, "x" * 1001, "easynegative"])
def test_words_that_cannot_be_learned_are_refused(tokenizer: Tokenizer, word: str) -> None:
    learning = Tokenizer(tokenizer.vocab, tokenizer.merges, max_length=77)
    learning.add_word("EasyNegative", [700])
    said = sentence_of(lambda: learning.add_word(word, [701]))
    assert said is not None
    assert "renaming its file or as token=" in said or "characters" in said


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["x" * 2000, "\ud800", EOS, "red</w>", "600", str(NEW)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*flags(""), "600", "x"]), inner),
    max_leaves=4,
)


@given(
    data=st.data(),
    file=st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"]),
)
def test_odd_values_in_any_file_are_read_or_refused_in_a_sentence(
    data: st.DataObject, file: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("odd") / "tokenizer"
    shutil.copytree(folder, copy)
    names = [
        "added_tokens_decoder",
        "extra_special_tokens",
        "eos_token",
        "pad_token",
        "mask_token",
        "additional_special_tokens",
    ]
    names = {"added_tokens.json": ["<x>", "red</w>", ""], "tokenizer.json": ["added_tokens", "model"]}.get(file, names)
    if file == "tokenizer.json":
        as_tokenizer_json(copy, [])
    value = data.draw(odd | st.dictionaries(st.sampled_from(["599", "600", "601", "-1"]), odd, max_size=2))
    rewrite_json(copy / file, **{data.draw(st.sampled_from(names)): value})
    said = sentence_of(lambda: Tokenizer.from_pretrained(copy).tokens("a red <x> x"))
    assert said is None or str(copy) in said
