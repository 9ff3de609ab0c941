"""Text conditioning: chunks and their weights, long prompts, batches of prompts of other lengths, learned words."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tests.conftest import fill_, sentence_of

from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.errors import ModelError, UsageError
from gobelin.pipeline import Pipeline
from gobelin.text_conditioning import TextConditioning, batch_texts, chunk_prompt, encode_chunks
from gobelin.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def clip() -> tuple[Tokenizer, TextEncoder]:
    """A tokenizer and a small text encoder with texts of CLIP's length."""
    tokenizer = Tokenizer.train(["a red ring, and a blue square"] * 5, vocab_size=540, max_length=77)
    config = TextEncoderConfig.of(32, layers=2, heads=2, vocab_size=len(tokenizer.vocab))
    with torch.device("meta"):
        encoder = TextEncoder(config)
    return tokenizer, fill_(encoder)


def test_a_prompt_of_more_chunks_than_anyone_needs_is_refused(clip) -> None:
    with pytest.raises(UsageError, match="the prompt has 5,000 tokens: give 4,800 at most"):
        chunk_prompt(clip[0], "a " * 5_000)


def test_break_begins_a_chunk_in_a1111(clip) -> None:
    tokenizer, _ = clip
    chunks = chunk_prompt(tokenizer, "a red BREAK ring", "a1111")
    assert torch.equal(chunks.token_ids, torch.cat([tokenizer("a red"), tokenizer("ring")]))
    assert chunks.words.tokens("ring") == (78,)
    assert len(chunk_prompt(tokenizer, "a red BREAK ring", "comfyui").token_ids) == 1


def test_break_at_the_end_begins_none_and_has_no_weight(clip) -> None:
    tokenizer, _ = clip
    for prompt in ("a cat BREAK", "a cat BREAK ", "BREAK"):
        assert len(chunk_prompt(tokenizer, prompt, "a1111").token_ids) == 1
    assert len(chunk_prompt(tokenizer, "BREAK a cat", "a1111").token_ids) == 2
    with pytest.raises(UsageError, match=r"has a BREAK with a weight of 1\.2"):
        chunk_prompt(tokenizer, "(a BREAK cat:1.2)", "a1111")


def test_break_is_refused_where_there_are_no_chunks() -> None:
    tokenizer = Tokenizer.train(["a red cat"], max_length=16)
    with pytest.raises(UsageError, match="begins a new chunk of 77 tokens, and this model takes one of 16"):
        chunk_prompt(tokenizer, "a red BREAK cat", "a1111")
    for syntax in ("none", "comfyui"):
        assert len(chunk_prompt(tokenizer, "a red BREAK cat", syntax).token_ids) == 1
    chunk_prompt(tokenizer, "a BREAKING cat", "a1111")


def embedded(clip, prompt: str, syntax: str) -> torch.Tensor:
    tokenizer, encoder = clip
    with torch.no_grad():
        return encode_chunks(encoder, tokenizer, chunk_prompt(tokenizer, prompt, syntax), syntax)


def test_what_has_no_weights_is_embedded_as_ever(clip) -> None:
    tokenizer, encoder = clip
    expected = encoder(tokenizer("a red ring"))[0]
    for prompt, syntax in (("a red ring", "a1111"), ("a (red:1.0) ring", "comfyui"), ("a red ring", "none")):
        assert torch.equal(embedded(clip, prompt, syntax), expected)


def test_weights_do_what_their_syntax_does(clip) -> None:
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
    exact = chunk_prompt(tokenizer, " ".join(["a"] * room), "none")
    assert exact.token_ids.shape == (1, 77)
    more = chunk_prompt(tokenizer, " ".join(["a"] * (room + 1)), "none")
    assert more.token_ids.shape == (2, 77)
    assert more.cut == ""
    assert more.token_ids[1, 2:].eq(tokenizer.eos).all()
    assert [len(span.tokens) for span in more.words.spans] == [1] * 76
    assert more.words.spans[-1].tokens == (78,)

    prompt = " ".join([*["a"] * 64, "a,", *["red"] * 20])
    by_comma = chunk_prompt(tokenizer, prompt, "a1111")
    assert by_comma.token_ids[0, 67:].eq(tokenizer.eos).all(), "64 and one words, and the comma"
    assert by_comma.words.spans[65].tokens == (78,)
    assert chunk_prompt(tokenizer, prompt, "none").words.spans[65].tokens == (67,)
    full = chunk_prompt(tokenizer, " ".join([*["a"] * 60, ",", *["a"] * 14, ",", *["red"] * 20]), "a1111")
    assert full.token_ids[0, 76] == tokenizer.eos
    assert full.token_ids[0, 75] != tokenizer.eos, "a comma that comes first thing ends no chunk before it"


