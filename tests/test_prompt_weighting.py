"""Weights, long prompts, and words that were learned."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.conftest import fill_

from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import ModelError, UsageError
from gobelin.pipeline import Pipeline
from gobelin.prompt_weighting import chunked, encode, parse
from gobelin.tokenizer import Tokenizer

# What AUTOMATIC1111's `parse_prompt_attention` documents of itself.
A1111 = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.573),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("prompt", A1111)
def test_weights_are_read_as_documented(prompt: str) -> None:
    parts = parse(prompt, "a1111")
    assert [part.text for part in parts] == [text for text, _ in A1111[prompt]]
    assert [part.weight for part in parts] == pytest.approx([weight for _, weight in A1111[prompt]])


# As ComfyUI's `token_weights` reads them.
COMFYUI = {
    "a [red] (ring:2)": [("a [red] ", 1.0), ("ring", 2.0)],
    "((cat:1.3))": [("cat", 1.3)],
    "(a (b:0.5):2)": [("a ", 2.0), ("b", 0.5)],
    "((a) b)": [("a", 1.21), (" b", 1.1)],
    "(a b": [("(a b", 1.0)],
    "a) (b)": [("a) (b)", 1.0)],
    r"\(a\) (b\):1.5)": [("(a) ", 1.0), ("b)", 1.5)],
    "(a:b)": [("a:b", 1.1)],
    "": [("", 1.0)],
}


@pytest.mark.parametrize("prompt", COMFYUI)
def test_weights_are_read_as_in_comfyui(prompt: str) -> None:
    parts = parse(prompt, "comfyui")
    assert [part.text for part in parts] == [text for text, _ in COMFYUI[prompt]]
    assert [part.weight for part in parts] == pytest.approx([weight for _, weight in COMFYUI[prompt]])


def test_all_is_text_without_weights() -> None:
    assert [(part.text, part.weight) for part in parse("a [red] (ring:2)", "none")] == [("a [red] (ring:2)", 1)]


@given(st.text(alphabet="ab ,()[]\\:.1", max_size=40), st.sampled_from(["a1111", "comfyui", "none"]))
def test_any_text_is_read(prompt: str, style: str) -> None:
    assume(not re.search(r":\s*\d{3}", prompt))  # a weight of more than 100
    parts = parse(prompt, style)
    assert all(0 <= part.weight <= 100 for part in parts)
    said = [letter for letter in "".join(part.text for part in parts) if letter in "ab,"]
    assert said == [letter for letter in prompt if letter in "ab,"]
    if not set(prompt) & set("()[]\\"):
        assert "".join(part.text for part in parts) == prompt


@pytest.mark.parametrize("style", ["a1111", "comfyui", "none"])
def test_what_is_too_much_is_refused(style: str) -> None:
    for prompt, message in (("a" * 100_001, "100,001 characters long"), ("a \ud800", "half a character at place 2")):
        with pytest.raises(UsageError, match=message):
            parse(prompt, style)
    if style != "none":
        with pytest.raises(UsageError, match="brackets are more than 100 deep"):
            parse("(:" * 5_000 + "a" + ":1)" * 5_000, style)
    for prompt in ("(x:" + "1" * 50_000, "(a:" + " " * 50_000, "[(" * 40 + "\\" * 50_000, ":" * 50_000, "\0" * 9_000):
        parse(prompt, style)


def test_a_prompt_of_more_chunks_than_anyone_needs_is_refused(clip) -> None:
    with pytest.raises(UsageError, match="the prompt has 5,000 tokens: give 4,800 at most"):
        chunked(clip[0], "a " * 5_000)


def test_break_begins_a_chunk_in_a1111(clip) -> None:
    tokenizer, _ = clip
    chunks = chunked(tokenizer, "a red BREAK ring", "a1111")
    assert torch.equal(chunks.token_ids, torch.cat([tokenizer("a red"), tokenizer("ring")]))
    assert chunks.words.tokens("ring") == (78,)
    assert len(chunked(tokenizer, "a red BREAK ring", "comfyui").token_ids) == 1


@pytest.mark.parametrize("prompt", ["(a:1e308)", "(a:-1)", "(a:101)", "(" * 60 + "a" + ")" * 60])
def test_weights_without_measure_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match="weight"):
        parse(prompt)


@pytest.fixture(scope="module")
def clip() -> tuple[Tokenizer, TextEncoder]:
    """A tokenizer and a small text encoder with texts of CLIP's length."""
    tokenizer = Tokenizer.train(["a red ring, and a blue square"] * 5, vocab_size=540, max_length=77)
    config = TextEncoderConfig.of(32, layers=2, heads=2, vocab_size=len(tokenizer.vocab))
    with torch.device("meta"):
        encoder = TextEncoder(config)
    return tokenizer, fill_(encoder)


