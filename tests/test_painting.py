"""A painting: what is known before its first step, how it ends, what is refused, and what it says of itself."""

import dataclasses
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gobelin.attention import AttentionSite, Trace
from gobelin.control import Region, attend_and_excite, reweight
from gobelin.errors import Cancelled, ModelError, UsageError
from gobelin.painting import file_stem
from gobelin.pipeline import Pipeline
from gobelin.settings import Settings
from gobelin.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def pipe(trained: Path) -> Pipeline:
    return Pipeline.from_pretrained(trained)


@pytest.fixture
def own(trained: Path) -> Pipeline:
    """One that a test may break."""
    return Pipeline.from_pretrained(trained)


def test_settings_are_known_before_the_first_step(pipe: Pipeline) -> None:
    painting = pipe.start(["a red circle", "a ring"], seed=3, steps=3, count=2, sampler="heun")
    assert len(painting) == 3
    assert [made["seed"] for made in painting.settings] == [3, 4, 5, 6]
    assert painting.result.settings == painting.settings
    assert pipe.start("a red circle", steps=4).settings[0]["seed"] >= 0, "a seed that was drawn is known too"


def test_the_result_runs_what_is_left_and_is_kept(pipe: Pipeline) -> None:
    painting = pipe.start("a red circle", seed=3, steps=4)
    first = next(painting)
    assert first.index == 0
    result = painting.result
    assert painting.result is result
    assert list(painting) == []
    whole = pipe.start("a red circle", seed=3, steps=4)
    steps = list(whole)
    assert torch.equal(whole.result.latents, result.latents)
    assert torch.equal(steps[-1].latents, result.latents)
    assert torch.equal(pipe("a red circle", seed=3, steps=4).latents, result.latents)


def test_a_cancelled_painting_has_no_steps_and_no_result(pipe: Pipeline) -> None:
    painting = pipe.start("a red circle", steps=4)
    next(painting)
    painting.cancel()
    assert list(painting) == []
    with pytest.raises(Cancelled, match="the painting was cancelled: it has no result"):
        _ = painting.result
    before = pipe.start("a red circle", steps=4)
    before.cancel()
    with pytest.raises(Cancelled):
        _ = before.result


def test_a_painting_is_cancelled_from_another_thread(pipe: Pipeline) -> None:
    painting = pipe.start("a red circle", steps=1000, height=32, width=32)
    begun, ended = threading.Event(), threading.Event()
    raised: list[Exception] = []
    count = 0

    def paint() -> None:
        nonlocal count
        try:
            for _ in painting:
                count += 1
                begun.set()
            _ = painting.result
        except Cancelled as error:
            raised.append(error)
        ended.set()

    thread = threading.Thread(target=paint)
    thread.start()
    assert begun.wait(60)
    painting.cancel()
    assert ended.wait(60)
    thread.join()
    assert len(raised) == 1
    assert 0 < count < 1000


def test_a_control_that_raises_ends_the_painting_with_its_own_error(pipe: Pipeline) -> None:
    def broken(site: Any, probs: Any) -> Any:
        raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="my own mistake"):
        pipe("a red circle", steps=1, control=broken)


@pytest.mark.parametrize("network", ["unet", "text_encoder", "vae"])
def test_weights_that_are_not_finite_paint_no_black_image(own: Pipeline, network: str) -> None:
    with torch.no_grad():
        for parameter in getattr(own, network).parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite") as raised:
        own("a red circle", steps=2)
    assert "\n" not in str(raised.value)


def test_float16_that_overflows_paints_no_black_image(own: Pipeline) -> None:
    with torch.no_grad():
        own.unet.conv_out.weight.mul_(1e9)
        own.unet.conv_out.bias.mul_(1e9)
    own.to(dtype=torch.float16)
    with pytest.raises(ModelError, match="not finite after step 1 of 2: in float16 they may overflow"):
        own("a red circle", steps=2)


def test_a_vae_that_overflows_paints_no_black_image(own: Pipeline) -> None:
    with torch.no_grad():
        own.vae.decoder.conv_in.weight.mul_(1e30)
        own.vae.decoder.conv_out.weight.mul_(1e30)
    with pytest.raises(ModelError, match="the decoded image is not finite"):
        own("a red circle", steps=1)


