"""Looking into pipelines of diffusers: beside Gobelin's own maps and diffusers' own probabilities, images unchanged."""

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from peft import LoraConfig
from PIL import Image
from tests.conftest import fill_
from tests.oracles import WIDTHS, small_pipeline
from tests.schedulers import SCHEDULERS
from torch import Tensor
from transformers import CLIPTokenizer

import gobelin
from gobelin.attention import Trace
from gobelin.errors import UsageError
from gobelin.look.heatmaps import HeatMaps
from gobelin.tokenizer import Tokenizer

PROMPT = "a red circle left of a blue square"
ALL = Trace(sites="*", per_head=True, per_step=True)


@pytest.fixture(scope="module")
def parts(words: Path) -> dict[str, Any]:
    """The parts of a small pipeline."""
    pipe = small_pipeline(words)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    return {**pipe.components, "requires_safety_checker": False}


@pytest.fixture
def pipe(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """A pipeline with attention processors and a scheduler of its own."""
    parts["unet"].set_attn_processor(AttnProcessor2_0())
    return quiet(StableDiffusionPipeline(**parts))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painted(pipe: Any, prompt: Any = PROMPT, *, seed: int = 3, steps: int = 2, **options: Any) -> Any:
    """What a call returns, from noise of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, **options)


def looked(pipe: Any, prompt: Any = PROMPT, trace: Any = ALL, look: dict[str, Any] | None = None, **options: Any):
    """Heat maps of a call, after its images were compared with those of the same call without."""
    before = painted(pipe, prompt, **options)
    with gobelin.look_into(pipe, trace, **(look or {})) as look_in:
        during = painted(pipe, prompt, **options)
    assert all(np.array_equal(a, b) for a, b in zip(before.images, during.images, strict=True))
    return look_in.heatmaps


def difference(one: HeatMaps, other: HeatMaps) -> float:
    """The largest difference of two images' maps."""
    assert list(one.maps) == list(other.maps)
    assert one.words == other.words
    assert one.latent_size == other.latent_size
    return max((maps - other.maps[site]).abs().max().item() for site, maps in one.maps.items())


class Storing:
    """diffusers' plain processor, which keeps the probabilities that it attends by."""

    def __init__(self) -> None:
        self.probs: list[Tensor] = []

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        scores = attn.get_attention_scores

        def kept(*inputs: Any) -> Tensor:
            self.probs.append(scores(*inputs))
            return self.probs[-1]

        attn.get_attention_scores = kept
        try:
            return AttnProcessor()(attn, hidden_states, encoder_hidden_states, **kwargs)
        finally:
            del attn.get_attention_scores


SAMPLERS = ("ddim", "pndm", "dpmpp_2m", "heun", "dpm_2")
TRACES = {"all": ALL, "plain": True, "sharp": "sharp", "late": Trace(start=0.6)}


@pytest.mark.parametrize(
    ("sampler", "trace"), [*((one, "all") for one in SAMPLERS), *(("pndm", one) for one in TRACES if one != "all")]
)
def test_maps_are_gobelins(pipe: StableDiffusionPipeline, sampler: str, trace: str, tmp_path: Path) -> None:
    """The same model, seed and prompt have the same maps, up to the rounding of two programs."""
    scheduler, options = SCHEDULERS[sampler]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    pipe.save_pretrained(tmp_path)
    ours = gobelin.Pipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)
    size, traced = {"height": 64, "width": 96}, TRACES[trace]
    with gobelin.look_into(pipe, traced) as look:
        painted(pipe, guidance_scale=5.0, negative_prompt="a star", steps=4, **size)
    (theirs,) = look.heatmaps
    result = ours(
        PROMPT, seed=3, steps=4, guidance=5.0, negative_prompt="a star", sampler=sampler, trace=traced, **size
    )
    assert difference(theirs, result.heatmaps[0]) < 5e-6
    assert torch.allclose(theirs["red circle"].raw, result.heatmaps[0]["red circle"].raw, atol=5e-6)
    assert theirs.sharp == (trace == "sharp")
    assert theirs.steps == (4 if trace == "all" else 1)