def embedded(clip, prompt: str, style: str) -> torch.Tensor:
    tokenizer, encoder = clip
    with torch.no_grad():
        return encode(encoder, chunked(tokenizer, prompt, style), encoder(tokenizer("")), style)


def test_what_has_no_weights_is_embedded_as_ever(clip) -> None:
    tokenizer, encoder = clip
    expected = encoder(tokenizer("a red ring"))[0]
    for prompt, style in (("a red ring", "a1111"), ("a (red:1.0) ring", "comfyui"), ("a red ring", "none")):
        assert torch.equal(embedded(clip, prompt, style), expected)


def test_weights_do_what_their_style_does(clip) -> None:
    tokenizer, encoder = clip
    expected, nothing = encoder(tokenizer("a red ring"))[0], encoder(tokenizer(""))[0]
    place = list(tokenizer.words("a red ring").tokens("red"))
    weights = torch.ones(77, 1)
    weights[place] = 1.5
    theirs = expected * weights
    theirs = theirs * (expected.mean() / theirs.mean())
    torch.testing.assert_close(embedded(clip, "a (red:1.5) ring", "a1111"), theirs)
    torch.testing.assert_close(embedded(clip, "a (red:1.5) ring", "comfyui"), nothing + (expected - nothing) * weights)


def test_long_prompts_go_on_in_chunks_that_end_after_a_comma(clip) -> None:
    tokenizer, _ = clip
    room = 75
    exact = chunked(tokenizer, " ".join(["a"] * room), "none")
    assert exact.token_ids.shape == (1, 77)
    more = chunked(tokenizer, " ".join(["a"] * (room + 1)), "none")
    assert more.token_ids.shape == (2, 77)
    assert more.cut == ""
    assert more.token_ids[1, 2:].eq(tokenizer.eos).all()
    assert [len(span.tokens) for span in more.words.spans] == [1] * 76
    assert more.words.spans[-1].tokens == (78,)

    prompt = " ".join([*["a"] * 64, "a,", *["red"] * 20])
    by_comma = chunked(tokenizer, prompt, "a1111")
    assert by_comma.token_ids[0, 67:].eq(tokenizer.eos).all(), "64 and one words, and the comma"
    assert by_comma.words.spans[65].tokens == (78,)
    assert chunked(tokenizer, prompt, "none").words.spans[65].tokens == (67,)
    full = chunked(tokenizer, " ".join([*["a"] * 60, ",", *["a"] * 14, ",", *["red"] * 20]), "a1111")
    assert full.token_ids[0, 76] == tokenizer.eos
    assert full.token_ids[0, 75] != tokenizer.eos, "a comma that comes first thing ends no chunk before it"


def test_comfyui_keeps_short_words_whole(clip) -> None:
    tokenizer, _ = clip
    word = "xyzw"  # four tokens, which the vocabulary does not know together
    count = len(tokenizer.tokens(word))
    assert 1 < count <= 8
    prompt = " ".join([*["a"] * 74, word])
    whole, cut = (chunked(tokenizer, prompt, style).words.spans[-1].tokens for style in ("comfyui", "none"))
    assert whole == tuple(range(78, 78 + count))
    assert cut == (75, *range(78, 78 + count - 1))
    comma = chunked(tokenizer, " ".join([*["a"] * 74, "red,"]), "comfyui")
    assert comma.words.spans[-1].tokens == (78,), "up to the next space"


