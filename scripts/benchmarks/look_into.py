"""Maps of words in pipelines of diffusers: ``gobelin.look_into`` beside attention-map-diffusers and DAAM.

    python scripts/benchmarks/look_into.py works
    python scripts/benchmarks/look_into.py time --side 64 --steps 2 --rounds 5 --threads 2
    python scripts/benchmarks/look_into.py memory --side 64 --steps 5 25 50

``works`` paints with a small random model in many ways, and compares each program's maps, means over steps and heads,
with the probabilities that diffusers' own processor attends by, and its latents with the untraced ones, bit for bit.
``time`` and ``memory`` are of Stable Diffusion 1.5's size with random weights: guided steps without decoding, in turns,
and the peak of fresh processes. Programs that are not installed are left out.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch
from paired import print_machine, print_table, ratios, written
from PIL import Image
from torch import Tensor

import gobelin
from gobelin.bench.machine import machine, process_memory
from gobelin.bench.picture_contenders import diffusers_pipeline, random_pipeline
from gobelin.checkpoint import Model
from gobelin.clip import TextEncoder, TextEncoderConfig
from gobelin.diffusers_pipelines import find_attention
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.schedule import NoiseSchedule
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAE, VAEConfig

PROMPT = "a red circle to the left of a blue star"
LONG = ", ".join([PROMPT] * 12)
SIDE = 256  # pixels; the model's own is 512, which DAAM needs to be told
TOLERANCE = 1e-5  # of a mean share; in bfloat16 1e-2
Maps = list[dict[str, Tensor]]  # for each image, [patches, tokens] by the name of the attention


# The programs: each a context that traces a pipeline, and yields what returns its maps of so many images.


@contextmanager
def gobelins(pipe: Any, trace: Any = True, text: str | None = None) -> Iterator[Callable[[int], Maps]]:
    """Trace by Gobelin."""
    with gobelin.look_into(pipe, trace, prompt=text) as look:
        yield lambda count: [{site.name: one[0, 0] for site, one in maps.maps.items()} for maps in look.heatmaps]


@contextmanager
def attention_map_diffusers(pipe: Any, timesteps: str = "all") -> Iterator[Callable[[int], Maps]]:
    """Trace by attention-map-diffusers; the rows with the prompt are the last of the batch."""
    from attention_map_diffusers import AttentionCapture  # pyright: ignore[reportMissingImports]

    def maps(count: int) -> Maps:
        found: dict[str, list[Tensor]] = {}
        for record in capture.compute():
            found.setdefault(record.layer_id.removeprefix("unet."), []).append(record.data[-count:].float().mean(1))
        means = {name: torch.stack(one).mean(0) for name, one in found.items()}
        return [{name: one[index] for name, one in means.items()} for index in range(count)]

    with AttentionCapture(pipe, relations="image->text", timesteps=timesteps) as capture:
        yield maps


@contextmanager
def daams(pipe: Any) -> Iterator[Callable[[int], Maps]]:
    """Trace by DAAM, which adds up steps, keeps heads apart, and has one map of a call."""
    import daam  # pyright: ignore[reportMissingImports]

    names = {module: name for name, module in pipe.unet.named_modules()}

    def maps(count: int) -> Maps:
        tracer.compute_global_heat_map()
        places = [names[module] for module in tracer.locator.locate(pipe.unet)]
        found: dict[str, list[Tensor]] = {}
        for (_, layer, _), one in tracer.all_heat_maps:
            found.setdefault(places[layer], []).append(one.flatten(1).T / len(pipe.scheduler.timesteps))
        return [{name: torch.stack(one).mean(0) for name, one in found.items()}]

    with daam.trace(pipe) as tracer:
        yield maps


PROGRAMS: dict[str, tuple[str, Callable[..., Any]]] = {
    "gobelin.look_into": ("gobelin", gobelins),
    "attention-map-diffusers": ("attention_map_diffusers", attention_map_diffusers),
    "DAAM": ("daam", daams),
}


class Watching:
    """The oracle: a processor around another that keeps the mean over heads of what diffusers' own attends by."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.probs: list[Tensor] = []

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        query, key = (attn.head_to_batch_dim(part).float() for part in (attn.to_q(hidden_states), attn.to_k(text)))
        probs = attn.get_attention_scores(query, key)
        self.probs.append(probs.unflatten(0, (-1, attn.heads)).mean(1))
        return self.processor(attn, hidden_states, encoder_hidden_states, **kwargs)


