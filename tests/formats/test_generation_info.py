"""Images of other programs, built as each program writes them: their settings are read, and what is missing is said."""

import gzip
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gobelin.errors import DataError
from gobelin.formats.generation_info.all_programs import read_generation_info
from gobelin.formats.generation_info.draft import GenerationInfo
from gobelin.formats.generation_info.image_texts import MAX_TEXT
from gobelin.samplers import SAMPLERS

USER_COMMENT, EXIF_IFD, ORIENTATION = 0x9286, 0x8769, 0x0112
FORMATS = ("jpeg", "webp", "png")


def read(file: Path) -> GenerationInfo:
    return read_generation_info(file, SAMPLERS)


def refusal(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(file)
    sentence = str(caught.value)
    assert sentence.startswith(str(file))
    assert len(sentence) < 500 + len(str(file))
    return sentence


def png(file: Path, **texts: str) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name.replace("__", " "), text)
    Image.new("RGB", (16, 16)).save(file, pnginfo=info)
    return file


def with_exif(file: Path, base: dict[int, Any], inner: dict[int, Any] | None = None, **options: Any) -> Path:
    exif = Image.Exif()
    exif.update(base)
    if inner:
        exif.get_ifd(EXIF_IFD).update(inner)
    Image.new("RGB", (16, 16)).save(file, exif=exif, **options)
    return file


def with_comment(file: Path, comment: bytes) -> Path:
    return with_exif(file, {ORIENTATION: 1}, {USER_COMMENT: comment})


def said(found: GenerationInfo) -> list[str]:
    """What is missing, but for the noise that each program draws in its way."""
    assert "other noise for a seed" in found.missing[0]
    assert found.missing[0].startswith(found.source)
    return [one for one in found.missing[1:] if not one.startswith("the image is 16 x 16")]


# AUTOMATIC1111, modules/images.py (save_image_with_geninfo), modules/processing.py (create_infotext)
A1111 = (
    "a castle 城, (sunset:1.2)\nNegative prompt: blurry\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x96, "
    "Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, Version: v1.10.1"
)
A1111_SETTINGS = {
    "prompt": "a castle 城, (sunset:1.2)",
    "negative_prompt": "blurry",
    "weights": "a1111",
    "steps": 20,
    "sampler": "dpmpp_2m_karras",
    "guidance": 7.5,
    "seed": 7,
    "width": 64,
    "height": 96,
    "clip_skip": 1,
    "model": "v1-5",
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + A1111.encode("utf-16-be"),  # piexif's, as AUTOMATIC1111 writes it
        b"UNICODE\0" + A1111.encode("utf-16-le"),  # ImageSharp's
        b"UNICODE\0" + A1111.encode("utf-16"),
        b"UNICODE\0" + b"\xfe\xff" + A1111.encode("utf-16-be"),
        b"ASCII\0\0\0" + A1111.encode(),
        bytes(8) + A1111.encode(),
        A1111.encode(),
        b"UNICODE\0" + A1111.replace("\n", "\r\n").encode("utf-16-be") + b"\0\0",
    ],
    ids=["big", "little", "mark", "big mark", "ascii", "undefined", "none", "crlf"],
)
def test_an_exif_comment_is_read_in_every_charset(suffix: str, comment: bytes, tmp_path: Path) -> None:
    found = read(with_comment(tmp_path / f"x.{suffix}", comment))
    assert (found.settings, found.source, said(found)) == (A1111_SETTINGS, "AUTOMATIC1111", [])


def test_a_comment_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    assert "holds an EXIF comment that cannot be decoded" in refusal(
        with_comment(tmp_path / "x.jpg", b"ASCII\0\0\0\xff\xfe\xfd")
    )