def test_models_with_shorter_texts_say_what_is_cut() -> None:
    tokenizer = Tokenizer.train(["a red ring"], vocab_size=530, max_length=8)
    chunks = chunked(tokenizer, "a a a a a a (red:1.2) ring")
    assert chunks.token_ids.shape == (1, 8)
    assert chunks.cut == "red ring"
    assert [chunked(tokenizer, "a " * count).cut for count in (0, 6, 7, 8)] == ["", "", "a", "a a"]


def test_long_prompts_paint_and_their_words_are_found(oracle_folder) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    pipe.tokenizer.max_length = 77
    positions = pipe.text_encoder.text_model.embeddings.position_embedding
    positions.weight = torch.nn.Parameter(torch.randn(77, 64) * 0.1)
    prompt = " ".join(["red"] * 80) + " circle"
    result = pipe(prompt, steps=1, trace=True)
    assert result.heatmaps[0]["circle"].raw.shape == (64, 64)
    assert result.heatmaps[0].words.length == 154
    other = pipe(prompt.replace("circle", "square"), steps=1)
    assert not torch.equal(result.latents, other.latents), "the second chunk is heard"


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("layout", ["diffusers", "a1111", "nameless"])
def test_a_learned_word_is_diffusers(layout: str, vectors: int, make_oracle, oracle_folder, tmp_path: Path) -> None:
    learned = torch.randn(vectors, 64) * 0.3
    file = tmp_path / ("cat-toy.safetensors" if layout == "nameless" else "cat-toy.pt")
    content = learned[0] if vectors == 1 else learned
    if layout == "nameless":
        save_file({"emb_params": learned}, file)
    elif layout == "diffusers":
        torch.save({"<cat-toy>": content}, file)
    else:
        torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": learned}, "name": "x"}, file)
    theirs = make_oracle()
    theirs.load_textual_inversion(str(file), token="<cat-toy>")
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    assert pipe.load_textual_inversion(file, token="<cat-toy>", allow_pickle=True) == "<cat-toy>"
    prompt = "a red <cat-toy> circle"
    expected = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
    torch.testing.assert_close(pipe.encode_text([prompt]), expected, rtol=1e-4, atol=1e-5)
    assert len(pipe.words(prompt).tokens("cat-toy")) == vectors
    assert pipe(prompt, steps=1, trace=True).heatmaps[0]["cat-toy"].raw.max() > 0


def test_a_learned_word_that_does_not_fit_is_refused(oracle_folder, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    for tensors, error, message in (
        ({"<x>": torch.ones(2, 32)}, UsageError, "the vectors are 32 wide, and this text encoder's 64"),
        ({"<x>": torch.ones(2, 2, 64)}, ModelError, "expected vectors"),
        ({"<x>": torch.ones(64), "<y>": torch.ones(64)}, ModelError, "it holds 2 tensors"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(error, match=message):
            pipe.load_textual_inversion(tmp_path / "x.safetensors")
    save_file({"red</w>": torch.ones(64)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="is a token already"):
        pipe.load_textual_inversion(tmp_path / "x.safetensors")
    save_file({"<x>": torch.full((64,), torch.nan)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        pipe.load_textual_inversion(tmp_path / "x.safetensors")
    save_file({"red": torch.ones(64)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="'red' is a token already"):
        pipe.load_textual_inversion(tmp_path / "x.safetensors")
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer.vocab)


def test_learned_words_stand_alone_and_are_not_saved(oracle_folder, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    before = pipe.tokenizer("a string")
    save_file({"emb_params": torch.ones(2, 64)}, tmp_path / "rin.safetensors")
    pipe.load_textual_inversion(tmp_path / "rin.safetensors")
    assert torch.equal(pipe.tokenizer("a string"), before)
    assert not torch.equal(pipe.tokenizer("a rin"), before)
    with pytest.raises(UsageError, match="words were added to this tokenizer"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model_index.json").exists()
