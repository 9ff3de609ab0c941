"""Features together: every pair of them paints, and those that must not matter to each other do not.

A covering array has every pair of choices in some case; the model is small, of Stable Diffusion 1.x's kind, with CLIP's
vocabulary, so that long prompts have several chunks.
"""

import json
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.conftest import sentence_of
from torch import Tensor

from gobelin.attention import AttentionSite
from gobelin.control import (
    AttentionGuidance,
    EditGuidance,
    LocalBlend,
    Region,
    attend_and_excite,
    box_guidance,
    prompt_to_prompt,
    regional_attention,
    reweight,
    suppress,
)
from gobelin.guidance import (
    adaptive_projected_guidance,
    cfg_zero_star,
    classifier_free_guidance,
    guidance_interval,
    perturbed_attention_guidance,
)
from gobelin.pipeline import Pipeline, Result

FEATURES: dict[str, tuple[Any, ...]] = {
    "image": ("none", "img2img", "mask"),
    "prompt": ("short", "long"),
    "negative": ("none", "short", "long"),
    "control": (
        "none",
        "prompt_to_prompt",
        "local_blend",
        "edit_guidance",
        "flowedit",
        "reweight",
        "suppress",
        "regional_attention",
        "box_guidance",
        "attend_and_excite",
        "function",
    ),
    "lora": (False, True),
    "trace": (False, True, "sharp"),
    "batch": (1, 2),
    "channels": (4, 9),
    "sampler": ("ddim", "euler_ancestral", "heun", "dpmpp_2m", "pndm"),
    "syntax": ("plain", "a1111", "comfyui", "none"),
    "guidance": ("number", "none", "interval", "apg", "zero_star", "pag"),
    "shortcuts": ("none", "cached", "merged", "cached and merged"),
}
PAIRS = ("prompt_to_prompt", "local_blend", "edit_guidance", "flowedit")  # controls of two images
Case = dict[str, Any]


def is_possible(case: Case) -> bool:
    """Leave out what is refused, which tests of its own see to; the features of ``case`` may be some of all."""
    inpainting = case.get("channels") == 9 and case.get("image", "mask") != "mask"
    several_edits = case.get("control") == "flowedit" and case.get("batch") == 2
    return not inpainting and not several_edits


def covering_array(seed: int = 0) -> list[Case]:
    """Cases in which every possible pair of choices occurs: each one takes, of 30 drawn, what covers most."""
    draw = random.Random(seed)
    left = {
        pair
        for one, other in combinations(FEATURES, 2)
        for pair in (((one, a), (other, b)) for a in FEATURES[one] for b in FEATURES[other])
        if is_possible(dict(pair))
    }
    cases = []

    def covered(case: Case) -> set:
        return left & set(combinations(case.items(), 2))

    while left:
        first = min(left, key=repr)
        drawn = []
        while len(drawn) < 30:
            case = {name: draw.choice(choices) for name, choices in FEATURES.items()} | dict(first)
            if is_possible(case):
                drawn.append(case)
        case = max(drawn, key=lambda one: len(covered(one)))
        left -= covered(case)
        cases.append(case)
    return cases


CASES = covering_array()
LONG = ", seen from far away in the morning light" * 11  # 99 tokens
PROMPTS = {"plain": "a {} cat and a dog", "a1111": "a ({}:1.3) cat and [a dog]", "comfyui": "a ({}:1.3) cat and a dog"}
LORA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT_LORA = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def models(clip_model: Callable[..., Any]) -> dict[int, Pipeline]:
    return {channels: Pipeline(clip_model(channels)) for channels in (4, 9)}


@pytest.fixture(scope="module")
def pipe(models: dict[int, Pipeline]) -> Pipeline:
    return models[4]