def lora_of(pipe: Pipeline, folder: Path) -> Path:
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    base = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{base}.lora_down.weight": torch.randn(2, weight.shape[1], generator=draw),
        f"{base}.lora_up.weight": torch.randn(weight.shape[0], 2, generator=draw),
    }
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_a_lora_is_taken_out_of_a_model_that_was_moved(trained: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe, plain = Pipeline.from_pretrained(trained), Pipeline.from_pretrained(trained)
    name = pipe.load_lora(lora_of(pipe, tmp_path))
    assert pipe.to(dtype=dtype) is pipe
    pipe("a red circle", steps=1)
    pipe.loras.remove(name)
    plain.to(dtype=dtype)
    for one, other in zip(pipe.unet.parameters(), plain.unet.parameters(), strict=True):
        assert one.dtype == other.dtype == dtype
        assert torch.equal(one, other)


def test_a_pipeline_moves_and_says_where_it_is(own: Pipeline) -> None:
    assert "float32" in repr(own)
    own.to("cpu", torch.bfloat16)
    assert {own.unet.dtype, own.vae.dtype, own.text_encoder.dtype} == {torch.bfloat16}
    assert "cpu, torch.bfloat16" in repr(own)
    with pytest.raises(UsageError, match="unknown device 'tpu': the choices on this machine are"):
        own.to("tpu")


def test_loras_become_the_models_own_only_where_it_is_said(own: Pipeline, tmp_path: Path) -> None:
    own.load_lora(lora_of(own, tmp_path))
    painted = own("a red circle", seed=0, steps=2)
    for save, target in ((own.save_pretrained, "model"), (own.save_single_file, "model.safetensors")):
        with pytest.raises(UsageError, match=r"LoRAs loaded \('style' at .*\): save with fuse_loras=True"):
            save(tmp_path / target)
        assert not (tmp_path / target).exists()
    own.save_pretrained(tmp_path / "model", fuse_loras=True)
    again = Pipeline.from_pretrained(tmp_path / "model")("a red circle", seed=0, steps=2)
    assert torch.allclose(again.latents, painted.latents, atol=1e-5)
    own.loras.remove("style")
    own.save_pretrained(tmp_path / "plain")


def test_what_things_say_of_themselves_is_short(pipe: Pipeline) -> None:
    painting = pipe.start("a red circle " * 5, steps=2, count=6, trace=True, control=reweight({"red": 2}))
    step = next(painting)
    result = painting.result
    for thing in (pipe, painting, step, result, result.heatmaps[0], result.heatmaps[0]["red"], pipe.recommended):
        said = repr(thing)
        assert "tensor(" not in said, type(thing)
        assert "\n" not in said
        assert len(said) < 400, type(thing)
    assert repr(painting).startswith("Painting(6 images, 2 steps")
    assert repr(result).startswith("Result(6 of 64×64: 'a red circle")
    assert repr(result).endswith("…, with heat maps)")


def test_steps_show_themselves_in_a_notebook(pipe: Pipeline) -> None:
    step = next(pipe.start(["a red circle", "a ring"], steps=2, seed=0))
    assert step._repr_png_().startswith(b"\x89PNG")
    assert step.preview(1).size == (64, 64)


# Images to begin from


def blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "grey")


def test_a_photograph_far_larger_than_the_model_is_refused_with_a_size(pipe: Pipeline) -> None:
    with pytest.raises(
        UsageError, match=r"has 4000×3000 pixels, and this model paints about 64×64: .* width 84 and height 64"
    ):
        pipe.start("a red circle", init_image=blank(4000, 3000))
    small = pipe.start("a red circle", init_image=blank(4000, 3000), width=84, height=64)
    assert (small.settings[0]["width"], small.settings[0]["height"]) == (84, 64)
    assert pipe.start("a red circle", init_image=blank(130, 70)).settings[0]["width"] == 128


def test_a_black_mask_is_warned_of(pipe: Pipeline) -> None:
    options = {"init_image": blank(64, 64), "steps": 2, "seed": 0}
    with pytest.warns(UserWarning, match="nothing in the mask is white, so nothing is painted"):
        result = pipe("a red circle", mask=Image.new("L", (64, 64)), **options)
    assert (np.asarray(result.images[0]) == 128).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe("a red circle", mask=Image.new("L", (64, 64), "white"), **options)