def test_a_jpeg_comment_is_read_and_a_camera_s_is_none(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", comment=A1111.encode())
    assert read(tmp_path / "x.jpg").settings == A1111_SETTINGS
    Image.new("RGB", (16, 16)).save(tmp_path / "y.jpg", comment=b"Created with GIMP")
    assert "does not say how it was made" in refusal(tmp_path / "y.jpg")


def test_texts_after_the_pixels_are_read(tmp_path: Path) -> None:
    whole = png(tmp_path / "x.png", parameters=A1111).read_bytes()
    start = whole.index(b"iTXt") - 4
    end = whole.index(b"IDAT") - 4
    last = whole.index(b"IEND") - 4
    (tmp_path / "y.png").write_bytes(whole[:start] + whole[end:last] + whole[start:end] + whole[last:])
    assert read(tmp_path / "y.png").settings == A1111_SETTINGS


@pytest.mark.parametrize(
    ("added", "source", "missing"),
    [
        (
            "Version: f2.0.1v1.10.1-previous-304, Diffusion in Low Bits: Automatic",
            "Forge",
            ["Diffusion in Low Bits: Automatic"],
        ),
        (
            "Parser: native, Backend: Diffusers, App: SD.Next, Version: 2d1ac5e, Operations: txt2img; hires, "
            "Pipeline: StableDiffusionPipeline, Second pass: True",
            "SD.Next",
            ["Parser: native", "Operations: txt2img; hires", "Second pass: True"],
        ),
        ("Version: stable-diffusion.cpp, RNG: cuda", "stable-diffusion.cpp", ["RNG: cuda"]),
        (
            "Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: Latent, ENSD: 31337, Eta: 0.5, RNG: CPU, "
            "NGMS: 4",
            "AUTOMATIC1111",
            [
                *("Denoising strength: 0.5", "Hires upscale: 2", "Hires upscaler: Latent", "ENSD: 31337", "Eta: 0.5"),
                *("RNG: CPU", "NGMS: 4"),
            ],
        ),
        (
            'ADetailer model: face.pt, ADetailer prompt: "a face, \\"smiling\\": wide", Lora hashes: "a: 1, b: 2", '
            'TI hashes: "easynegative: c74b4e810b03", Tiling: True, Face restoration: CodeFormer, Emphasis: No norm',
            "AUTOMATIC1111",
            [
                *("ADetailer model: face.pt", 'ADetailer prompt: a face, "smiling": wide', "Lora hashes: a: 1, b: 2"),
                *("TI hashes: easynegative: c74b4e810b03", "Tiling: True", "Face restoration: CodeFormer"),
                "Emphasis: No norm",
            ],
        ),
        (
            "Variation seed: 5, Variation seed strength: 0.2, Mask blur: 4, Refiner: x, Refiner switch at: 0.8, "
            "VAE: mse",
            "AUTOMATIC1111",
            [
                *("Variation seed: 5", "Variation seed strength: 0.2", "Mask blur: 4", "Refiner: x"),
                *("Refiner switch at: 0.8", "VAE: mse"),
            ],
        ),
        (
            'Hashes: {"model": "6ce0161689"}, Batch size: 4, Batch pos: 1, VAE hash: 1, VAE: Automatic',
            "AUTOMATIC1111",
            [],
        ),
    ],
)
def test_fields_that_change_an_image_are_said(added: str, source: str, missing: list[str], tmp_path: Path) -> None:
    text = f"a ring\nSteps: 4, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 64x64, Model: v1-5, {added}"
    found = read(png(tmp_path / "x.png", parameters=text))
    assert (found.source, said(found)) == (source, missing)
    assert found.settings["sampler"] == "euler_ancestral"


def test_civitais_resources_are_one_value(tmp_path: Path) -> None:
    """Civitai, src/utils/metadata/automatic.metadata.ts."""
    resources = (
        'Civitai resources: [{"type":"checkpoint","modelVersionId":128713,"modelName":"DreamShaper"},'
        '{"type":"lora","weight":0.8,"modelVersionId":87153,"modelName":"More details"},'
        '{"type":"embed","weight":1,"modelVersionId":77169}], Civitai metadata: {"remixOfId": 1}'
    )
    text = f"a ring\nSteps: 30, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 64x64, Clip skip: 2, {resources}"
    found = read(png(tmp_path / "x.png", parameters=text))
    assert found.source == "Civitai"
    assert said(found) == ["the lora More details with weight 0.8", "the embed version 77169 on Civitai with weight 1"]
    assert (found.settings["model"], found.settings["clip_skip"]) == ("DreamShaper", 1)


def test_an_image_that_went_through_extras_is_said(tmp_path: Path) -> None:
    found = read(png(tmp_path / "x.png", parameters=A1111, postprocessing="Postprocess upscale by: 2"))
    assert said(found) == ["postprocessing: Postprocess upscale by: 2"]


def test_lines_after_the_fields_are_no_prompt(tmp_path: Path) -> None:
    found = read(png(tmp_path / "x.png", parameters=f"{A1111}\nTemplate: a {{castle|house}}"))
    assert (found.settings, said(found)) == (A1111_SETTINGS, [])
    found = read(png(tmp_path / "y.png", parameters=f"{A1111}\nmore"))
    assert (found.settings, said(found)) == (A1111_SETTINGS, ["what follows the settings: more"])


@pytest.mark.parametrize("suffix", FORMATS)
def test_text_of_an_unknown_program_is_never_a_prompt(suffix: str, tmp_path: Path) -> None:
    for text in ("a lovely cat", '{"prompt": "a cat"}', '[{"prompt": "a cat"}]', '{"prompt": "a cat', '"a cat"', "{}"):
        sentence = refusal(with_comment(tmp_path / f"x.{suffix}", text.encode()))
        assert "its text is of a program that Gobelin does not know" in sentence
    assert "does not know" in refusal(png(tmp_path / "y.png", prompt="a lovely cat"))


# ComfyUI, nodes.py (SaveImage), comfy_extras/nodes_images.py (SaveAnimatedWEBP)
GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 42,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15\\v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad hands", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
}
GRAPH_SETTINGS = {
    "prompt": "a cat",
    "negative_prompt": "bad hands",
    "weights": "comfyui",
    "steps": 20,
    "guidance": 8.0,
    "seed": 42,
    "sampler": "euler",
    "width": 512,
    "height": 768,
    "model": "v1-5",
}