def test_maps_are_those_that_diffusers_attends_by(pipe: StableDiffusionPipeline) -> None:
    (heatmaps,) = looked(pipe, steps=2)
    stores = {name: Storing() for name in pipe.unet.attn_processors}
    pipe.unet.set_attn_processor(dict(stores))  # which it empties
    painted(pipe)
    for site, maps in heatmaps.maps.items():
        probs = stores[f"{site.name}.processor"].probs
        prompted = torch.stack([one.unflatten(0, (2, -1))[1] for one in probs])
        assert torch.allclose(maps, prompted, atol=1e-6), site.name


def test_every_image_of_a_batch_has_its_own_maps(pipe: StableDiffusionPipeline) -> None:
    """Prompts come first, then their images, as in Gobelin."""
    prompts, noise = [PROMPT, "two stars"], torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    together = looked(pipe, prompts, num_images_per_prompt=2, latents=noise)
    assert [maps.words.text for maps in together] == [PROMPT, PROMPT, "two stars", "two stars"]
    for index in (1, 2):
        (alone,) = looked(pipe, together[index].words.text, latents=noise[index : index + 1])
        assert difference(together[index], alone) < 1e-5
        levels = [np.asarray(maps.image, dtype=int) for maps in (together[index], alone)]
        assert np.abs(levels[0] - levels[1]).max() <= 1
    assert difference(together[0], together[1]) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_only_the_half_with_the_prompt_is_seen(pipe: StableDiffusionPipeline, guidance: float) -> None:
    """At the first step both halves see the same noise, so that the prompt's maps are those without guidance."""
    (plain,) = looked(pipe, guidance_scale=1.0)
    (maps,) = looked(pipe, guidance_scale=guidance, negative_prompt="a star")
    assert difference(first_step(maps), first_step(plain)) < 1e-5


def test_the_negative_prompt_can_be_asked_for(pipe: StableDiffusionPipeline) -> None:
    (maps,) = looked(pipe, look={"negative": True}, negative_prompt="two stars")
    (positive,) = looked(pipe, "two stars", guidance_scale=1.0)
    assert maps.words.text == "two stars"
    assert difference(first_step(maps), first_step(positive)) < 1e-5
    (nothing,) = looked(pipe, look={"negative": True})
    assert nothing.words.text == ""
    assert sum(nothing.shares().values()) == pytest.approx(1)
    with gobelin.look_into(pipe, negative=True) as look:
        assert painted(pipe, guidance_scale=1.0).images
    with pytest.raises(UsageError, match="guidance was off"):
        _ = look.heatmaps


def first_step(maps: HeatMaps) -> HeatMaps:
    return maps.select(steps=[0])


def test_guidance_that_ends_on_the_way_is_followed(pipe: StableDiffusionPipeline) -> None:
    """diffusers' way to end it: a callback that leaves out the negative half of the texts."""

    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    options = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    (maps,) = looked(pipe, steps=3, **options)
    assert maps.steps == 3
    (once,) = looked(pipe, steps=3, look={"negative": True}, **options)
    assert once.steps == 1


