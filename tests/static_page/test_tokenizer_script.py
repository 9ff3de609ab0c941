"""Tokenizer and words in JavaScript against ours, on what strangers type."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.static_page.conftest import RunScript

from gobelin.look.page import split_prompt
from gobelin.tokenizer import BOS, EOS, Tokenizer

READ = """
const { Tokenizer } = await module("tokenizer");
const { findWords, splitPrompt } = await module("prompt_words");
const tokenizer = new Tokenizer(given.tokenizer);
return given.texts.map((text) => {
  const tokens = tokenizer.tokens(text);
  const words = findWords(text, tokens.slice(0, tokenizer.maxLength - 2));
  return { ids: [...tokenizer.padded(tokens)], count: tokens.length, words, pieces: splitPrompt(text, words) };
});
"""
STRANGE = [
    "",
    " ",
    "\t\n \u2003",
    "a red circle to the left of a blue star",
    'A RED Circle, and: (a "blue" star)!',
    "it's the circle's; they'll, we've, I'm, you'd, o'clock ''s",
    "three 3 35 ½ ² Ⅷ ٣",
    "café cafe\u0301 CAFE\u0301 a\u0323\u0301 a\u0301\u0323 q\u0307\u0323",
    "\u1112\u1161\u11ab\u1100\u1173\u11af 한글 \uac00\u11a8",
    "\u212b \u2126 \u0958 \u1e9b\u0323 ﬁ ﷺ ǅ",
    "İstanbul ıI ẞß ΣΑΣ ŉ",
    "a 🟥 and 👩\u200d🎨 👍🏽 🇩🇪 ❤️ ★",
    "עיגול אדום, ריבוע; دائرة حمراء ، مربع",
    "赤い円、青い星。「左」（右）！？",
    "ไทย हिन्दी क्षि தமிழ்",
    "zero\u200bwidth no\u00a0break \ufeffbom \u0085next \x1cfile\x1d \x00nul \x7f",
    "</w> <w> a</w> Ġ ċ Ä \\u0041 &amp; %20 <script>alert(1)</script>",
    f"{BOS}a {EOS} red{EOS}ring <|endoftext| |> <|ENDOFTEXT|>",
    "a red circle above a blue square " * 40,
    "x" * 3000,
    "🟥" * 500,
    "e\u0301" * 200,
    "e" + "\u0301" * 300,
    "(red:1.3) [blue] {a|b} <lora:x:1> a AND b BREAK c \\(d\\)",
    "left-hand well-kept 3.5 U.S.A. a/b a_b #tag @me 50% $5 ~ ^ `",
]


@pytest.fixture(scope="module")
def tokenizer(shipped) -> Tokenizer:
    return shipped.tokenizer


def check(script: RunScript, tokenizer: Tokenizer, texts: list[str]) -> None:
    described = {
        "vocab": tokenizer.vocab,
        "merges": [" ".join(pair) for pair in tokenizer.merges],
        "maxLength": tokenizer.max_length,
    }
    for text, found in zip(texts, script(READ, {"tokenizer": described, "texts": texts}), strict=True):
        words = tokenizer.words(text)
        assert found["ids"] == tokenizer(text)[0].tolist(), text
        assert found["count"] == len(tokenizer.tokens(text)), text
        ours = [(word["word"], word["start"], word["end"], tuple(word["tokens"])) for word in found["words"]]
        assert ours == [(span.word, span.start, span.end, span.tokens) for span in words.spans], text
        assert [tuple(piece) for piece in found["pieces"]] == split_prompt(words), text


def test_it_reads_what_strangers_type(script: RunScript, tokenizer: Tokenizer) -> None:
    check(script, tokenizer, STRANGE)


def test_a_vocabulary_of_other_words(script: RunScript) -> None:
    corpus = ["un carré vert à côté d'une étoile; ein größeres Dreieck, it's 35 e\u0301toiles"] * 3
    check(script, Tokenizer.train(corpus, vocab_size=600, max_length=40), STRANGE)


characters = st.characters(exclude_categories=("Cs", "Cn"))
signs = st.sampled_from([*"aeior '.,()3", "\u0301", "\u0323", "é", "İ", "Σ", "🟥", "\u200d", "\u1161", "\n", BOS, EOS])
strangers = st.lists(st.one_of(st.text(characters, max_size=20), st.text(st.characters(max_codepoint=0x24F)), signs))


@settings(max_examples=20)
@given(texts=st.lists(strangers.map("".join), min_size=20, max_size=20))
def test_it_reads_any_text(script: RunScript, tokenizer: Tokenizer, texts: list[str]) -> None:
    check(script, tokenizer, texts)