def changed(link: str, value: Any, **nodes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The graph with one input changed ("3.model"), and more nodes."""
    graph = deepcopy(GRAPH)
    name, one = link.split(".")
    graph[name]["inputs"][one] = value
    return graph | {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def graph_of(graph: dict[str, Any], tmp_path: Path) -> GenerationInfo:
    return read(png(tmp_path / "x.png", prompt=json.dumps(graph), workflow="{}"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_comfyuis_exif_is_read(suffix: str, tmp_path: Path) -> None:
    tags = {0x0110: f"prompt:{json.dumps(GRAPH)}", 0x010F: 'workflow:{"nodes": []}'}
    found = read(with_exif(tmp_path / f"x.{suffix}", tags))
    assert (found.settings, found.source, said(found)) == (GRAPH_SETTINGS, "ComfyUI", [])
    swapped = {0x010F: f"Prompt: {json.dumps(GRAPH, ensure_ascii=False)}", 0x010E: 'Workflow: {"nodes": []}'}
    assert read(with_exif(tmp_path / f"y.{suffix}", swapped)).settings == GRAPH_SETTINGS


THROUGH = {"positive": ["6", 0], "negative": ["7", 0], "control_net": ["11", 0], "strength": 0.8}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "plain": (GRAPH, {}, []),
    "lora": (
        changed(
            "3.model",
            ["a", 0],
            a=("LoraLoader", {"model": ["4", 0], "lora_name": "x.safetensors", "strength_model": 0.7}),
        ),
        {},
        ["a LoraLoader (lora_name: x.safetensors, strength_model: 0.7)"],
    ),
    "FreeU": (
        changed("3.model", ["a", 0], a=("FreeU_V2", {"model": ["4", 0], "b1": 1.3})),
        {},
        ["a FreeU_V2 (b1: 1.3)"],
    ),
    "v-prediction": (
        changed("3.model", ["a", 0], a=("ModelSamplingDiscrete", {"model": ["4", 0], "sampling": "v_prediction"})),
        {},
        ["a ModelSamplingDiscrete (sampling: v_prediction)"],
    ),
    "IPAdapter": (
        changed(
            "3.model",
            ["a", 0],
            a=("IPAdapter", {"model": ["4", 0], "image": ["b", 0]}),
            b=("LoadImage", {"image": "x.png"}),
        ),
        {},
        ["a LoadImage (image: x.png)", "a IPAdapter"],
    ),
    "vae": (
        changed("8.vae", ["a", 0], a=("VAELoader", {"vae_name": "mse.pt"})),
        {},
        ["a VAELoader (vae_name: mse.pt)"],
    ),
    "second checkpoint": (
        changed("8.vae", ["a", 2], a=("CheckpointLoaderSimple", {"ckpt_name": "other.ckpt"})),
        {},
        ["a CheckpointLoaderSimple (ckpt_name: other.ckpt)"],
    ),
    "clip skip": (
        {
            **changed("6.clip", ["a", 0], a=("CLIPSetLastLayer", {"stop_at_clip_layer": -2, "clip": ["4", 1]})),
            "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad hands", "clip": ["a", 0]}},
        },
        {"clip_skip": 1},
        [],
    ),
    "clip skip of one": (
        changed("6.clip", ["a", 0], a=("CLIPSetLastLayer", {"stop_at_clip_layer": -2, "clip": ["4", 1]})),
        {},
        ["a CLIPSetLastLayer at -1 and -2"],
    ),
    "last layer": (
        changed("6.clip", ["a", 0], a=("CLIPSetLastLayer", {"stop_at_clip_layer": -1, "clip": ["4", 1]})),
        {},
        [],
    ),
    "ControlNet": (
        {
            **changed(
                "3.positive",
                ["a", 0],
                a=("ControlNetApplyAdvanced", THROUGH),
                **{"11": ("ControlNetLoader", {"control_net_name": "canny.pth"})},
            ),
            "3": {
                "class_type": "KSampler",
                "inputs": GRAPH["3"]["inputs"] | {"positive": ["a", 0], "negative": ["a", 1]},
            },
        },
        {},
        ["a ControlNetLoader (control_net_name: canny.pth)", "a ControlNetApplyAdvanced (strength: 0.8)"],
    ),
    "zeroed negative": (
        changed("3.negative", ["a", 0], a=("ConditioningZeroOut", {"conditioning": ["6", 0]})),
        {"negative_prompt": None},
        ["a ConditioningZeroOut: the negative conditioning is all zeros, which no prompt gives"],
    ),
    "combined": (
        changed(
            "3.positive", ["a", 0], a=("ConditioningCombine", {"conditioning_1": ["6", 0], "conditioning_2": ["7", 0]})
        ),
        {},
        ["a ConditioningCombine"],
    ),
    "reroutes and constants": (
        {
            **changed(
                *("3.seed", ["a", 0]),
                a=("PrimitiveInt", {"value": 5}),
                b=("Reroute", {"": ["c", 0]}),
                c=("PrimitiveStringMultiline", {"value": "a dog"}),
                d=("INTConstant", {"value": 256}),
            ),
            "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["b", 0], "clip": ["4", 1]}},
            "5": {"class_type": "EmptyLatentImage", "inputs": {"width": ["d", 0], "height": 768, "batch_size": 1}},
        },
        {"seed": 5, "prompt": "a dog", "width": 256},
        [],
    ),
    "computed text": (
        changed("6.text", ["a", 0], a=("StringConcatenate", {"string_a": "a", "string_b": "b"})),
        {"prompt": None},
        ["the positive prompt, which is not plain text", "a StringConcatenate (string_a: a, string_b: b)"],
    ),
    "computed seed": (
        changed("3.seed", ["a", 0], a=("RandomSeed", {})),
        {"seed": None},
        ['seed ["a", 0], which is no number to use', "a RandomSeed"],
    ),
    "embedding": (
        changed("7.text", "embedding:EasyNegative, (bad:1.2)"),
        {"negative_prompt": "embedding:EasyNegative, (bad:1.2)"},
        ["the embedding EasyNegative"],
    ),
    "img2img": (
        changed(
            "3.latent_image",
            ["a", 0],
            a=("VAEEncode", {"pixels": ["b", 0], "vae": ["4", 2]}),
            b=("LoadImage", {"image": "x.png"}),
        ),
        {"width": None, "height": None},
        ["the init image", "a LoadImage (image: x.png)", "a VAEEncode"],
    ),
    "hires fix": (
        changed(
            *("8.samples", ["2nd", 0]),
            **{
                "2nd": (
                    "KSampler",
                    GRAPH["3"]["inputs"] | {"seed": 1, "steps": 8, "denoise": 0.5, "latent_image": ["up", 0]},
                )
            },
            up=("LatentUpscale", {"samples": ["3", 0], "width": 1024}),
        ),
        {},
        ["a LatentUpscale (width: 1024)", "a KSampler after the first"],
    ),
    "upscaled": (
        changed(
            *("9.images", ["up", 0]),
            up=("ImageUpscaleWithModel", {"image": ["8", 0], "upscale_model": ["m", 0]}),
            m=("UpscaleModelLoader", {"model_name": "4x.pth"}),
        ),
        {},
        ["a UpscaleModelLoader (model_name: 4x.pth)", "a ImageUpscaleWithModel"],
    ),
    "not of the image": (
        changed(
            *("9.filename_prefix", "y"),
            other=("PreviewImage", {"images": ["b", 0]}),
            b=("VAEDecode", {"samples": ["c", 0], "vae": ["4", 2]}),
            c=("KSampler", GRAPH["3"]["inputs"] | {"seed": 1}),
        ),
        {},
        [],
    ),
    "two images": (
        changed(
            "9.filename_prefix",
            "y",
            a=("ImageScaleBy", {"image": ["8", 0], "scale_by": 2}),
            other=("SaveImage", {"images": ["a", 0]}),
        ),
        {},
        [
            "the graph ends in 2 nodes, SaveImage 9, SaveImage other: which of their images it is",
            "a ImageScaleBy (scale_by: 2)",
        ],
    ),
    "one image saved twice": (
        changed(
            "9.filename_prefix",
            "y",
            other=("SaveImage", {"images": ["8", 0]}),
            p=("PreviewImage", {"images": ["8", 0]}),
        ),
        {},
        [],
    ),
    "a node that saves no image": (
        changed("9.filename_prefix", "y", other=("Save Text File", {"text": ["6", 0]})),
        {},
        [],
    ),
    "an image writer of another name": (
        {
            **{name: node for name, node in GRAPH.items() if name != "9"},
            "a": {"class_type": "ImageUpscaleWithModel", "inputs": {"image": ["8", 0], "upscale_model": ["b", 0]}},
            "b": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "4x.pth"}},
            "c": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
            "d": {"class_type": "ImageWriter", "inputs": {"images": ["a", 0]}},
        },
        {},
        ["a UpscaleModelLoader (model_name: 4x.pth)", "a ImageUpscaleWithModel", "a ImageWriter"],
    ),
    "configuration": (
        {
            **GRAPH,
            "4": {
                "class_type": "CheckpointLoader",
                "inputs": {"config_name": "v1-inference_clip_skip_2.yaml", "ckpt_name": "v1-5.safetensors"},
            },
        },
        {},
        ["the configuration: v1-inference_clip_skip_2.yaml"],
    ),
    "linked end": (
        changed("3.end_at_step", ["q", 0], q=("Odd", {"x": 3})),
        {},
        ["end_at_step, which another node says", "a Odd (x: 3)"],
    ),
    "batch": (changed("5.batch_size", 4), {}, ["batch_size 4: which image of the batch it is"]),
    "denoise": (changed("3.denoise", 0.6), {}, ["denoise 0.6"]),
    "sampler": (changed("3.sampler_name", "dpmpp_sde"), {"sampler": None}, ["the sampler dpmpp_sde"]),
    "karras": (changed("3.scheduler", "karras"), {"sampler": "euler_karras"}, []),
    "schedule": (changed("3.scheduler", "exponential"), {}, ["the schedule exponential of euler"]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_node_that_changes_the_image_is_said(case: str, tmp_path: Path) -> None:
    graph, settings, missing = CASES[case]
    found = graph_of(graph, tmp_path)
    expected = {name: value for name, value in (GRAPH_SETTINGS | settings).items() if value is not None}
    assert (found.settings, said(found)) == (expected, missing)


def test_an_advanced_sampler_that_stops_early_is_said(tmp_path: Path) -> None:
    inputs = {name: value for name, value in GRAPH["3"]["inputs"].items() if name not in ("seed", "denoise")}
    usual = {"noise_seed": 2**64 - 1, "add_noise": "enable", "start_at_step": 0, "end_at_step": 10000}
    graph = GRAPH | {"3": {"class_type": "KSamplerAdvanced", "inputs": inputs | usual}}
    found = graph_of(graph, tmp_path)
    assert (found.settings, said(found)) == (GRAPH_SETTINGS | {"seed": 2**64 - 1}, [])
    graph["3"]["inputs"] |= {"end_at_step": 12, "return_with_leftover_noise": "enable"}
    assert said(graph_of(graph, tmp_path)) == ["return_with_leftover_noise enable", "end_at_step 12"]


def test_a_graph_of_another_sampler_is_refused_by_its_name(tmp_path: Path) -> None:
    graph = GRAPH | {"3": {"class_type": "SamplerCustomAdvanced", "inputs": {}}}
    sentence = refusal(png(tmp_path / "x.png", prompt=json.dumps(graph)))
    assert "its ComfyUI graph has no KSampler that leads to the image, but SamplerCustomAdvanced" in sentence


def test_the_graph_comes_before_the_text_of_a_node_that_saves(tmp_path: Path) -> None:
    both = read(png(tmp_path / "x.png", prompt=json.dumps(GRAPH), parameters=A1111))
    assert both.settings == GRAPH_SETTINGS
    custom = json.dumps({"3": {"class_type": "SamplerCustom", "inputs": {}}})
    text = read(png(tmp_path / "x.png", prompt=custom, parameters=A1111))
    assert (text.settings, text.source) == (A1111_SETTINGS | {"weights": "comfyui"}, "ComfyUI")


# Fooocus, modules/meta_parser.py and modules/private_logger.py
FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "juggernautXL",
    "base_model_hash": "d91d35736d",
    "clip_skip": 2,
    "full_negative_prompt": ["ugly", "blurry"],
    "full_prompt": ["a cat", "cinematic still a cat"],
    "guidance_scale": 4.0,
    "loras": [["offset", 0.1, "4852686128"]],
    "lora_combined_1": "offset : 0.1",
    "metadata_scheme": "fooocus",
    "negative_prompt": "ugly",
    "performance": "Speed",
    "prompt": "a cat",
    "refiner_model": "None",
    "resolution": "(896, 1152)",
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "seed": "12",
    "sharpness": 2.0,
    "steps": 30,
    "styles": "['Fooocus Cinematic']",
    "vae": "Default (model)",
    "version": "Fooocus v2.5.5",
}
FOOOCUS_SETTINGS = {
    "prompt": "a cat, cinematic still a cat",
    "negative_prompt": "ugly, blurry",
    "weights": "comfyui",
    "steps": 30,
    "guidance": 4.0,
    "seed": 12,
    "width": 896,
    "height": 1152,
    "clip_skip": 1,
    "model": "juggernautXL",
}
FOOOCUS_MISSING = [
    *("the sampler dpmpp_2m_sde_gpu", "adm_guidance: (1.5, 0.8, 0.3)", 'loras: [["offset", 0.1, "4852686128"]]'),
    *("sharpness: 2.0", "styles: ['Fooocus Cinematic']", "Fooocus paints with SDXL, which Gobelin does not have"),
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_fooocus_json_is_read(suffix: str, tmp_path: Path) -> None:
    text, file = json.dumps(FOOOCUS), tmp_path / f"x.{suffix}"
    if suffix == "png":
        png(file, parameters=text, fooocus_scheme="fooocus")
    else:
        with_exif(file, {0x9286: text, 0x0131: "Fooocus v2.5.5", 0x927C: "fooocus"})
    found = read(file)
    assert (found.settings, found.source, said(found)) == (FOOOCUS_SETTINGS, "Fooocus", FOOOCUS_MISSING)


def test_fooocus_text_is_read(tmp_path: Path) -> None:
    text = (
        "a cat, cinematic still a cat\nNegative prompt: ugly, blurry\nSteps: 30, Sampler: DPM++ 2M SDE Karras, "
        'Seed: 12, Size: 896x1152, CFG scale: 4, Sharpness: 2, ADM Guidance: "(1.5, 0.8, 0.3)", Model: juggernautXL, '
        "Model hash: d91d35736d, Performance: Speed, Scheduler: karras, VAE: Default (model), Raw prompt: a cat, "
        'Clip skip: 2, Lora hashes: "offset: 4852686128", Lora weights: "offset: 0.1", Version: Fooocus v2.5.5'
    )
    found = read(png(tmp_path / "x.png", parameters=text, fooocus_scheme="a1111"))
    assert (found.settings, found.source) == (FOOOCUS_SETTINGS | {"sampler": "dpmpp_2m_sde_karras"}, "Fooocus")
    assert said(found) == [
        *("Fooocus paints with SDXL, which Gobelin does not have", "Sharpness: 2", "ADM Guidance: (1.5, 0.8, 0.3)"),
        *("Lora hashes: offset: 4852686128", "Lora weights: offset: 0.1"),
    ]


# SwarmUI, docs/Image Metadata Format.md and src/Media/ImageFile.cs
SWARMUI = {
    "sui_image_params": {
        "prompt": "a (cat:1.2) <lora:x> <segment:face> a nose",
        "model": "OfficialStableDiffusion/v1-5",
        "seed": 1,
        "steps": 20,
        "cfgscale": 7.0,
        "aspectratio": "1:1",
        "width": 512,
        "height": 512,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "automaticvae": True,
        "negativeprompt": "",
        "clipstopatlayer": -2,
        "loras": ["a", "b"],
        "loraweights": ["0.7", "1"],
        "refinerupscale": 1.5,
        "variationseedstrength": 0,
        "swarm_version": "0.9.3.1",
    },
    "sui_extra_data": {"date": "2025-01-25"},
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_swarmuis_json_is_read(suffix: str, tmp_path: Path) -> None:
    text, file = json.dumps(SWARMUI, indent=2), tmp_path / f"x.{suffix}"
    if suffix == "png":
        png(file, parameters=text)
    else:
        with_comment(file, b"UNICODE\0" + text.encode("utf-16-le"))
    found = read(file)
    assert found.source == "SwarmUI"
    assert found.settings == {
        "prompt": "a (cat:1.2)",
        "negative_prompt": "",
        "weights": "comfyui",
        "steps": 20,
        "guidance": 7.0,
        "seed": 1,
        "width": 512,
        "height": 512,
        "clip_skip": 1,
        "sampler": "dpmpp_2m_karras",
        "model": "v1-5",
    }
    assert said(found) == [
        *("refinerupscale: 1.5", "variationseedstrength: 0", "<segment:face> a nose", "<lora:x>"),
        *("the LoRA a with weight 0.7", "the LoRA b with weight 1"),
    ]


def test_swarmuis_first_form_is_read_of_the_camera_s_name(tmp_path: Path) -> None:
    params = {"prompt": "a cat", "seed": 1, "steps": 5, "cfgscale": "7.0", "width": 64, "height": 64, "model": "m"}
    older = {"sui_image_params": params | {"comfyuisampler": "euler", "comfyuischeduler": "normal"}}
    found = read(with_exif(tmp_path / "x.jpg", {0x0110: json.dumps(older)}))
    assert (found.settings["prompt"], found.settings["sampler"], said(found)) == ("a cat", "euler", [])


# InvokeAI, invokeai/app/invocations/metadata.py (CoreMetadataInvocation)
INVOKEAI = {
    "generation_mode": "txt2img",
    "positive_prompt": "a cat",
    "negative_prompt": "dog",
    "width": 512,
    "height": 768,
    "seed": 9,
    "rand_device": "cpu",
    "cfg_scale": 7.5,
    "cfg_rescale_multiplier": 0.5,
    "steps": 25,
    "scheduler": "dpmpp_2m_k",
    "seamless_x": False,
    "clip_skip": 1,
    "controlnets": [],
    "app_version": "4.2.9",
    "model": {"key": "1", "hash": "blake3:1", "name": "stable-diffusion-v1-5", "base": "sd-1", "type": "main"},
}


def test_invokeais_metadata_is_read(tmp_path: Path) -> None:
    found = read(png(tmp_path / "x.png", invokeai_metadata=json.dumps(INVOKEAI), invokeai_graph="{}"))
    assert found.source == "InvokeAI"
    assert found.settings == {
        "prompt": "a cat",
        "negative_prompt": "dog",
        "weights": "none",
        "steps": 25,
        "guidance": 7.5,
        "seed": 9,
        "guidance_rescale": 0.5,
        "width": 512,
        "height": 768,
        "clip_skip": 1,
        "sampler": "dpmpp_2m_karras",
        "model": "stable-diffusion-v1-5",
    }
    assert said(found) == []
    other = INVOKEAI | {
        "positive_prompt": "a (cat)1.3 dog++",
        "model": {"name": "x", "base": "sdxl"},
        "loras": [{"weight": 0.5}],
        "generation_mode": "img2img",
        "strength": 0.7,
        "scheduler": "tcd",
        "rand_device": "cuda",
        "seamless_x": True,
    }
    assert said(read(png(tmp_path / "x.png", invokeai_metadata=json.dumps(other)))) == [
        "weights in the prompt, which InvokeAI reads in a way of its own: a (cat)1.3 dog++",
        *(
            "the sampler tcd",
            "generation_mode: img2img",
            "rand_device: cuda",
            "seamless_x: true",
            'loras: [{"weight": 0.5}]',
        ),
        *("strength: 0.7", "a model that is no Stable Diffusion 1: sdxl"),
    ]


def test_invokeais_first_two_forms_are_read(tmp_path: Path) -> None:
    """stable-diffusion-prompt-reader, sd_prompt_reader/format/invokeai.py; InvokeAI 2, ldm/invoke/conditioning.py."""
    expected = {
        "prompt": "a cat",
        "negative_prompt": "dog",
        "weights": "none",
        "steps": 50,
        "guidance": 7.5,
        "seed": 3,
        "width": 512,
        "height": 640,
        "sampler": "lms",
    }
    image = {
        "prompt": [{"prompt": "a cat [dog]", "weight": 1}],
        "steps": 50,
        "cfg_scale": 7.5,
        "threshold": 0,
        "perlin": 0.1,
        "width": 512,
        "height": 640,
        "seed": 3,
        "seamless": False,
        "type": "txt2img",
        "sampler": "k_lms",
        "variations": [],
    }
    second = {"model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "image": image}
    found = read(png(tmp_path / "x.png", **{"sd-metadata": json.dumps(second)}))
    assert found.settings == expected | {"model": "stable-diffusion-1.5"}
    assert said(found) == ["perlin: 0.1"]
    first = read(
        png(tmp_path / "y.png", Dream='"a cat [dog]" -s 50 -S 3 -W 512 -H 640 -C 7.5 -A k_lms -G 0.8 --seamless')
    )
    assert first.settings == expected
    assert said(first) == ["no model", "-G: 0.8", "-seamless: on"]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        (
            {"canvas_v2_metadata": {"controlLayers": [{"model": "canny"}], "rasterLayers": [], "bbox": None}},
            ['controlLayers of the canvas: [{"model": "canny"}]'],
        ),
        ({"ref_images": [{"ip_adapter": "x"}]}, ['ref_images: [{"ip_adapter": "x"}]']),
        ({"regions": [{"prompt": "a hat"}]}, ['regions: [{"prompt": "a hat"}]']),
        ({"positive_prompt": "a cat <my-style>, film"}, ["the embedding my-style"]),
        (
            {"positive_prompt": "a cat+, dog"},
            ["weights in the prompt, which InvokeAI reads in a way of its own: a cat+, dog"],
        ),
        (
            {"positive_prompt": 'a "fluffy cat"- dog'},
            ['weights in the prompt, which InvokeAI reads in a way of its own: a "fluffy cat"- dog'],
        ),
        ({"positive_prompt": "a semi-realistic cat - a dog"}, []),
    ],
)
def test_what_invokeai_paints_besides_is_said(changes: dict[str, Any], missing: list[str], tmp_path: Path) -> None:
    found = read(png(tmp_path / "x.png", invokeai_metadata=json.dumps(INVOKEAI | changes)))
    assert said(found) == missing
    assert "<" not in found.settings["prompt"]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ('"a "big" cat" -s 50 -S 3', 'a "big" cat'),
        (r'"a \"big\" cat" -s 50', 'a "big" cat'),
        ("a cat -s 50 -S 3", "a cat"),
        ('"a half-timbered house - old" -s50', "a half-timbered house - old"),
    ],
)
def test_invokeais_command_has_its_whole_prompt(text: str, prompt: str, tmp_path: Path) -> None:
    assert read(png(tmp_path / "x.png", Dream=text)).settings["prompt"] == prompt


@pytest.mark.parametrize(
    ("fields", "sampler", "missing"),
    [
        ("Sampler: Euler a, Model hash: 6ce0161689", "euler_ancestral", ["no Model but for its hash 6ce0161689"]),
        ("Sampler: Euler a, Model: x, Foo, Bar baz, Version: v1.10.1", "euler_ancestral", ["Foo", "Bar baz"]),
        ("Sampler: Euler a, Model: x, Size: 32x32, Size: 16x16", "euler_ancestral", []),
        (
            "Sampler: DPM++ 2M Karras, Schedule type: Exponential, Model: x",
            "dpmpp_2m",
            ["the schedule Exponential of dpmpp_2m"],
        ),
        ("Sampler: DPM++ 2M Karras, Schedule type: Automatic, Model: x", "dpmpp_2m_karras", []),
        (
            "Sampler: UniPC, Model: x",
            "uni_pc",
            ["the noise levels of uni_pc, which Gobelin spaces as diffusers does"],
        ),
    ],
)
def test_no_field_is_lost(fields: str, sampler: str, missing: list[str], tmp_path: Path) -> None:
    size = "" if "Size" in fields else ", Size: 16x16"
    found = read(png(tmp_path / "x.png", parameters=f"a ring\nSteps: 4, {fields}, CFG scale: 3, Seed: 1{size}"))
    assert (found.settings["sampler"], found.settings["width"], said(found)) == (sampler, 16, missing)


def test_an_image_of_another_size_than_its_settings_say_was_changed(tmp_path: Path) -> None:
    text = "a ring\nSteps: 4, Sampler: Euler, CFG scale: 3, Seed: 1, Size: 64x32, Model: x"
    found = read(png(tmp_path / "x.png", parameters=text))
    assert found.missing[1:] == ["the image is 16 x 16, and its settings say 64 x 32: it was changed afterwards"]


@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\ufeff"])
def test_byte_order_marks_are_no_words(mark: str, tmp_path: Path) -> None:
    comments = (b"ASCII\0\0\0" + f"{mark}{A1111}".encode(), b"UNICODE\0" + f"\ufeff{mark}{A1111}".encode("utf-16-le"))
    for number, comment in enumerate(comments):
        assert read(with_comment(tmp_path / f"{number}.jpg", comment)).settings == A1111_SETTINGS
    assert read(png(tmp_path / "x.png", parameters=f"{mark}{A1111}")).settings == A1111_SETTINGS


def test_keywords_that_several_programs_use_are_told_apart_by_their_text(tmp_path: Path) -> None:
    plain = read(png(tmp_path / "x.png", prompt="a castle", parameters=A1111))
    assert (plain.source, plain.settings) == ("AUTOMATIC1111", A1111_SETTINGS)
    graph = read(png(tmp_path / "y.png", prompt=json.dumps(GRAPH), negative_prompt="x"))
    assert (graph.source, graph.settings) == ("ComfyUI", GRAPH_SETTINGS)
    titled = read(png(tmp_path / "z.png", Title="as if by NovelAI", parameters=A1111))
    assert titled.source == "AUTOMATIC1111"


def test_two_samplers_of_two_images_are_refused(tmp_path: Path) -> None:
    """One of the two is saved by a preview only, or both are saved."""
    other = {"class_type": "SamplerCustom", "inputs": {"noise_seed": 5, "cfg": 6, "positive": ["6", 0]}}
    graph = changed(
        "8.samples", ["a", 0], p=("PreviewImage", {"images": ["d", 0]}), d=("VAEDecode", {"samples": ["3", 0]})
    )
    assert "no KSampler that leads to the image, but" in refusal(
        png(tmp_path / "x.png", prompt=json.dumps(graph | {"a": other}))
    )
    second = {"k": {"class_type": "KSampler", "inputs": GRAPH["3"]["inputs"] | {"seed": 5}}}
    both = (
        GRAPH
        | second
        | {
            "d": {"class_type": "VAEDecode", "inputs": {"samples": ["k", 0]}},
            "s": {"class_type": "SaveImage", "inputs": {"images": ["d", 0]}},
        }
    )
    assert "saves images of 2 samplers" in refusal(png(tmp_path / "x.png", prompt=json.dumps(both)))


@pytest.mark.parametrize("kind", ["IPAdapterRegionalConditioning", "KSampler (Efficient)", "ApplyInstantID"])
def test_outputs_of_nodes_that_are_not_known_are_not_guessed(kind: str, tmp_path: Path) -> None:
    node = {"class_type": kind, "inputs": {"positive": ["6", 0], "negative": ["7", 0]}}
    graph = deepcopy(GRAPH) | {"n": node}
    graph["3"]["inputs"] |= {"positive": ["n", 1], "negative": ["n", 2]}
    found = graph_of(graph, tmp_path)
    assert not {"prompt", "negative_prompt"} & found.settings.keys()
    assert f"the positive prompt, which goes through a {kind}" in said(found)


def test_a_graph_that_cannot_be_read_is_said_beside_the_text(tmp_path: Path) -> None:
    graph = changed(
        "8.samples",
        ["a", 0],
        a=("SamplerCustom", {"positive": ["c", 0]}),
        c=("ControlNetApply", {"conditioning": ["6", 0], "strength": 0.5}),
    )
    found = read(png(tmp_path / "x.png", prompt=json.dumps(graph), parameters=A1111))
    assert said(found)[0].startswith("its ComfyUI graph has no KSampler that leads to the image")
    assert {"a ControlNetApply (strength: 0.5)", "a SamplerCustom"} <= set(said(found))


# Draw Things, as stable-diffusion-prompt-reader reads it (sd_prompt_reader/format/drawthings.py)
DRAW_THINGS = {
    "c": 'a "cat" & a dog',
    "uc": "blurry",
    "model": "sd_v1.5_f16.ckpt",
    "sampler": "DPM++ 2M Karras",
    "scale": 7.5,
    "seed": 4,
    "seed_mode": "Scale Alike",
    "size": "512x640",
    "steps": 20,
    "strength": 1.0,
    "lora": [{"model": "x.ckpt", "weight": 0.7}],
    "v2": {"clipSkip": 2, "hiresFix": True, "controls": [], "sharpness": 0},
}
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/">
<xmp:CreatorTool>Draw Things</xmp:CreatorTool>
<exif:UserComment>
<rdf:Alt>
<rdf:li xml:lang="x-default">{}</rdf:li>
</rdf:Alt>
</exif:UserComment></rdf:Description></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("suffix", FORMATS)
def test_draw_things_xmp_is_read(suffix: str, tmp_path: Path) -> None:
    text = json.dumps(DRAW_THINGS).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    file = tmp_path / f"x.{suffix}"
    if suffix == "png":
        png(file, **{"XML:com.adobe.xmp": XMP.format(text)})
    else:
        Image.new("RGB", (16, 16)).save(file, xmp=XMP.format(text).encode())
    found = read(file)
    assert found.source == "Draw Things"
    assert found.settings == {
        "prompt": 'a "cat" & a dog',
        "negative_prompt": "blurry",
        "weights": "a1111",
        "steps": 20,
        "guidance": 7.5,
        "seed": 4,
        "width": 512,
        "height": 640,
        "clip_skip": 1,
        "sampler": "dpmpp_2m_karras",
        "model": "sd_v1.5_f16",
    }
    assert said(found) == ['lora: [{"model": "x.ckpt", "weight": 0.7}]', "hiresFix: true"]


# Easy Diffusion, ui/easydiffusion/utils/save_utils.py (TASK_TEXT_MAPPING)
EASY_DIFFUSION = {
    "prompt": "a cat",
    "negative_prompt": "dog",
    "seed": 8,
    "use_stable_diffusion_model": "/models/sd-v1-5.safetensors",
    "clip_skip": True,
    "use_vae_model": "mse",
    "sampler_name": "euler_a",
    "width": 512,
    "height": 512,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "use_lora_model": None,
    "tiling": "none",
    "use_upscale": "",
}
EASY_DIFFUSION_TEXT = {
    "Prompt": "a cat",
    "Negative Prompt": "dog",
    "Seed": "8",
    "Stable Diffusion model": "sd-v1-5",
    "Clip Skip": "True",
    "VAE model": "mse",
    "Sampler": "euler_a",
    "Width": "512",
    "Height": "512",
    "Steps": "25",
    "Guidance Scale": "7.5",
}


def test_easy_diffusions_chunks_and_json_are_read(tmp_path: Path) -> None:
    chunks = {name: str(value) for name, value in EASY_DIFFUSION.items()}
    files = [
        png(tmp_path / "a.png", **chunks),
        png(tmp_path / "b.png", **{name.replace(" ", "__"): text for name, text in EASY_DIFFUSION_TEXT.items()}),
        with_comment(tmp_path / "c.jpg", b"UNICODE\0" + json.dumps(EASY_DIFFUSION).encode("utf-16-be")),
    ]
    for file in files:
        found = read(file)
        assert found.source == "Easy Diffusion"
        assert found.settings == {
            "prompt": "a cat",
            "negative_prompt": "dog",
            "weights": "none",
            "steps": 25,
            "guidance": 7.5,
            "seed": 8,
            "width": 512,
            "height": 512,
            "clip_skip": 1,
            "sampler": "euler_ancestral",
            "model": "sd-v1-5",
        }
        assert said(found) == ["use_vae_model: mse"]


# NovelAI: its text chunks, and nai_meta.py's LSBExtractor for its hidden text
NOVELAI = {
    "Description": "a cat",
    "Software": "NovelAI",
    "Source": "Stable Diffusion 1D44365E",
    "Comment": json.dumps({"steps": 28, "sampler": "k_euler_ancestral", "seed": 1, "scale": 11.0, "uc": "bad"}),
}


def hidden(file: Path, text: str, magic: str, mode: str = "RGBA") -> Path:
    """Hide a text in the last bits, column by column, as NovelAI, sd-webui-stealth-pnginfo and SwarmUI do."""
    payload = gzip.compress(text.encode()) if magic.endswith("comp") else text.encode()
    whole = magic.encode() + (len(payload) * 8).to_bytes(4, "big") + payload
    bits = np.unpackbits(np.frombuffer(whole, np.uint8))
    levels = np.random.default_rng(0).integers(0, 256, (96, 64, len(mode)), dtype=np.uint8)
    columns = levels.transpose(1, 0, 2).copy()  # [x, y, channel]
    where = columns[..., 3] if "png" in magic else columns[..., :3]
    flat = where.reshape(-1).copy()
    flat[: len(bits)] = flat[: len(bits)] & 254 | bits
    where[...] = flat.reshape(where.shape)
    Image.fromarray(columns.transpose(1, 0, 2).copy()).save(file, lossless=True)
    return file


def test_novelais_images_are_refused_by_name(tmp_path: Path) -> None:
    files = [
        png(tmp_path / "a.png", **NOVELAI),
        hidden(tmp_path / "b.png", json.dumps(NOVELAI), "stealth_pngcomp"),
        hidden(tmp_path / "c.webp", json.dumps(NOVELAI), "stealth_pngcomp"),
        with_comment(tmp_path / "d.jpg", json.dumps(NOVELAI).encode()),
    ]
    for file in files:
        assert "says that NovelAI made it, whose prompts and models Gobelin does not have" in refusal(file)


@pytest.mark.parametrize(
    ("magic", "mode"),
    [("stealth_pnginfo", "RGBA"), ("stealth_pngcomp", "RGBA"), ("stealth_rgbinfo", "RGB"), ("stealth_rgbcomp", "RGBA")],
)
def test_text_hidden_in_pixels_is_read(magic: str, mode: str, tmp_path: Path) -> None:
    assert read(hidden(tmp_path / "x.png", A1111, magic, mode)).settings == A1111_SETTINGS


def test_broken_hidden_text_is_refused(tmp_path: Path) -> None:
    file = hidden(tmp_path / "x.png", A1111, "stealth_pngcomp")
    with Image.open(file) as image:
        levels = np.array(image)
    levels[10, 3:20, 3] ^= 1
    Image.fromarray(levels).save(file)
    assert "holds text hidden in its pixels that cannot be decoded" in refusal(file)


def test_what_a_stranger_wrote_is_said_on_one_line_and_without_control_characters(tmp_path: Path) -> None:
    text = f"a ring\nSteps: 4, Sampler: \x1b[31mred, CFG scale: 3, Seed: 1, Size: 16x16, Model: x, Odd: {'x' * 1000}"
    found = read(png(tmp_path / "x.png", parameters=text))
    assert said(found)[0] == "the sampler ?[31mred"
    assert all(len(one) <= 230 and one.isprintable() for one in found.missing)


def test_texts_and_images_too_large_are_refused(tmp_path: Path) -> None:
    assert "characters: Gobelin reads" in refusal(png(tmp_path / "x.png", parameters="a" * (MAX_TEXT + 1)))
    assert "its prompt has 100,005 characters" in refusal(
        png(tmp_path / "y.png", parameters="a" * 100_001 + A1111[20:])
    )
    Image.new("1", (20_000, 4_000)).save(tmp_path / "z.png")
    assert "million pixels at most" in refusal(tmp_path / "z.png")