@pytest.fixture(scope="module")
def lora(models: dict[int, Pipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for base, (out, into) in ((LORA, (64, 32)), (TEXT_LORA, (32, 32))):
        tensors[f"{base}.lora_down.weight"] = torch.randn(2, into, generator=draw) * 0.3
        tensors[f"{base}.lora_up.weight"] = torch.randn(out, 2, generator=draw) * 0.3
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    hole = np.zeros((64, 64), np.uint8)
    hole[16:48, 24:64] = 255
    return Image.fromarray(hole)


def identity(site: AttentionSite, probs: Tensor) -> Tensor:
    return probs


def dimmed(site: AttentionSite, probs: Tensor) -> Tensor:
    return probs * 0.9


def guidance_of(name: str) -> Any:
    plain = classifier_free_guidance(4.0)
    return {
        "number": 4.0,
        "none": 1.0,
        "interval": guidance_interval(plain, 0.3, 1.0),
        "apg": adaptive_projected_guidance(4.0),
        "zero_star": cfg_zero_star(4.0),
        "pag": perturbed_attention_guidance(plain, 1.0),
    }[name]


def controls_of(name: str, rows: tuple[int, int]) -> Any:
    cat = {"cat": Region.box(0, 0, 0.5, 1)}
    return {
        "none": (),
        "flowedit": (),
        "prompt_to_prompt": prompt_to_prompt(rows=rows),
        "local_blend": [prompt_to_prompt(rows=rows), LocalBlend(rows=rows)],
        "edit_guidance": EditGuidance(rows=rows),
        "reweight": reweight({"cat": 2, "dog": 0}),
        "suppress": suppress("dog"),
        "regional_attention": regional_attention(cat),
        "box_guidance": box_guidance(cat, strength=0.1),
        "attend_and_excite": attend_and_excite("cat", "dog", strength=0.1),
        "function": dimmed,
    }[name]


def painting_of(case: Case, image: Image.Image, mask: Image.Image) -> tuple[list[str], dict[str, Any]]:
    """The prompts and the settings of a case."""
    style = PROMPTS.get(case["syntax"], PROMPTS["plain"])
    paired = case["control"] in PAIRS
    prompts = [
        style.format(word) + (LONG if case["prompt"] == "long" and number == 0 else "")
        for number, word in enumerate(["red", "blue"][: 2 if paired or case["batch"] == 2 else 1])
    ]
    count = case["batch"] if paired else 1
    settings: dict[str, Any] = {
        "seed": 7,
        "steps": 2,
        "count": count,
        "sampler": case["sampler"],
        "guidance": guidance_of(case["guidance"]),
        "trace": case["trace"],
        "control": controls_of(case["control"], (0, count)),
    }
    if "cached" in case["shortcuts"]:
        settings |= {"cache_interval": 2, "steps": 3}
    if "merged" in case["shortcuts"]:
        settings["merge_tokens"] = 0.5
    if case["negative"] != "none":
        settings["negative_prompt"] = "blurred" + (LONG * 2 if case["negative"] == "long" else "")
    if case["syntax"] != "plain":
        settings["weights"] = case["syntax"]
    if case["image"] != "none":
        settings["init_image"] = image
    if case["image"] == "mask":
        settings["mask"] = mask
    return prompts, settings


def paint(pipe: Pipeline, case: Case, image: Image.Image, mask: Image.Image, **changes: Any) -> Result:
    prompts, settings = painting_of(case, image, mask)
    settings |= changes
    if case["control"] == "flowedit":
        return pipe.edit(prompts[0], prompts[1], **settings)
    return pipe(prompts, **settings)


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two images in levels of 255."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def test_the_cases_have_every_pair_of_choices() -> None:
    seen = {pair for case in CASES for pair in combinations(case.items(), 2)}
    for one, other in combinations(FEATURES, 2):
        for a in FEATURES[one]:
            for b in FEATURES[other]:
                assert not is_possible({one: a, other: b}) or ((one, a), (other, b)) in seen
    assert len(CASES) < 120


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_features_paints(
    case: Case, models: dict[int, Pipeline], lora: Path, image: Image.Image, mask: Image.Image
) -> None:
    """Finite images with the maps that were asked for; and tracing them changes no bit."""
    pipe = models[case["channels"]]
    if case["lora"]:
        pipe.load_lora(lora)
    try:
        result = paint(pipe, case, image, mask)
        plain = paint(pipe, case, image, mask, trace=False) if case["trace"] else result
    finally:
        for name in list(pipe.loras.weights):
            pipe.loras.remove(name)
    assert result.latents.isfinite().all()
    pairs = 2 if case["control"] in PAIRS else 1
    assert len(result.images) == len(result.settings) == max(pairs * case["batch"], case["batch"])
    assert all(one.size == (64, 64) and np.asarray(one).std() > 2 for one in result.images)
    assert torch.equal(result.latents, plain.latents)
    if case["trace"]:
        for heatmaps in result.heatmaps:
            assert heatmaps["cat"].raw.isfinite().all()
            assert heatmaps["cat"].raw.shape == (64, 64)
            assert {"cat", "dog"} <= {span.word for span in heatmaps.words.spans}
    if case["image"] == "mask":
        outside = np.asarray(mask) == 0
        assert all((np.asarray(one)[outside] == np.asarray(image)[outside]).all() for one in result.images)
    json.dumps(result.settings)


@pytest.mark.parametrize("kind", ["none", "img2img"])
def test_an_inpainting_model_asks_for_a_mask(models: dict[int, Pipeline], kind: str, image: Image.Image) -> None:
    options = {} if kind == "none" else {"init_image": image}
    said = sentence_of(lambda: models[9]("a cat", steps=1, **options))
    assert said is not None
    assert "give init_image and a mask" in said


# What must not matter


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [*((sampler, "none") for sampler in FEATURES["sampler"]), ("ddim", "img2img"), ("heun", "mask"), ("pndm", "mask")],
)
def test_an_image_does_not_depend_on_its_neighbours(
    pipe: Pipeline, sampler: str, kind: str, image: Image.Image, mask: Image.Image
) -> None:
    """Short and long prompts in one batch are what each is alone, from the settings that it remembers."""
    prompts = ["a red cat", "a red cat" + LONG, "a (blue:1.4) dog" + LONG * 2]
    options: dict[str, Any] = {} if kind == "none" else {"init_image": image}
    options |= {"mask": mask} if kind == "mask" else {}
    together = pipe(prompts, seed=3, steps=2, sampler=sampler, negative_prompt="grey", **options)
    for place, prompt in enumerate(prompts):
        remembered = json.loads(json.dumps(together.settings[place]))
        assert remembered.pop("prompt") == prompt
        for name in ("model", "init_image", "mask"):
            remembered.pop(name, None)
        alone = pipe(prompt, **remembered, **options)
        assert apart(alone.images[0], together.images[place]) <= 1
        assert {**alone.settings[0]} == {**together.settings[place]}


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_a_long_negative_prompt_is_one_prompts_own(pipe: Pipeline, long: bool) -> None:
    negative = "grey" + LONG * 3
    prompts = ["a red cat", "a red cat" + LONG * (4 if long else 1)]
    together = pipe(prompts, seed=[3, 4], steps=2, negative_prompt=negative)
    alone = pipe(prompts[0], seed=3, steps=2, negative_prompt=negative)
    assert apart(together.images[0], alone.images[0]) <= 1


ROW_CONTROLS: dict[str, Callable[[], Any]] = {
    "reweight": lambda: reweight({"cat": 3}, rows=[1]),
    "suppress": lambda: suppress("cat", rows=[1]),
    "regional_attention": lambda: regional_attention({"cat": Region.box(0, 0, 0.5, 1)}, rows=[1]),
    "box_guidance": lambda: box_guidance({"cat": Region.box(0, 0, 0.5, 1)}, rows=[1]),
    "attend_and_excite": lambda: attend_and_excite("cat", rows=[1]),
    "attention_guidance": lambda: AttentionGuidance(
        loss=lambda maps: torch.stack([probs[..., 0].mean(dim=1) for probs in maps.values()]).mean(dim=0), rows=[1]
    ),
    "prompt_to_prompt": prompt_to_prompt,
    "local_blend": lambda: LocalBlend(start=0, threshold=0.99),
    "edit_guidance": EditGuidance,
}


@pytest.mark.parametrize("lengths", [(0, 0), (0, 1), (1, 0)], ids=["short", "short+long", "long+short"])
@pytest.mark.parametrize("name", ROW_CONTROLS)
def test_a_control_of_the_second_image_leaves_the_first(pipe: Pipeline, name: str, lengths: tuple[int, int]) -> None:
    prompts = ["a red cat" + LONG * lengths[0], "a blue cat" + LONG * lengths[1]]
    options = {"seed": 5, "steps": 2, "negative_prompt": "grey" + LONG * 2}
    plain, controlled = (pipe(prompts, **options, control=control) for control in ((), ROW_CONTROLS[name]()))
    assert apart(controlled.images[0], plain.images[0]) <= 1
    assert not torch.equal(controlled.latents[1], plain.latents[1])


@pytest.mark.parametrize("prompt", ["a red cat", "a red cat" + LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    "control",
    [
        reweight({"cat": 1}),
        [reweight({"cat": 4}), reweight({"cat": 0.25})],
        reweight({}),
        identity,
        attend_and_excite("cat", strength=0),
        box_guidance({"cat": Region.box(0, 0, 0.5, 1)}, strength=0),
        regional_attention({"cat": Region.box(0, 0, 0.5, 1)}, end=0),
        None,
        [],
    ],
    ids=["once", "there and back", "no words", "identity", "excite 0", "box 0", "until 0", "None", "none"],
)
def test_controls_that_change_nothing_change_no_bit(pipe: Pipeline, prompt: str, control: Any) -> None:
    plain, same = (pipe(prompt, seed=1, steps=2, control=one) for one in ((), control))
    assert torch.equal(same.latents, plain.latents)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"negative_prompt": ""}, {"negative_prompt": None}),
        ({}, {"negative_prompt": None}),
        ({"guidance": 3.0}, {"guidance": classifier_free_guidance(3.0)}),
        ({"guidance": 3.0}, {"guidance": guidance_interval(classifier_free_guidance(3.0), 0.0, 1.0)}),
        ({"guidance": 3.0}, {"guidance": perturbed_attention_guidance(classifier_free_guidance(3.0), 0.0)}),
        ({"guidance": 1.0}, {"guidance": 1.0, "negative_prompt": "grey" + LONG}),
        ({"weights": "a1111"}, {"weights": None}),
        ({"weights": "none"}, {"weights": "comfyui"}),
        ({"clip_skip": 0}, {"clip_skip": None}),
        ({"height": 64, "width": 64}, {}),
        ({"seed": 0}, {"seed": [0]}),
        ({"guidance_rescale": 0.0}, {}),
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_two_ways_of_saying_the_same_paint_the_same(pipe: Pipeline, one: dict, other: dict) -> None:
    first, second = (pipe("a red cat", **{"seed": 0, "steps": 2, **options}) for options in (one, other))
    assert apart(first.images[0], second.images[0]) <= (1 if "grey" in str(other) else 0)
    if "grey" not in str(other):
        assert torch.equal(first.latents, second.latents)