def test_maps_take_no_more_memory_with_more_steps(pipe: StableDiffusionPipeline) -> None:
    gc.collect()
    gc.freeze()  # what is there already is not looked through
    alive: dict[int, int] = {}

    def count(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = [one for one in gc.get_objects() if type(one) is Tensor and one.ndim == 3 and one.shape[-1] == 16]
        alive[step] = sum(one.numel() for one in found)
        return tensors

    with gobelin.look_into(pipe):
        painted(pipe, steps=6, callback_on_step_end=count)
    gc.unfreeze()
    assert alive[5] == alive[1] > 0


def test_image_to_image_and_inpainting(parts: dict[str, Any], pipe: Any, words: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    mask = Image.new("L", image.size)
    mask.paste(255, (32, 0, 96, 64))
    (maps,) = looked(quiet(StableDiffusionImg2ImgPipeline(**parts)), image=image, strength=0.6, steps=5)
    assert (maps.steps, maps.image.size, maps.latent_size) == (3, (96, 64), (8, 12))
    for nine in (False, True):
        filling = {**parts, **({"unet": small_pipeline(words, 9).unet} if nine else {})}
        painter = quiet(StableDiffusionInpaintPipeline(**filling))
        options = {"image": image, "mask_image": mask, "height": 64, "width": 96}
        (maps,) = looked(painter, steps=1, **options)
        assert maps["circle"].raw.shape == (64, 96)
        with gobelin.look_into(painter), pytest.raises(UsageError, match="padding_mask_crop"):
            painted(painter, **options, padding_mask_crop=8)


def test_controlnet(parts: dict[str, Any], pipe: Any) -> None:
    control = fill_(
        ControlNetModel(
            block_out_channels=WIDTHS, cross_attention_dim=64, conditioning_embedding_out_channels=(8, 8, 8, 8)
        ),
        4,
    )
    painter = quiet(StableDiffusionControlNetPipeline(**parts, controlnet=control))
    image = Image.new("RGB", (64, 64), "red")
    for guess in (False, True):
        (maps,) = looked(painter, image=image, guess_mode=guess, steps=1)
        assert sum(maps.shares().values()) == pytest.approx(1)


def test_latent_consistency_models(parts: dict[str, Any]) -> None:
    """Guidance is an input of the U-Net, and there is no negative half."""
    torch.manual_seed(0)
    unet = fill_(
        UNet2DConditionModel(sample_size=8, block_out_channels=WIDTHS, cross_attention_dim=64, time_cond_proj_dim=32), 1
    )
    given = {**parts, "unet": unet, "scheduler": LCMScheduler.from_config(parts["scheduler"].config)}
    (maps,) = looked(quiet(LatentConsistencyModelPipeline(**given)), steps=4, guidance_scale=8.0)
    assert maps.steps == 4


def with_lora(pipe: Any, fused: bool = False) -> None:
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(lora, "style")
    if fused:
        pipe.fuse_lora()


def like_xformers(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """PyTorch's attention in the place of xFormers', which is not at hand, under diffusers' processor for it."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


WAYS: dict[str, tuple[Callable[[Any], Any], float, float]] = {  # and how far from the plain maps they may be
    "plain": (lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()), 0, 1e-5),
    "sliced": (lambda pipe: pipe.enable_attention_slicing("max"), 0, 1e-5),
    "xformers": (lambda pipe: pipe.unet.set_attn_processor(XFormersAttnProcessor()), 0, 1e-5),
    "inference": (lambda pipe: None, 0, 0),
    "bfloat16": (lambda pipe: pipe.to(torch.bfloat16), 1e-5, 0.2),
    "float16": (lambda pipe: pipe.to(torch.float16), 1e-6, 0.05),
    "autocast": (lambda pipe: None, 1e-5, 0.2),
    "LoRA": (with_lora, 1e-3, 1),
    "fused LoRA": (lambda pipe: with_lora(pipe, fused=True), 1e-3, 1),
    "FreeU": (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), 1e-3, 1),
}


@pytest.fixture(scope="module")
def plain_maps(words: Path) -> HeatMaps:
    return looked(quiet(small_pipeline(words)), steps=1)[0]


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_running(words: Path, plain_maps: HeatMaps, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is compared with the untraced one of the same way, and maps with those of the plain way."""
    ops = SimpleNamespace(memory_efficient_attention=like_xformers)
    monkeypatch.setattr("diffusers.models.attention_processor.xformers", SimpleNamespace(ops=ops))
    change, low, high = WAYS[way]
    painter = quiet(small_pipeline(words))
    change(painter)
    processors = dict(painter.unet.attn_processors)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if way == "autocast" else torch.no_grad()
    with torch.inference_mode(way == "inference"), context:
        (maps,) = looked(painter, steps=1)
    assert is_untouched(painter, processors)
    assert all(one.dtype == torch.float32 for one in maps.maps.values())
    assert sum(maps.shares().values()) == pytest.approx(1, abs=1e-5)
    assert low <= difference(maps, plain_maps) <= high


def test_offloading(words: Path, plain_maps: HeatMaps) -> None:
    """The whole network, and layer by layer, whose weights are away in between."""
    painter = quiet(small_pipeline(words))
    painter.enable_model_cpu_offload(device="cpu")
    assert difference(looked(painter, steps=1)[0], plain_maps) == 0
    painter.remove_all_hooks()
    accelerate.cpu_offload(painter.unet, torch.device("cpu"))
    assert difference(looked(painter, steps=1)[0], plain_maps) == 0


def test_an_ip_adapters_image_leaves_the_words_their_own_attention(words: Path) -> None:
    """The text's probabilities sum to 1; what the image adds has none of them."""
    painter = quiet(small_pipeline(words))
    tensors = {"image_proj": {}, "ip_adapter": {}}
    tensors["image_proj"] = {"proj.weight": torch.randn(4 * 64, 12) / 4, "proj.bias": torch.zeros(4 * 64)}
    tensors["image_proj"] |= {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)}
    sites = [one for one in gobelin.diffusers_pipelines.find_attention(painter.unet) if one.kind == "cross"]
    order = sorted(sites, key=lambda site: ("down", "up", "mid").index(site.name.split("_")[0]))
    for number, site in enumerate(order):
        width = painter.unet.get_submodule(site.name).to_k.out_features
        for name in ("k", "v"):
            tensors["ip_adapter"][f"{2 * number + 1}.to_{name}_ip.weight"] = torch.randn(width, 64) / 8
    painter.unet._load_ip_adapter_weights([tensors])
    embeddings = [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0))]
    with_image = looked(painter, trace=True, steps=1, ip_adapter_image_embeds=embeddings)[0]
    assert sum(with_image.shares().values()) == pytest.approx(1, abs=1e-5)
    other = looked(painter, trace=True, steps=1, ip_adapter_image_embeds=[-embeddings[0]])[0]
    assert difference(with_image, other) > 1e-5