def test_comfyui_keeps_short_words_whole(clip) -> None:
    tokenizer, _ = clip
    word = "xyzw"  # four tokens, which the vocabulary does not know together
    count = len(tokenizer.tokens(word))
    assert 1 < count <= 8
    prompt = " ".join([*["a"] * 74, word])
    whole, cut = (chunk_prompt(tokenizer, prompt, syntax).words.spans[-1].tokens for syntax in ("comfyui", "none"))
    assert whole == tuple(range(78, 78 + count))
    assert cut == (75, *range(78, 78 + count - 1))
    comma = chunk_prompt(tokenizer, " ".join([*["a"] * 74, "red,"]), "comfyui")
    assert comma.words.spans[-1].tokens == (78,), "up to the next space"


def test_models_with_shorter_texts_say_what_is_cut() -> None:
    tokenizer = Tokenizer.train(["a red ring"], vocab_size=530, max_length=8)
    chunks = chunk_prompt(tokenizer, "a a a a a a (red:1.2) ring")
    assert chunks.token_ids.shape == (1, 8)
    assert chunks.cut == "red ring"
    assert [chunk_prompt(tokenizer, "a " * count).cut for count in (0, 6, 7, 8)] == ["", "", "a", "a a"]


def test_long_prompts_paint_and_their_words_are_found(oracle_folder) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    pipe.tokenizer.max_length = 77
    positions = pipe.text_encoder.text_model.embeddings.position_embedding
    positions.weight = torch.nn.Parameter(torch.randn(77, 64) * 0.1)
    prompt = " ".join(["red"] * 80) + " circle"
    result = pipe(prompt, seed=0, steps=1, trace=True)
    assert result.heatmaps[0]["circle"].raw.shape == (64, 64)
    assert result.heatmaps[0].words.length == 154
    other = pipe(prompt.replace("circle", "square"), seed=0, steps=1)
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
    torch.testing.assert_close(pipe.encode_text([prompt]).embeddings, expected, rtol=1e-4, atol=1e-5)
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
    with pytest.raises(UsageError, match="this model has learned words loaded"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model_index.json").exists()
    with pytest.raises(UsageError, match="this model has learned words loaded"):
        pipe.save_single_file(tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_a_model_whose_tokenizer_learned_a_word_is_diffusers_and_saved_again_too(make_oracle, tmp_path: Path) -> None:
    theirs = make_oracle()
    theirs.tokenizer.add_tokens(["<sks-cat>", "Zxq"])
    theirs.text_encoder.resize_token_embeddings(len(theirs.tokenizer))
    theirs.save_pretrained(tmp_path / "model")
    pipe = Pipeline.from_pretrained(tmp_path / "model", "cpu")
    pipe.save_pretrained(tmp_path / "again")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "again", safety_checker=None)
    for prompt in ("a red <sks-cat>", "<sks-cat>, zxq ZXQ", "a<SKS-CAT>b"):
        expected = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
        assert torch.equal(again.encode_prompt(prompt, "cpu", 1, False)[0], expected)
        torch.testing.assert_close(pipe.encode_text([prompt]).embeddings, expected, rtol=1e-4, atol=1e-5)
    assert pipe("a <sks-cat>", steps=1, trace=True).heatmaps[0].words.tokens("sks-cat") == (2,)


def test_a_word_without_a_row_in_the_text_encoder_is_refused(make_oracle, tmp_path: Path) -> None:
    theirs = make_oracle()
    theirs.tokenizer.add_tokens(["<sks-cat>"])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the tokenizer has '<sks-cat>', and the text encoder, .* has none for it"):
        Pipeline.from_pretrained(tmp_path, "cpu")


def learning(words: dict[str, int], names: dict[str, str] | None = None) -> Tokenizer:
    """A tokenizer with words of so many vectors each, and what their files are called."""
    tokenizer = Tokenizer.train(["a red ring, and a blue square"] * 5, vocab_size=540, max_length=77)
    free = len(tokenizer.vocab)
    for word, count in words.items():
        tokenizer.add_word(word, range(free, free + count), (names or {}).get(word))
        free += count
    return tokenizer


@pytest.mark.parametrize("called", ["EasyNegative", "easynegative", "EasyNegative.pt", "sub/EasyNegative.safetensors"])
@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("embedding:{}", "EasyNegative"),
        ("a red embedding:{}", "a red EasyNegative"),
        ("embedding:{} ring", "EasyNegative ring"),
        ("a (embedding:{}:1.3), ring", "a (EasyNegative:1.3), ring"),
        ("a ((embedding:{})) ring", "a ((EasyNegative)) ring"),
        ("embedding:{}, red", "EasyNegative, red"),
        ("red, embedding: {},, ring", "red, EasyNegative,, ring"),
        ("embedding:{} embedding:{}", "EasyNegative EasyNegative"),
        ("embedding:{}<3", "EasyNegative<3"),
    ],
)
def test_comfyuis_embedding_is_its_vectors_and_nothing_else(prompt: str, same: str, called: str) -> None:
    tokenizer = learning({"EasyNegative": 3})
    found, expected = (chunk_prompt(tokenizer, text, "comfyui") for text in (prompt.replace("{}", called), same))
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.weights, expected.weights)
    assert found.words == expected.words
    assert {span.word for span in found.words.find("easynegative")} == {"EasyNegative"}
    assert len(found.words.tokens("EasyNegative")) == 3 * same.count("EasyNegative")