def test_a_lora_of_no_weight_and_one_that_was_taken_out_change_no_bit(pipe: Pipeline, lora: Path) -> None:
    plain = pipe("a red cat", seed=1, steps=2)
    name = pipe.load_lora(lora, weight=0.0)
    nothing = pipe("a red cat", seed=1, steps=2)
    pipe.loras.set_weight(name, 1.0)
    changed = pipe("a red cat", seed=1, steps=2)
    pipe.loras.remove(name)
    assert torch.equal(nothing.latents, plain.latents)
    assert not torch.equal(changed.latents, plain.latents)
    assert torch.equal(pipe("a red cat", seed=1, steps=2).latents, plain.latents)


WORD_CONTROLS = [name for name in ROW_CONTROLS if name not in ("attention_guidance", "edit_guidance")]


@pytest.mark.parametrize(("one", "other"), list(combinations(WORD_CONTROLS, 2)))
def test_every_two_controls_go_together(pipe: Pipeline, one: str, other: str) -> None:
    prompts = ["a red cat", "a blue cat" + LONG]
    controls = [ROW_CONTROLS[one](), ROW_CONTROLS[other]()]
    result = pipe(prompts, seed=5, steps=2, sampler="ddim", control=controls)
    assert result.latents.isfinite().all()
    assert apart(result.images[0], pipe(prompts, seed=5, steps=2, sampler="ddim").images[0]) <= 1