# What is painted: a pipeline of a small random model, and a call of it.


def small_pipeline() -> Any:
    """Make diffusers' pipeline of a narrow U-Net of Stable Diffusion 1.5's shape, at its size."""
    torch.manual_seed(0)
    width, shipped = 32, Tokenizer.from_pretrained(shipped_model() / "tokenizer")
    unet = UNetConfig.of(
        16, 32, 32, 32, attention=(True, True, True, False), cross_attention_dim=width, norm_num_groups=8
    )
    text = TextEncoderConfig.of(width, layers=2, heads=2, vocab_size=len(shipped.vocab))
    model = Model(
        unet=UNet(unet).eval().requires_grad_(False),
        vae=VAE(VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=8)).eval().requires_grad_(False),
        text_encoder=TextEncoder(text).eval().requires_grad_(False),
        tokenizer=Tokenizer(dict(shipped.vocab), shipped.merges, max_length=77),
        schedule=NoiseSchedule(),
    )
    return diffusers_pipeline(Pipeline(model))


@dataclass(kw_only=True)
class Case:
    """A way to paint: ``change`` makes its pipeline, ``options`` are the call's, ``text`` says embeddings' words."""

    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], Any] = lambda pipe: pipe
    prompt: Any = PROMPT
    images: int = 1
    text: str | None = None
    tolerance: float = TOLERANCE

    def paint(self, pipe: Any) -> Tensor:
        """Paint two steps, and return the latents."""
        generator = torch.Generator().manual_seed(1)
        size = {} if "image" in self.options else {"height": SIDE, "width": SIDE}
        given = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "latent", **size, **self.options}
        return pipe(self.prompt, generator=generator, **given).images


def _turned(kind: str, **more: Any) -> Callable[[Any], Any]:
    """Make what turns a pipeline into another one of diffusers."""

    def turn(pipe: Any) -> Any:
        import diffusers

        made = getattr(diffusers, kind)(
            **{**pipe.components, **{name: make() for name, make in more.items()}}, requires_safety_checker=False
        )
        made.set_progress_bar_config(disable=True)
        return made

    return turn


def _controlnet() -> Any:
    from diffusers import ControlNetModel  # pyright: ignore[reportPrivateImportUsage]

    return ControlNetModel(block_out_channels=(16, 32, 32, 32), cross_attention_dim=32, norm_num_groups=8)


def _with_lora(pipe: Any) -> Any:
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "style")
    return pipe