def test_comfyui_calls_an_embedding_by_its_file() -> None:
    tokenizer = learning({"<cat-toy>": 2}, {"<cat-toy>": "red"})
    found = chunk_prompt(tokenizer, "a red embedding:red, ring", "comfyui")
    assert [span.word for span in found.words.spans] == ["a", "red", "cat-toy", "ring"]
    assert found.words.tokens("cat-toy") == (3, 4)
    assert chunk_prompt(tokenizer, "embedding:<cat-toy>", "none").words.has("embedding")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a embedding:other", "embedding:other"),
        ("embedding:easynegative.", "embedding:easynegative."),
        ("embedding:easynegative:1.2", "embedding:easynegative:1.2"),
        ("embedding:easynegative,red", "embedding:easynegative,red"),
        ("embedding:", "embedding:"),
        ("a,embedding:x", "embedding:x"),
        ("embedding:" + "x" * 50_000, "embedding:xxx"),
        ("embedding:" + "../" * 9_000 + "x", "embedding:../"),
    ],
)
def test_an_embedding_that_is_not_loaded_is_refused(prompt: str, name: str) -> None:
    said = sentence_of(lambda: chunk_prompt(learning({"EasyNegative": 3}), prompt, "comfyui"))
    assert said is not None
    assert name in said
    assert "(loaded: 'EasyNegative'): give its file to load_textual_inversion (--inversion)" in said


def test_in_a1111s_meaning_comfyuis_embedding_is_refused_with_a_hint() -> None:
    said = sentence_of(lambda: chunk_prompt(learning({"EasyNegative": 3}), "a embedding:EasyNegative", "a1111"))
    assert said is not None
    assert "write its name alone or give weights='comfyui'" in said


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_a_learned_word_is_not_cut_between_chunks(syntax: str) -> None:
    tokenizer = learning({"EasyNegative": 6})
    for before in (70, 72, 74, 75):
        chunks = chunk_prompt(tokenizer, f"{'a ' * before}easynegative, red", syntax)
        assert chunks.words.tokens("easynegative") == tuple(range(78, 84)), before
        assert chunks.words.tokens("red") == (85,)
    fits = chunk_prompt(tokenizer, f"{'a ' * 69}easynegative, red", syntax)
    assert fits.words.tokens("easynegative") == tuple(range(70, 76))
    longer = chunk_prompt(learning({"long": 100}), "long red", syntax)
    assert longer.words.tokens("long") == (*range(1, 76), *range(78, 103))