@pytest.mark.parametrize("options", [{"strength": 0.5}, {"strength": 0.0}, {"mask": Image.new("L", (64, 64), "white")}])
def test_what_is_for_an_image_is_refused_without_one(pipe: Pipeline, options: dict) -> None:
    name = next(iter(options))
    with pytest.raises(UsageError, match=f"{name} is given without an image that it is for: give init_image too"):
        pipe("a red circle", **options)


def test_each_image_may_begin_from_one_of_its_own(pipe: Pipeline, tmp_path: Path) -> None:
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (64, 64, 3), np.uint8)) for n in range(2)]
    images[1].save(tmp_path / "one.png")
    options = {"steps": 2, "strength": 0.5, "sampler": "ddim"}
    both = pipe(["a red circle", "a ring"], seed=4, init_image=[images[0], str(tmp_path / "one.png")], **options)
    for place, prompt in enumerate(("a red circle", "a ring")):
        alone = pipe(prompt, seed=4 + place, init_image=images[place], **options)
        assert torch.allclose(both.latents[place], alone.latents[0], atol=1e-4)
        assert both.settings[place]["init_image"] == alone.settings[0]["init_image"]
    assert both.settings[0]["init_image"] != both.settings[1]["init_image"]
    with pytest.raises(UsageError, match="3 images given as init_image for 2 to paint: give one for all, or one each"):
        pipe(["a red circle", "a ring"], init_image=[images[0]] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 63}, "64×63 pixels asked for: this model paints sizes that are multiples of 4"),
        ({"height": 2}, "this model paints sizes that are multiples of 4"),
        ({"height": 100_000, "width": 100_000}, "give 67,108,864 at most in all"),
        ({"clip_skip": 99}, "clip_skip is 99: give a number from 0 to"),
        ({"trace": "shrap"}, "trace is 'shrap': give True, False, \"sharp\" or"),
        ({"trace": 3}, "trace is 3: give True"),
        ({"latents": "noise"}, r"the start latents are str: expected \[1, 4, 16, 16\]"),
        ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, "the start latents"),
        ({"latents": torch.zeros(1, 4, 16, 16, dtype=torch.int64)}, "the start latents"),
        ({"seed": [1, 2]}, "2 seeds given for 1 images"),
        ({"seed": []}, "0 seeds given for 1 images"),
        ({"seed": 2**63 - 1, "count": 2}, "the seed is .*: give a number from 0 to"),
        ({"init_image": "nowhere.png"}, "there is no image at nowhere.png"),
        ({"init_image": []}, "0 images given as init_image for 1 to paint"),
    ],
)
def test_what_cannot_be_painted_is_said_before_anything_is(pipe: Pipeline, options: dict, message: str) -> None:
    from gobelin.errors import GobelinError

    with pytest.raises(GobelinError, match=message) as raised:
        pipe.start("a red circle", **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("prompt", ["", "  ", [], ["a cat", " "], 3, None, ("a", 3), b"cat"])
def test_what_is_no_prompt_is_said(pipe: Pipeline, prompt: Any) -> None:
    with pytest.raises(UsageError, match="the prompt is"):
        pipe(prompt)


def test_a_prompt_that_is_cut_is_warned_of(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match=r"the prompt is longer than this model's 32 tokens, .*: '.*circle'"):
        pipe.start("a red ring, " * 20 + "circle", steps=1)


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A red circle!", "a-red-circle"),
        ("größer, schöner", "größer-schöner"),
        ("猫と犬", "猫と犬"),
        ("кошка", "кошка"),
        ("e\u0301toile", "étoile"),
        ("../../etc/passwd", "etc-passwd"),
        ("!!!", "image"),
        ("🐈", "image"),
    ],
)
def test_files_are_called_what_was_painted(prompt: str, stem: str) -> None:
    assert file_stem({"prompt": prompt, "seed": 3}) == f"{stem}-3"