def _changed(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make what changes a pipeline in place."""

    def changed(pipe: Any) -> Any:
        change(pipe)
        return pipe

    return changed


def _with_ip_adapter(pipe: Any) -> Any:
    tensors: dict[str, dict[str, Tensor]] = {
        "image_proj": {
            "proj.weight": torch.randn(4 * 32, 12) / 4, "proj.bias": torch.zeros(4 * 32),
            "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32),
        },
        "ip_adapter": {},
    }  # fmt: skip
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    for number, name in enumerate(names):
        width = pipe.unet.get_submodule(name).to_k.out_features
        for part in ("k", "v"):
            tensors["ip_adapter"][f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(width, 32) / 8
    pipe.unet._load_ip_adapter_weights([tensors])
    return pipe


def _cases() -> dict[str, Case]:
    """List the ways to paint."""
    image = Image.effect_noise((SIDE, SIDE), 90).convert("RGB")
    mask = Image.new("L", image.size)
    mask.paste(255, (50, 50, 200, 200))
    torch.manual_seed(1)
    long = {name: torch.randn(1, 154, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    half = _changed(lambda pipe: pipe.to(torch.bfloat16))
    return {
        "a prompt, square, guided": Case(),
        "without guidance": Case(options={"guidance_scale": 1.0}),
        "an image that is not square": Case(options={"width": SIDE + 128, "height": SIDE}),
        "two prompts": Case(prompt=[PROMPT, "two yellow rings"], images=2),
        "num_images_per_prompt=2": Case(options={"num_images_per_prompt": 2}, images=2),
        "a prompt longer than 77 tokens, cut": Case(prompt=LONG),
        "prompt_embeds of 154 tokens": Case(prompt=None, options=long, text=LONG),
        "image to image": Case(
            change=_turned("StableDiffusionImg2ImgPipeline"), options={"image": image, "strength": 1.0}
        ),
        "inpainting": Case(
            change=_turned("StableDiffusionInpaintPipeline"), options={"image": image, "mask_image": mask}
        ),
        "ControlNet": Case(
            change=_turned("StableDiffusionControlNetPipeline", controlnet=_controlnet), options={"image": image}
        ),
        "a LoRA of PEFT": Case(change=_with_lora),
        "an IP-Adapter": Case(change=_with_ip_adapter, options={"ip_adapter_image_embeds": [torch.randn(2, 1, 12)]}),
        "enable_attention_slicing": Case(change=_changed(lambda pipe: pipe.enable_attention_slicing("max"))),
        "enable_model_cpu_offload": Case(change=_changed(lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))),
        "bfloat16": Case(change=half, tolerance=1e-2),
    }


def judge(name: str, case: Case) -> str:
    """Say in some words what becomes of a case in a program."""
    _, trace = PROGRAMS[name]
    options = {"text": case.text} if name.startswith("gobelin") else {}
    pipe = case.change(small_pipeline())
    plain = case.paint(pipe)
    watching = {site.name: Watching(one.processor) for site, one in _words(pipe)}
    kept = dict(pipe.unet.attn_processors)
    for site, one in _words(pipe):
        one.set_processor(watching[site.name])
    case.paint(pipe)
    for site, one in _words(pipe):
        one.set_processor(kept[f"{site.name}.processor"])
    try:
        with trace(pipe, **options) as maps:
            traced = case.paint(pipe)
        found = maps(case.images)
    except Exception as error:  # of another program, of no particular type
        return f"stops: {' '.join(str(error).split())[:90]}"
    said = []
    if len(found) != case.images:
        said.append(f"{len(found)} map for {case.images} images")
    farthest = max(
        (one[site] - torch.stack(watching[site].probs)[:, index - case.images].mean(0)).abs().max().item()
        for index, one in enumerate(found)
        for site in one
    )
    if not farthest < case.tolerance:
        said.append(f"maps wrong by {farthest:.1g}")
    if not torch.equal(plain, traced):
        said.append(f"another image (by {(plain - traced).abs().max() / plain.abs().max():.0e})")
    if not torch.equal(plain, case.paint(pipe)):
        said.append("another image afterwards")
    return "; ".join(said) or "right"


def _words(pipe: Any) -> list[tuple[Any, Any]]:
    return [(site, one) for site, one in find_attention(pipe.unet).items() if site.kind == "cross"]


def there() -> list[str]:
    """List the programs that are installed."""
    return [name for name, (module, _) in PROGRAMS.items() if find_spec(module) is not None]


def works(options: argparse.Namespace) -> None:
    """Print what works in each program."""
    rows = []
    for title, case in _cases().items():
        if options.only and not any(part in title for part in options.only):
            continue
        rows.append([title, *(judge(name, case) for name in there())])
        print(" | ".join(rows[-1]), flush=True)
    print_table("Maps of words in diffusers' pipelines", ["", *there()], rows)


# Time and memory at Stable Diffusion 1.5's size.


@contextmanager
def nothing(pipe: Any) -> Iterator[Callable[[int], Maps]]:
    """Trace nothing."""
    yield lambda count: []


@contextmanager
def gobelins_sharp(pipe: Any) -> Iterator[Callable[[int], Maps]]:
    """Trace by Gobelin what sharp maps are made of."""
    with gobelins(pipe, "sharp") as maps:
        yield maps


@contextmanager
def last_step_alone(pipe: Any) -> Iterator[Callable[[int], Maps]]:
    """Trace by attention-map-diffusers as it does if not told otherwise: the last step's maps."""
    with attention_map_diffusers(pipe, "last") as maps:
        yield maps


WAYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "diffusers": ("diffusers", nothing),
    "gobelin.look_into": ("gobelin", gobelins),
    'gobelin.look_into, "sharp"': ("gobelin", gobelins_sharp),
    "attention-map-diffusers, all steps": ("attention_map_diffusers", attention_map_diffusers),
    "attention-map-diffusers, the last step": ("attention_map_diffusers", last_step_alone),
    "DAAM": ("daam", daams),
}


