"""Prompt weighting: weights as AUTOMATIC1111 and ComfyUI read them, and what of other tools' syntax is refused."""

import re
from itertools import islice

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.conftest import sentence_of

from gobelin.errors import UsageError
from gobelin.prompt_weighting import (
    LoraTag,
    PromptSyntax,
    extract_lora_tags,
    find_foreign_syntax,
    in_a1111_syntax,
    parse_weights,
)

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
    parts = parse_weights(prompt, "a1111")
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
    "a cat, ((best:1.3)": [("a cat, ", 1.0), ("(best", 1.3)],
    "((a)": [("(a", 1.1)],
    "": [("", 1.0)],
}


@pytest.mark.parametrize("prompt", COMFYUI)
def test_weights_are_read_as_in_comfyui(prompt: str) -> None:
    parts = parse_weights(prompt, "comfyui")
    assert [part.text for part in parts] == [text for text, _ in COMFYUI[prompt]]
    assert [part.weight for part in parts] == pytest.approx([weight for _, weight in COMFYUI[prompt]])


def test_all_is_text_without_weights() -> None:
    assert [(part.text, part.weight) for part in parse_weights("a [red] (ring:2)", "none")] == [("a [red] (ring:2)", 1)]


@given(st.text(alphabet="ab ,()[]\\:.1", max_size=40), st.sampled_from(["a1111", "comfyui", "none"]))
def test_any_text_is_read(prompt: str, syntax: str) -> None:
    assume(not re.search(r":\s*\d{3}", prompt))  # a weight of more than 100
    assume(not any(find_foreign_syntax(prompt, syntax)))  # refused
    parts = parse_weights(prompt, syntax)
    assert all(0 <= part.weight <= 100 for part in parts)
    said = [letter for letter in "".join(part.text for part in parts) if letter in "ab,"]
    assert said == [letter for letter in prompt if letter in "ab,"]
    if not set(prompt) & set("()[]\\"):
        assert "".join(part.text for part in parts) == prompt


@pytest.mark.parametrize("syntax", ["a1111", "comfyui", "none"])
def test_what_is_too_much_is_refused(syntax: str) -> None:
    for prompt, message in (("a" * 100_001, "100,001 characters long"), ("a \ud800", "half a character at place 2")):
        with pytest.raises(UsageError, match=message):
            parse_weights(prompt, syntax)
    if syntax != "none":
        with pytest.raises(UsageError, match="brackets are more than 100 deep"):
            parse_weights("(:" * 5_000 + "a" + ":1)" * 5_000, syntax)
    for prompt in ("(x:" + "1" * 50_000, "(a:" + " " * 50_000, "[(" * 40 + "\\" * 50_000, ":" * 50_000, "\0" * 9_000):
        parse_weights(prompt, syntax)


@pytest.mark.parametrize("prompt", ["(a:999999)", "(a:-1)", "(a:101)", "(" * 60 + "a" + ")" * 60])
def test_weights_without_measure_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match="weight"):
        parse_weights(prompt)


@pytest.mark.parametrize(
    ("prompt", "found", "syntaxes"),
    [
        ("a [cat:dog:0.5] here", "[cat:dog:0.5]", ("a1111", "comfyui")),
        ("a [cat:10]", "[cat:10]", ("a1111", "comfyui")),
        ("[cat::.3]", "[cat::.3]", ("a1111", "comfyui")),
        ("[(cat:1.2):dog:5]", "[(cat:1.2):dog:5]", ("a1111", "comfyui")),
        ("a [[[red]]:circle:2] ring", "[[[red]]:circle:2]", ("a1111", "comfyui")),
        ("[[[b]]:2]", "[[[b]]:2]", ("a1111", "comfyui")),
        ("[a [b]|c]", "[a [b]|c]", ("a1111", "comfyui")),
        ("a ([cat:dog:-1]) here", "[cat:dog:-1]", ("a1111", "comfyui")),
        ("[cat:dog:1e0]", "[cat:dog:1e0]", ("a1111", "comfyui")),
        ("a [cat|dog]", "[cat|dog]", ("a1111", "comfyui")),
        ("a cat AND a dog", "AND", ("a1111",)),
        ("a {red|blue} cat", "{red|blue}", ("a1111", "comfyui")),
        ("a cat <lora:style:0.8>", "<lora:style:0.8>", ("a1111", "comfyui")),
        ("a cat <LoRA:style>", "<LoRA:style>", ("a1111", "comfyui")),
        ("<lyco:x:1><hypernet:y:1>", "<lyco:x:1>", ("a1111", "comfyui")),
        ("<hypernet:y:1>", "<hypernet:y:1>", ("a1111", "comfyui")),
        ("a <embed:EasyNegative> b", "<embed:EasyNegative>", ("a1111", "comfyui")),
        ("a <embedding:x>", "<embedding:x>", ("a1111", "comfyui")),
        ("a <random:red, blue> cat", "<random:red, blue>", ("a1111", "comfyui")),
        ("a cat, (embedding:EasyNegative:1.2)", "embedding:EasyNegative:1.2", ("a1111",)),
    ],
)
@pytest.mark.parametrize("syntax", ["a1111", "comfyui", "none"])
def test_what_other_tools_schedule_is_refused(
    prompt: str, found: str, syntaxes: tuple[str, ...], syntax: PromptSyntax
) -> None:
    if syntax not in syntaxes:
        assert list(find_foreign_syntax(prompt, syntax)) == []
        assert parse_weights(prompt, syntax)
        return
    assert next(iter(find_foreign_syntax(prompt, syntax)))[0] == found
    with pytest.raises(UsageError, match=re.escape(f"the prompt has '{found}'")) as raised:
        parse_weights(prompt, syntax)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "a [cat] and [a dog]",
        r"a \[cat:dog:0.5\]",
        "brand and sand, ANDROID, HAND",
        "a cat: 3 dogs",
        "(cat:1.2) | dog",
        "<3 lora",
        "<cat-toy>, <a cat: red>",
        "an embedding: words",
        "{red}",
        "16:9 [wide]",
        "[(red:1.2) cat]",
        "[a (b|c:1.2)]",
        "]a[ b: 2",
    ],
)
def test_what_only_looks_like_a_schedule_is_read(prompt: str) -> None:
    assert list(find_foreign_syntax(prompt, "a1111")) == []
    assert parse_weights(prompt, "a1111")