def test_a_word_of_several_vectors_is_one_word(pipe: StableDiffusionPipeline, words: Path) -> None:
    painter = quiet(small_pipeline(words))
    painter.load_textual_inversion({"<cat>": torch.randn(3, 64)}, token="<cat>")
    painter.load_textual_inversion({"<dog>": torch.randn(1, 64)}, token="<dog>")
    (maps,) = looked(painter, "a <cat> left of <dog>, a circle")
    spans = {span.word: span.tokens for span in maps.words.spans}
    ids = painter.tokenizer(
        painter.maybe_convert_prompt("a <cat> left of <dog>, a circle", painter.tokenizer)
    ).input_ids
    said = painter.tokenizer.convert_ids_to_tokens(ids)
    (cat,) = [tokens for word, tokens in spans.items() if "cat" in word]
    (dog,) = [tokens for word, tokens in spans.items() if "dog" in word]
    assert [said[place] for place in cat] == ["<cat>", "<cat>_1", "<cat>_2"]
    assert [said[place] for place in dog] == ["<dog>"]
    assert maps["circle"].raw.max() > 0


def long_pipeline(words: Path) -> Any:
    """A pipeline whose texts have 77 tokens."""
    painter = quiet(small_pipeline(words))
    tokenizer = Tokenizer.from_pretrained(words)
    folder = words.parent / "long"
    Tokenizer(dict(tokenizer.vocab), tokenizer.merges, max_length=77).save_pretrained(folder)
    painter.tokenizer = CLIPTokenizer.from_pretrained(folder)
    return painter


LONG = ", ".join(["a red circle left of a blue square"] * 12) + " and a star"


def test_embeddings_of_several_chunks_have_the_words_of_a_text(words: Path) -> None:
    painter = long_pipeline(words)
    both = {name: torch.randn(2, 154, 64) for name in ("prompt_embeds", "negative_prompt_embeds")}

    def maps_of(prompt: Any, rows: int = 1, length: int = 154, **more: Any) -> list[HeatMaps]:
        embeddings = {name: tensor[:rows, :length] for name, tensor in both.items()}
        return looked(painter, None, trace=True, look={"prompt": prompt, **more}, steps=1, **embeddings)

    (maps,) = maps_of(LONG)
    assert {probs.shape[-1] for probs in maps.maps.values()} == {154}
    assert max(maps.words.tokens("star")) > 77
    assert [span.word for span in maps.words.spans] == LONG.replace(",", "").split()
    assert sum(maps.shares().values()) == pytest.approx(1, abs=1e-5)
    (cut,) = maps_of(LONG, length=77)
    assert cut.words.length == 77
    assert not cut.words.has("star")
    padded, two = maps_of(["a star", "two"], rows=2)
    assert len(padded.words.part("padding")) == 154 - 2 - len(padded.words.part("text"))
    assert two.words.text == "two"
    (weighed,) = maps_of("a (star:1.3) BREAK two", weights="a1111")
    assert weighed.words.tokens("two")[0] == 78