@pytest.mark.parametrize("prompt", ["a" * 500, "猫" * 500, "é" * 500, "a " * 500])
def test_file_names_fit_into_a_file_system(prompt: str, pipe: Pipeline, tmp_path: Path) -> None:
    result = pipe("a red circle", steps=1)
    named = dataclasses.replace(result, settings=[{**result.settings[0], "prompt": prompt}])
    for number in (1, 2):
        (path,) = named.save(tmp_path)
        assert path.is_file()
        assert len(list(tmp_path.glob("*.png"))) == number


Made = Callable[..., Any]


def test_shares_count_each_chunks_own_parts(clip_model: Made) -> None:
    """A prompt of three chunks has three BOS, EOS and paddings; what is beyond its own in a batch is nobody's."""
    pipe = Pipeline(clip_model())
    long = "a red cat" + ", and a blue dog" * 40
    result = pipe([long, "a red cat"], steps=1, seed=0, trace=True)
    for heatmaps in result.heatmaps:
        shares = heatmaps.shares()
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert set(shares) == {"text", "bos", "eos", "padding"}
        mean = torch.stack([probs.mean(dim=(0, 1, 2)) for site, probs in heatmaps.maps.items() if site.kind == "cross"])
        mean = mean.mean(dim=0)
        starts = [place for place, kind in enumerate(heatmaps.words.kinds) if kind == "bos"]
        assert shares["bos"] == pytest.approx(mean[starts].sum().item(), abs=1e-6)
    chunks = result.heatmaps[0].words.chunks()
    assert len(chunks) > 1
    assert [chunk.start for chunk in chunks] == [77 * number for number in range(len(chunks))]
    assert len(result.heatmaps[1].words.part("masked")) == 77 * (len(chunks) - 1)
    masked = list(result.heatmaps[1].words.part("masked"))
    assert all(
        probs[..., masked].eq(0).all() for site, probs in result.heatmaps[1].maps.items() if site.kind == "cross"
    )


def test_words_in_every_chunk_are_found_and_mapped(clip_model: Made) -> None:
    pipe = Pipeline(clip_model())
    prompt = "a (red:1.3) cat" + ", and a blue dog" * 30 + ", (seen:1.2) from a boat"
    words = pipe.words(prompt)
    assert {"red", "cat", "seen", "boat"} <= {span.word for span in words.spans}
    assert words.tokens("boat")[0] > 77
    assert isinstance(pipe.tokenizer, Tokenizer)
    result = pipe(prompt, steps=1, seed=0, trace=True)
    assert result.heatmaps[0]["boat"].raw.max() > 0
    assert result.heatmaps[0].words.tokens("boat") == words.tokens("boat")


@pytest.mark.parametrize("step", [0, 2])
def test_an_interrupted_painting_has_no_result(step: int, pipe: Pipeline) -> None:
    """Ctrl-C, or the stop button of a notebook, while a step runs."""
    passes = iter(range(100))

    def interrupting(site: AttentionSite, probs: torch.Tensor) -> torch.Tensor:
        if site.name == first.name and next(passes) == step:
            raise KeyboardInterrupt
        return probs

    first = next(site for site in pipe.unet.attention_sites if site.kind == "cross")
    painting = pipe.start("a red circle", steps=4, control=interrupting)
    with pytest.raises(KeyboardInterrupt):
        _ = painting.result
    with pytest.raises(Cancelled, match=f"the painting stopped after step {step} of 4: start it again"):
        _ = painting.result


def test_an_image_records_every_setting_that_it_depends_on(pipe: Pipeline) -> None:
    values: dict[str, Any] = {
        "negative_prompt": "ring",
        "seed": 3,
        "steps": 4,
        "guidance": 2.0,
        "guidance_rescale": 0.5,
        "sampler": "euler",
        "height": 96,
        "width": 128,
        "clip_skip": 1,
        "weights": "none",
        "tile": 16,
        "cache_interval": 2,
        "merge_tokens": 0.5,
        "init_image": Image.new("RGB", (128, 96)),
        "strength": 0.7,
        "mask": Image.new("L", (128, 96), 255),
    }
    not_recorded = {"count", "latents", "trace", "control"}
    assert values.keys() | not_recorded == {field.name for field in dataclasses.fields(Settings)}, "a new option"
    made = pipe.start("a red circle", **values).settings[0]
    assert all(made[name] == value for name, value in values.items() if name not in ("init_image", "mask"))
    assert made["init_image"] != made["mask"]