@pytest.mark.parametrize(
    ("prompt", "plain", "tags"),
    [
        ("a cat <lora:style:0.8>", "a cat", [("style", 0.8)]),
        ("a cat <lora:style>", "a cat", [("style", 1.0)]),
        ("<lora:My Style_v2.1:-.5>a cat", "a cat", [("My Style_v2.1", -0.5)]),
        ("a <lora:a:1> cat<lora:b:2.0:2>s", "a  cats", [("a", 1.0), ("b", 2.0)]),
        ("(a cat <lora:a:0>:1.2)", "(a cat :1.2)", [("a", 0.0)]),
        ("<LORA:a:1e-1>", "", [("a", 0.1)]),
        (" a cat <lyco:a:1> <3 ", " a cat <lyco:a:1> <3 ", []),
    ],
)
def test_tags_of_loras_are_taken_out(prompt: str, plain: str, tags: list[tuple[str, float]]) -> None:
    expected = tuple(LoraTag(name=name, weight=weight) for name, weight in tags)
    assert extract_lora_tags(prompt) == (plain, expected)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:a:0.5:0.7>", "one weight for the text encoder and another for the U-Net"),
        ("<lora:a:1:lbw=OUTALL>", "whose 'lbw=OUTALL' is not done here"),
        ("<lora:a:te=0.5>", "whose 'te=0.5' is not done here"),
        ("<lora:a:x>", "give a LoRA's name and a number"),
        ("<lora:a:>", "give a LoRA's name and a number"),
        ("<lora:>", "give a LoRA's name and a number"),
        ("<lora::1>", "give a LoRA's name and a number"),
        ("<lora:a:nan>", "give a LoRA's name and a number"),
        ("<lora:a:1e999>", "give a LoRA's name and a number"),
        ("<lora:a:1:1:4>", "give a LoRA's name and a number"),
        ("<lora:a:1> <lora:a:1>", "names the LoRA 'a' twice"),
        ("<lora:" + "a" * 50_000 + ":x>", "give a LoRA's name and a number"),
        ("<lora:" + ":" * 50_000 + ">", "give a LoRA's name and a number"),
        ("<lora:a:1>" * 20_000, "characters long"),
    ],
)
def test_tags_without_a_meaning_are_refused(prompt: str, message: str) -> None:
    said = sentence_of(lambda: extract_lora_tags(prompt))
    assert said is not None
    assert message in said


@given(st.text(alphabet="<>lorahypernetlyco:=.01 ab", max_size=60))
def test_any_text_with_tags_is_read_or_refused_in_a_sentence(prompt: str) -> None:
    if sentence_of(lambda: extract_lora_tags(prompt)) is None:
        plain, tags = extract_lora_tags(prompt)
        assert extract_lora_tags(plain) == (plain, ()) or tags
    sentence_of(lambda: parse_weights(prompt))


def test_pages_of_brackets_are_looked_through_at_once() -> None:
    for prompt in ("<" * 100_000, "<lora:" * 16_000, "embedding:" * 10_000, "<a:" * 30_000, "[" * 90_000):
        sentence_of(lambda prompt=prompt: parse_weights(prompt))
        sentence_of(lambda prompt=prompt: extract_lora_tags(prompt))


@pytest.mark.parametrize("prompt", ["a (b:1.5) c", r"\(a\) [b] (c)", "16:9 (wide)", "a, ((best:1.3)", r"C:\\new (x)"])
@pytest.mark.parametrize("syntax", ["comfyui", "none"])
def test_a_prompt_in_a1111_syntax_means_the_same(prompt: str, syntax: PromptSyntax) -> None:
    meant, written = (
        [(part.text, pytest.approx(part.weight)) for part in parse_weights(text, by)]
        for text, by in ((prompt, syntax), (in_a1111_syntax(prompt, syntax), "a1111"))
    )
    assert meant == written


def test_a_backslash_before_anything_else_is_left_out_as_in_a1111() -> None:
    """``prompt_parser.py``: ``text.startswith("\\\\")``."""
    assert [part.text for part in parse_weights(r"hatsune\_miku, ^\_^", "a1111")] == ["hatsune_miku, ^_^"]
    assert [(part.text, part.weight) for part in parse_weights("(cat:1e1)", "a1111")] == [("cat:1e1", 1.1)]


def test_brackets_of_any_number_are_looked_at_in_a_moment() -> None:
    for prompt in (
        "[" * 50_000 + "a|b" + "]" * 50_000,
        "[a:1 " * 20_000 + "]" * 20_000,
        "[(" * 50_000,
        "([)]" * 25_000,
    ):
        list(islice(find_foreign_syntax(prompt, "a1111"), 10))