@pytest.mark.parametrize("written", ["EasyNegative", "easynegative,", "embedding:easynegative"])
def test_a_file_that_names_its_word_is_called_by_its_own_name_too(written: str, oracle_folder, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    for file, key in (("EasyNegative", "<neg>"), ("red", "<other>")):
        save_file({key: torch.randn(2, 64)}, tmp_path / f"{file}.safetensors")
        pipe.load_textual_inversion(tmp_path / f"{file}.safetensors")
    assert pipe.learned_words == ["<neg>", "<other>"]
    found, named = (chunk_prompt(pipe.tokenizer, f"a {one} x", "comfyui") for one in (written, "<neg>"))
    assert found.token_ids.unique().tolist()[-2:] == named.token_ids.unique().tolist()[-2:]
    assert found.token_ids.max() >= len(pipe.tokenizer.vocab)
    assert chunk_prompt(pipe.tokenizer, "red", "none").token_ids.max() < len(pipe.tokenizer.vocab)


def test_prompts_of_other_lengths_are_batched_behind_a_mask() -> None:
    short, long = torch.randn(2, 3), torch.randn(5, 3)
    text = batch_texts([short, long])
    assert text.mask is not None
    assert text.mask.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert torch.equal(text.embeddings[0, :2], short)
    assert torch.equal(text.embeddings[1], long)
    assert text.embeddings.isfinite().all()
    assert batch_texts([long, long]).mask is None
    halves = text.rows(slice(0, 1)) + text.rows(slice(1, 2))
    assert torch.equal(halves.embeddings, text.embeddings)
    assert halves.mask is not None
    assert torch.equal(halves.mask, text.mask)
    unmasked = TextConditioning(embeddings=torch.zeros(1, 5, 3))
    assert (unmasked + unmasked).mask is None


@pytest.mark.parametrize("syntax", ["a1111", "comfyui", "none"])
def test_what_is_masked_reaches_no_pixel(clip_model, syntax: str) -> None:
    """A prompt's prediction is the same alone, and beside one of three chunks."""
    pipe = Pipeline(clip_model())
    short, long = "a (red:1.2) cat", "a dog" + ", and a blue dog" * 40
    together = pipe.encode_text([short, long], weights=syntax)
    alone = pipe.encode_text([short], weights=syntax)
    assert together.embeddings.shape[1] > 77
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        expected = pipe.unet(latents, timesteps, alone.embeddings, alone.mask)
        assert together.mask is not None
        found = pipe.unet(latents, timesteps, together.embeddings[:1], together.mask[:1])
        heard = pipe.unet(latents, timesteps, together.embeddings[:1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(heard, expected, rtol=1e-4, atol=1e-5), "without the mask it would be heard"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("1girl,red hair,blue eyes", ["1girl", "red", "hair", "blue", "eyes"]),
        ("(red circle:1.3),(blue square:0.8)", ["red", "circle", "blue", "square"]),
        ("(red)(blue:1.2)", ["red", "blue"]),
        ("red(dish:1.2) ring", ["red", "dish", "ring"]),
        ("a ((very)) [big] ring", ["a", "very", "big", "ring"]),
        ("ring;square|circle", ["ring", "square", "circle"]),
    ],
)
def test_words_end_at_commas_brackets_and_where_weights_change(clip_model, prompt: str, words: list[str]) -> None:
    pipe = Pipeline(clip_model())
    found = pipe.words(prompt)
    assert [span.word for span in found.spans] == words
    (ids,) = chunk_prompt(pipe.tokenizer, prompt).token_ids.tolist()
    for span in found.spans:
        own = [token.id for token in pipe.tokenizer.tokens(span.word)]
        assert [ids[place] for place in span.tokens] == own, "its tokens are its own"


def test_each_words_weight_is_on_its_tokens(clip_model) -> None:
    chunks = chunk_prompt(Pipeline(clip_model()).tokenizer, "(red circle:1.3),(blue square:0.8)" + ", a dog" * 40)
    weights = chunks.weights.flatten()
    for word, weight in (("red", 1.3), ("circle", 1.3), ("blue", 0.8), ("square", 0.8), (("dog", 39), 1.0)):
        assert weights[list(chunks.words.tokens(word))].tolist() == pytest.approx(
            [weight] * len(chunks.words.tokens(word))
        )
    kinds = chunks.words.kinds
    assert all(weights[place] == 1 for place, kind in enumerate(kinds) if kind != "text")