def test_a_large_image_in_tiles_is_painted_again_from_its_settings(pipe: Pipeline) -> None:
    first = pipe("a red circle", seed=1, steps=1, height=128, width=128, tile=16)
    made = {name: value for name, value in first.settings[0].items() if name not in ("prompt", "model")}
    assert np.array_equal(pipe("a red circle", **made).images[0], first.images[0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda pipe: pipe.to(dtype="float17"), "unknown dtype 'float17': the choices are float32"),
        (lambda pipe: pipe.to(3), "unknown device '3'"),
        (lambda pipe: Pipeline.from_pretrained(3), "the model is 3: give its path"),
        (lambda pipe: Pipeline.from_pretrained(dtype="half"), "unknown dtype 'half'"),
        (lambda pipe: Pipeline.from_pretrained(varient="fp16"), "unknown option 'varient': did you mean 'variant'"),
        (lambda pipe: pipe.encode_text(["ring", 3]), "texts is"),
        (lambda pipe: pipe.words("ring", weights="A1111"), "weights is 'A1111': give one of 'a1111'"),
        (lambda pipe: pipe.words(3), "the prompt is 3: give text"),
        (lambda pipe: pipe("ring", steps=1, guidance=lambda predictions: None), "the guidance returned None"),
        (lambda pipe: pipe("ring", steps=1, trace=Trace(sites=5)), "sites is 5: give a pattern"),
        (lambda pipe: Trace(per_head="no"), "per_head is 'no': give True or False"),
        (lambda pipe: Region(mask=torch.full((4, 4), 255.0)), "has values from 255 to 255: give 0 outside"),
        (lambda pipe: Region(mask=torch.full((4, 4), torch.nan)), "has values from nan to nan"),
        (lambda pipe: pipe("ring", steps=1).save("ring.png"), "ring.png is the name of a file: give a folder"),
        (
            lambda pipe: pipe(["ring", "star"], init_image=[Image.new("RGB", (side, 64)) for side in (64, 192)]),
            "the init images are of 64×64 and 192×64 pixels: give the height and width",
        ),
    ],
)
def test_slips_are_one_sentence(call: Callable[[Pipeline], object], said: str, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=said):
        call(pipe)


def test_a_gradient_control_says_that_it_needs_gradients(pipe: Pipeline) -> None:
    with torch.inference_mode(), pytest.raises(UsageError, match=r"paint outside of torch\.inference_mode"):
        pipe("a red circle", steps=1, control=attend_and_excite("circle"))


def test_one_text_is_one_prompt(pipe: Pipeline) -> None:
    assert torch.equal(pipe.encode_text("ring").embeddings, pipe.encode_text(["ring"]).embeddings)


def test_a_precision_may_be_named_as_in_diffusers(own: Pipeline) -> None:
    assert own.to(torch.bfloat16).unet.dtype == torch.bfloat16
    assert own.to("cpu", "float32").unet.dtype == torch.float32


def test_one_side_that_is_given_leaves_the_other_to_the_init_image(pipe: Pipeline) -> None:
    made = pipe.start("a red circle", init_image=Image.new("RGB", (128, 96)), height=64).settings[0]
    assert (made["width"], made["height"]) == (128, 64)


def test_a_model_may_not_choose_a_file_to_open(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "model")
    for name, value in (("init_image", "/etc/hostname"), ("count", 3)):
        (tmp_path / "model" / "gobelin.json").write_text(json.dumps({name: value}))
        with pytest.raises(ModelError, match=f"{name} is no setting that a model may recommend"):
            Pipeline.from_pretrained(tmp_path / "model")


def test_a_learned_word_is_not_half_saved(own: Pipeline, tmp_path: Path) -> None:
    def files() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}

    own.save_pretrained(tmp_path / "model")
    before = files()
    save_file({"zork": torch.ones(1, own.text_encoder.config.hidden_size)}, tmp_path / "zork.safetensors")
    own.load_textual_inversion(tmp_path / "zork.safetensors")
    for save, target in ((own.save_pretrained, "model"), (own.save_single_file, "x.safetensors")):
        with pytest.raises(UsageError, match=r"learned words loaded \('zork'\)"):
            save(tmp_path / target)
    assert files() == before
    assert not (tmp_path / "x.safetensors").exists()