def ways_there(chosen: Sequence[str]) -> list[str]:
    """List the ways whose programs are installed: all, or diffusers alone and those of such names."""
    installed = [way for way, (module, _) in WAYS.items() if find_spec(module) is not None]
    return [way for way in installed if not chosen or way == "diffusers" or any(part in way for part in chosen)]


def paint_large(pipe: Any, way: str, side: int, steps: int) -> float:
    """Paint guided steps in a way, make its maps, and return the seconds that it took."""
    start = perf_counter()
    with WAYS[way][1](pipe) as maps:
        size = {"height": 8 * side, "width": 8 * side}
        pipe(
            PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(1), output_type="latent", **size
        )
    maps(1)
    return perf_counter() - start


def time(options: argparse.Namespace) -> None:
    """Print the ratios of seconds, with each way's maps and without any, neighbours in time."""
    pipe = diffusers_pipeline(random_pipeline(getattr(torch, options.precision)))
    ways = ways_there(options.ways)
    rounds = []
    for number in range(options.rounds + 1):
        order = ways if number % 2 == 0 else ways[::-1]
        rounds.append({way: paint_large(pipe, way, options.side, options.steps) for way in order})
    taken = {way: [one[way] for one in rounds[1:]] for way in ways}
    rows = [[way, f"{min(taken[way]):.1f} s", written(ratios(taken[way], taken[ways[0]]))] for way in ways]
    title = (
        f"{options.steps} guided steps at {options.side}×{options.side}, {options.rounds} rounds, {options.precision}"
    )
    print_table(title, ["", "least", "diffusers alone = 1"], rows)


def memory(options: argparse.Namespace) -> None:
    """Print the peak memory of fresh processes, which paint so many steps one after the other."""
    steps, rows = [str(count) for count in sorted(options.steps)], []
    for way in ways_there(options.ways):
        task = ["peak", way, "--side", str(options.side), "--steps", *steps, "--precision", options.precision]
        command = [sys.executable, __file__, *task, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        rows.append([way, *(done.stdout.split() if done.returncode == 0 else [f"{done.returncode}: {last}"])])
        print(" | ".join(rows[-1]), flush=True)
    title = f"Peak memory in MB, latents {options.side}×{options.side}, {options.precision}"
    print_table(title, ["", *(f"{count} steps" for count in steps)], rows)


def peak(options: argparse.Namespace) -> None:
    """Paint numbers of steps, and print the peak memory of this process in MB after each."""
    pipe = diffusers_pipeline(random_pipeline(getattr(torch, options.precision)))
    for steps in options.steps:
        paint_large(pipe, options.way, options.side, steps)
        print(f"{process_memory()['peak']:.0f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(required=True)
    small = tasks.add_parser("works")
    small.set_defaults(run=works)
    small.add_argument("--only", nargs="+", help="parts of the titles of cases")
    for run in (time, memory, peak):
        large = tasks.add_parser(run.__name__)
        large.set_defaults(run=run)
        if run is peak:
            large.add_argument("way")
        large.add_argument("--side", type=int, default=64)
        large.add_argument(
            "--steps", type=int, default=2 if run is time else [5, 25, 50], nargs=None if run is time else "+"
        )
        large.add_argument("--ways", nargs="+", default=[], help="parts of the names of ways")
        large.add_argument("--rounds", type=int, default=5)
        large.add_argument("--precision", choices=("bfloat16", "float32"), default="float32")
    for task in tasks.choices.values():
        task.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.run is not peak:
        print_machine(machine())
    options.run(options)


if __name__ == "__main__":
    main()