def test_a_prompt_that_diffusers_cuts_has_the_words_that_are_left(pipe: StableDiffusionPipeline) -> None:
    (maps,) = looked(pipe, LONG)
    assert maps.words.length == 16
    assert len(maps.words.part("text")) == 14
    assert not maps.words.has("star")


def test_kinds_of_output(pipe: StableDiffusionPipeline) -> None:
    for kind in ("pil", "np", "pt", "latent"):
        for as_dict in (True, False):
            with gobelin.look_into(pipe) as look:
                output = painted(pipe, [PROMPT, "a star"], steps=1, output_type=kind, return_dict=as_dict)
            images = output.images if as_dict else output[0]
            assert [maps.image.size for maps in look.heatmaps] == [(64, 64)] * 2
            if kind == "np":
                levels = [np.asarray(maps.image) for maps in look.heatmaps]
                assert np.array_equal(np.stack(levels), np.round(images * 255).astype(np.uint8))


def test_several_calls_and_what_they_leave(pipe: StableDiffusionPipeline) -> None:
    processors, kind = dict(pipe.unet.attn_processors), type(pipe)
    with gobelin.look_into(pipe) as look:
        assert type(pipe).__name__ == kind.__name__
        assert isinstance(pipe, kind)
        with pytest.raises(UsageError, match="nothing has been painted"):
            _ = look.heatmaps
        assert look._repr_html_() is None
        painted(pipe)
        first = look.heatmaps[0]
        painted(pipe, "a star", height=64, width=128)
        assert (look.heatmaps[0].words.text, look.heatmaps[0].image.size) == ("a star", (128, 64))
        with pytest.raises(ValueError, match="divisible"):
            painted(pipe, height=60, width=60)
        with pytest.raises(UsageError, match="did not finish"):
            _ = look.heatmaps
        with pytest.raises(TypeError):
            pipe(PROMPT, prompt=PROMPT)
        with pytest.raises(UsageError, match="the prompt is 3"):
            painted(pipe, 3)
        painted(pipe)
        assert difference(look.heatmaps[0], first) == 0
        assert is_untouched(pipe, processors)

        def stop(*_: Any) -> Any:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            painted(pipe, callback_on_step_end=stop)
        assert is_untouched(pipe, processors)
    assert type(pipe) is kind
    with look:
        painted(pipe, "two")
    assert look.heatmaps[0].words.text == "two"
    assert look._repr_html_() == look.heatmaps[0]._repr_html_()
    with pytest.raises(RuntimeError, match="broken"), gobelin.look_into(pipe):
        raise RuntimeError("broken")
    assert type(pipe) is kind


def is_untouched(pipe: Any, processors: dict[str, Any]) -> bool:
    """Whether nothing hears the U-Net, and its processors are those that it had."""
    hooks = [hook for one in pipe.unet.modules() for hook in (*one._forward_hooks, *one._forward_pre_hooks)]
    return not hooks and dict(pipe.unet.attn_processors) == processors


def test_two_pipelines_of_one_network_may_be_looked_into(parts: dict[str, Any], pipe: Any) -> None:
    other = quiet(StableDiffusionImg2ImgPipeline(**parts))
    with gobelin.look_into(pipe) as one, gobelin.look_into(other) as two:
        image = painted(pipe).images[0]
        painted(other, "a star", image=image, strength=0.5, steps=4)
    assert (one.heatmaps[0].words.text, two.heatmaps[0].words.text) == (PROMPT, "a star")


class Own(AttnProcessor2_0):
    """A processor of somebody's own."""


def test_what_cannot_be_traced_is_refused_before_it_is_painted(
    parts: dict[str, Any], pipe: StableDiffusionPipeline, words: Path
) -> None:
    embeddings = torch.zeros(1, 16, 64)
    with gobelin.look_into(pipe), pytest.raises(UsageError, match="prompt_embeds and no text"):
        painted(pipe, None, prompt_embeds=embeddings, negative_prompt_embeds=embeddings)
    pipe.unet.set_attn_processor(Own())
    with gobelin.look_into(pipe), pytest.raises(UsageError, match=r"attn2 has the attention processor Own"):
        painted(pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    perturbed = quiet(StableDiffusionPAGPipeline(**parts))
    for guidance in (1.0, 5.0):
        with gobelin.look_into(perturbed), pytest.raises(UsageError, match="for 1 images"):
            painted(perturbed, guidance_scale=guidance)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    eight = quiet(StableDiffusionInstructPix2PixPipeline(**{**parts, "unet": small_pipeline(words, 8).unet}))
    with gobelin.look_into(eight), pytest.raises(UsageError, match="3 latents and 3 texts for 1 images"):
        painted(eight, image=Image.new("RGB", (64, 64)))
    long = long_pipeline(words)
    both = {name: torch.randn(1, 90, 64) for name in ("prompt_embeds", "negative_prompt_embeds")}
    with gobelin.look_into(long, prompt="a star"), pytest.raises(UsageError, match="90 tokens"):
        painted(long, None, **both)
    with gobelin.look_into(pipe, prompt=["a", "b"]), pytest.raises(UsageError, match="one of each"):
        painted(pipe, None, prompt_embeds=embeddings, negative_prompt_embeds=embeddings)
    with gobelin.look_into(pipe), pytest.raises(UsageError, match="already"):
        gobelin.look_into(pipe).__enter__()


def sdxl() -> Any:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=WIDTHS,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet, scheduler=None
    )


def sd2(pipe: Any) -> Any:
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=WIDTHS, cross_attention_dim=64, use_linear_projection=True
    )
    return StableDiffusionPipeline(**{**pipe.components, "unet": unet, "requires_safety_checker": False})


def without_tokenizer(pipe: Any) -> Any:
    return StableDiffusionPipeline(**{**pipe.components, "tokenizer": None, "requires_safety_checker": False})


def compiled(pipe: Any) -> Any:
    parts = {**pipe.components, "requires_safety_checker": False}
    made = StableDiffusionPipeline(**parts)
    made.unet = torch.compile(made.unet)
    return made


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "text": (lambda pipe: "pipe", {}, "look_into is given 'pipe'"),
    "nothing": (lambda pipe: None, {}, "look_into is given None"),
    "a U-Net": (lambda pipe: pipe.unet, {}, "look_into is given a UNet2DConditionModel"),
    "a class": (lambda pipe: StableDiffusionPipeline, {}, "look_into is given"),
    "Gobelin's own": (lambda pipe: gobelin.Pipeline.from_pretrained(), {}, "trace=True"),
    "SDXL": (lambda pipe: sdxl(), {}, "addition_embed_type 'text_time'"),
    "SD 2": (lambda pipe: sd2(pipe), {}, "use_linear_projection True"),
    "no tokenizer": (without_tokenizer, {}, "no tokenizer"),
    "compiled": (compiled, {}, "is compiled"),
    "no trace": (None, {"trace": False}, "trace is False"),
    "words beside the prompt": (None, {"trace": Trace(also=("dog",))}, "has neither also nor negative"),
    "another trace": (None, {"trace": "blunt"}, "trace is 'blunt'"),
    "sites that are not there": (None, {"trace": Trace(sites="attn9")}, "matches no attention"),
    "a prompt that is none": (None, {"prompt": 3}, "the prompt is 3"),
    "prompts that are none": (None, {"prompt": ["a", 3]}, "the prompt is"),
    "half a negative": (None, {"negative": "yes"}, "negative is 'yes'"),
    "another syntax": (None, {"weights": "novelai"}, "weights is 'novelai'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_looked_into_is_refused(pipe: StableDiffusionPipeline, case: str) -> None:
    make, options, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        gobelin.look_into(pipe if make is None else make(pipe), **options)


def test_nothing_of_diffusers_is_imported() -> None:
    code = "import sys, gobelin; gobelin.look_into; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
