"""``gobelin evaluate``: measure a model's scores, its words' attribution, its edits, or its images beside true ones."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gobelin.cli.options import Positional, parse
from gobelin.cli.painting_options import PipelineOptions
from gobelin.cli.report_files import ReportFiles, progress_bar, publish
from gobelin.engine_names import EngineName
from gobelin.errors import UsageError
from gobelin.evaluate.image_list import ALL_TASKS, MAX_PROMPTS, requested_images
from gobelin.evaluate.word_changes import WORD_KINDS, WordKind
from gobelin.formats.files import replacing

if TYPE_CHECKING:
    from gobelin.evaluate.benchmark import Benchmark
    from gobelin.evaluate.measurement_report import Report
    from gobelin.pipeline import Pipeline
    from gobelin.scenes import World

_SHEET_SUFFIXES = (".png", ".jpg")

_HELP = """usage: gobelin evaluate MEASUREMENT [OPTIONS]

Measure a model: on scenes whose truth is known, or by the distance of its images from true ones.

measurements:
  scenes          generate images of six tasks, and score them without a look at their prompts
  images          score a folder of images that another program generated
  prompts         write the list of prompts and seeds for another program
  attribution     compare the heat map of each word with the object that it speaks of
  editing         change one word, and see whether what it is about changes and nothing else
  patching        give some attention another caption's text, and see whether colour, shape, number or place follow
  erasure         erase a colour or a shape, and see whether it is gone and what else broke
  correspondence  find points of objects again in other scenes by the U-Net's features
  heads           fit which heads of attention point, for sharper maps, and keep their weights beside the model
  presence        tell by a score whether what a word names is in an image
  emoji           paint captions of emoji, and tell by networks that saw true ones alone whether they are right
  fidelity        compare images painted from captions with the true ones: FID, KID, CLIP score

  gobelin evaluate MEASUREMENT --help   options and examples

examples:
  gobelin evaluate scenes
  gobelin evaluate scenes runs/mine --limit 25 --json scores.json --report scores.md --sheet sheet.png
  gobelin evaluate prompts --world core --out elsewhere
  gobelin evaluate images elsewhere
  gobelin evaluate attribution --limit 64
  gobelin evaluate editing --limit 50
  gobelin evaluate patching --limit 30
  gobelin evaluate correspondence --limit 32
  gobelin evaluate heads runs/mine --save
  gobelin evaluate presence --limit 64
  gobelin evaluate emoji emoji --model runs/emoji --sheet sheet.png
  gobelin evaluate fidelity my-images --model runs/mine --features model
"""


@dataclass(frozen=True, kw_only=True)
class _BenchmarkFiles(ReportFiles):
    """Files that a benchmark can write: its report, and a contact sheet of the scored images."""

    sheet: Path | None = None
    """Write a contact sheet here, PNG or JPEG: a sample of each task, then failures, framed in red."""


@dataclass(frozen=True, kw_only=True)
class _ModelOptions:
    """The model that is measured."""

    model: Positional[Path | None] = None
    """A diffusers folder; without one, the model that comes with Gobelin."""
    world: str | None = None
    """The world of scenes that the model was trained on: core, nano or rich; without it, the one that its folder
    names."""
    device: str | None = None
    """cpu, cuda or mps; without it, or with auto, the best there is."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The precision to compute in; without it, the fastest for the device: bfloat16 for large models where it
    multiplies that faster, float32 otherwise."""
    engine: EngineName = "eager"
    """Engine that runs the networks."""


@dataclass(frozen=True, kw_only=True)
class _ListOptions:
    """The list of prompts and images."""

    tasks: tuple[str, ...] = ALL_TASKS
    """GenEval's six, and beside them, in no mean: five, one object more than training shows, and tasks that only
    some worlds have."""
    splits: tuple[str, ...] = ("dev", "heldout")
    """dev: held-in combinations, the list for every choice; heldout: combinations that training never saw; test:
    held-in, other prompts and other wordings, for the final table only."""
    limit: int = 100
    """The number of prompts for each task and split."""
    count: int = 4
    """The number of images for each prompt."""
    seed: int = 0
    """Another seed, other images of the same prompts."""


@dataclass(frozen=True, kw_only=True)
class EvaluateScenes(_BenchmarkFiles, _ListOptions, _ModelOptions):
    """Generate images from fixed lists of prompts, and score each without a look at its prompt.

    The tasks are GenEval's six, and the exact scene. Shares come with 95 % intervals, which know that images of one
    prompt are alike. The same images scored for other prompts show the level of chance.

    Some examples:
      gobelin evaluate scenes
      gobelin evaluate scenes runs/mine --limit 25 --json scores.json --report scores.md --sheet sheet.png
      gobelin evaluate scenes runs/mine --splits test heldout --json final.json
      gobelin evaluate scenes --tasks colours position --steps 10 --dtype bfloat16
    """

    sampler: str | None = None
    """The sampler; without it, the model's recommendation, as for the next two."""
    steps: int | None = None
    """The number of denoising steps."""
    guidance: float | None = None
    """The strength of classifier-free guidance; 1 is none."""


@dataclass(frozen=True, kw_only=True)
class EvaluateImages(_BenchmarkFiles):
    """Score a folder of images that another program generated from the list of gobelin evaluate prompts.

    Some examples:
      gobelin evaluate prompts --world core --out elsewhere
      gobelin evaluate images elsewhere --json scores.json --sheet sheet.png
    """

    folder: Positional[Path]
    """Images, and metadata.jsonl with the file_name and the text of each."""
    world: str | None = None
    """The world of the prompts: core, nano or rich; without it, the one that the list names."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePrompts(_ListOptions):
    """Write the list of images to generate as metadata.jsonl (file_name, text, seed), for any program.

    Some examples:
      gobelin evaluate prompts --out elsewhere
      gobelin evaluate prompts --world nano --out elsewhere --limit 25 --count 1
    """

    out: Path
    """The folder to write to; it must be empty or new."""
    world: str = "core"
    """The world of the prompts: core, nano or rich."""


@dataclass(frozen=True, kw_only=True)
class EvaluateAttribution(ReportFiles, _ModelOptions):
    """Compare the heat map of each word with the objects that it speaks of, in the model's images and in true ones.

    Some examples:
      gobelin evaluate attribution
      gobelin evaluate attribution runs/mine --limit 25 --json attribution.json --report attribution.md
    """

    limit: int = 100
    """The number of captions, 2 or more."""


@dataclass(frozen=True, kw_only=True)
class EvaluateEditing(ReportFiles, _ModelOptions):
    """Change one word of captions, and measure whether what it is about changes and nothing else.

    Some examples:
      gobelin evaluate editing --limit 50
      gobelin evaluate editing runs/mine --kinds colour --limit 25 --json editing.json --report editing.md
    """

    kinds: tuple[WordKind, ...] = WORD_KINDS
    """The kinds of words that change."""
    limit: int = 100
    """The number of edits of each kind, 2 or more; fewer are made where the model gets few captions right."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePatching(ReportFiles, _ModelOptions):
    """Paint captions with some attention given another caption's text, and measure what of the image follows.

    Captions differ in one word, a colour, a shape, a number or a relation, and are painted from the same noise. Each
    site of cross-attention is patched alone, and all but it (activation patching).

    Some examples:
      gobelin evaluate patching --limit 30
      gobelin evaluate patching runs/mine --kinds colour --json patching.json --report patching.md
    """

    kinds: tuple[WordKind, ...] = WORD_KINDS
    """The kinds of words that differ."""
    limit: int = 30
    """The number of pairs of captions of each kind, 2 or more; fewer where the model gets few of them right."""


@dataclass(frozen=True, kw_only=True)
class EvaluateErasure(ReportFiles, _ModelOptions):
    """Erase a colour or a shape from a copy of a model, and measure whether it is gone and what else broke.

    Some examples:
      gobelin evaluate erasure --word star --instead circle
      gobelin evaluate erasure runs/mine --word red --instead "" --limit 20 --json erasure.json
    """

    word: str
    """What is erased: a shape or a colour of the world."""
    instead: str = ""
    """What it is read as; without it, as nothing."""
    ridge: float = 1e-3
    """How strongly the weights are held, above 0: more of it erases less and breaks less."""
    limit: int = 50
    """The number of prompts of each task, 2 or more."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCorrespondence(ReportFiles, _ModelOptions):
    """Find points of objects again in scenes where these have moved or changed colours, by the U-Net's features.

    Beside raw pixels, the VAE's latents and chance. Without a layer and a timestep, those that are the defaults of
    Pipeline.features.

    Some examples:
      gobelin evaluate correspondence --limit 32
      gobelin evaluate correspondence --layers up_blocks.1.attentions.1 --timestep 261 --json correspondence.json
    """

    limit: int = 100
    """The number of scenes, 2 or more; each is changed in three ways."""
    layers: tuple[str, ...] = ()
    """Layers of the U-Net, names or patterns."""
    timestep: int | None = None
    """Timestep, 0 to 999, to which images are noised."""
    split: Literal["dev", "test"] = "test"
    """dev: the scenes for every choice; test: others, for the final table only."""


@dataclass(frozen=True, kw_only=True)
class EvaluateHeads(ReportFiles, _ModelOptions):
    """Fit weights of heads of attention to scenes whose masks are exact, and measure the sharp maps that they make.

    With --save they are kept in the model's folder, and maps are made by them from then on. Without, nothing changes.

    Some examples:
      gobelin evaluate heads runs/mine
      gobelin evaluate heads runs/mine --save
    """

    scenes: int = 320
    """The number of scenes that weights are fitted to, 2 or more."""
    limit: int = 96
    """The number of other scenes that maps are measured on, 2 or more."""
    save: bool = False
    """Keep the weights in the model's folder, as head_weights.json."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePresence(ReportFiles, _ModelOptions):
    """Measure how well scores tell words for what is in an image from words for what is not, in true scenes.

    Attention, and the error of denoising, with the area under the ROC curve.

    Some examples:
      gobelin evaluate presence --limit 64
      gobelin evaluate presence runs/mine --split dev --json presence.json --report presence.md
    """

    limit: int = 100
    """The number of scenes, 2 or more."""
    split: Literal["dev", "test"] = "test"
    """dev: the scenes for every choice; test: others, for the final table only."""


@dataclass(frozen=True, kw_only=True)
class EvaluateFidelity(ReportFiles, PipelineOptions):
    """Compare images painted from a folder's captions with its true images: FID, KID, and a CLIP score.

    One half of the folder gives captions to paint, and the other is what they are compared with; the true images of
    these captions are compared too, and say how near a perfect painter comes. The folder should hold images that the
    model was not trained on, as copies of training images would be perfect.

    Needs pip install 'gobelin[fidelity]'.

    Some examples:
      gobelin evaluate fidelity my-images --model runs/mine --features model --count 500
      gobelin evaluate fidelity my-images --model runs/mine --clip clip-vit-large-patch14 --out painted
      gobelin evaluate fidelity my-images --painted painted --features weights.pth --json fidelity.json
    """

    folder: Positional[Path]
    """True images with captions, as for training: a folder, or tars; beside --painted a folder needs no captions."""
    painted: Path | None = None
    """A folder of images that are painted already, by any program; with captions, if there is to be a CLIP score."""
    count: int | None = None
    """The number of images of each side, chosen at random; without it, half of the folder's, up to 5,000, or as many
    as --painted has."""
    seed: int = 0
    """Another seed: other images are chosen, and painted from other noise."""
    features: str = "inception"
    """What images are compared by: inception, whose weights are downloaded at first use; model, the image encoder of a
    model that was trained from scratch; or a path: Inception's weights, a model folder, or a CLIP's of transformers."""
    clip: str | None = None
    """What compares images with captions: model, none, or the path of a model or CLIP folder; without it, the features
    where they are of captions too, or else the model's own."""
    caption_column: str | None = None
    """The column of the metadata, or the key of the JSON, with the true images' captions; without it, text, caption or
    prompt, as beside --painted."""
    sampler: str | None = None
    """The sampler; without it, the model's recommendation, as for the next two."""
    steps: int | None = None
    """The number of denoising steps."""
    guidance: float | None = None
    """The strength of classifier-free guidance; 1 is none."""
    out: Path | None = None
    """Keep the painted images here, with their captions, so that --painted can compare them again."""


@dataclass(frozen=True, kw_only=True)
class EvaluateEmoji(ReportFiles, PipelineOptions):
    """Paint captions of emoji, held in and held out, and measure whether concept and style are right.

    The judge, a classifier and an encoder, learns from true pictures alone; it is trained at first use, in minutes,
    and kept in the folder. Beside its verdicts stand its own on true pictures, and those for captions dealt out anew.

    Some examples:
      gobelin evaluate emoji emoji --model runs/emoji
      gobelin evaluate emoji emoji --model runs/emoji --limit 200 --sheet sheet.png --json emoji.json
    """

    folder: Positional[Path]
    """The folder that gobelin data emoji wrote."""
    limit: int = 1000
    """The number of captions of each split, at most."""
    seed: int = 0
    """Another seed: other captions are chosen, and painted from other noise."""
    sampler: str | None = None
    """The sampler; without it, the model's recommendation, as for the next two."""
    steps: int | None = None
    """The number of denoising steps."""
    guidance: float | None = None
    """The strength of classifier-free guidance; 1 is none."""
    sheet: Path | None = None
    """Write a contact sheet here, PNG or JPEG: up to a hundred images of each split, wrong ones framed in red."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin evaluate``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return
    name, *rest = arguments
    if name not in _MEASUREMENTS:
        from gobelin.validation import refuse_unknown  # imported where it is needed: the help has to be quick

        refuse_unknown([name], _MEASUREMENTS, what="measurement")
    _MEASUREMENTS[name](rest)


def _scenes(options: EvaluateScenes) -> None:
    """Generate images with a model, and score them."""
    from gobelin.clip import IMAGE_ENCODER, ImageEncoder
    from gobelin.evaluate.benchmark import measure_scenes
    from gobelin.evaluate.scene_models import open_scene_model
    from gobelin.evaluate.scored_images import GenerationSettings
    from gobelin.pipeline import shipped_model

    _require_sheet_suffix(options.sheet)
    if options.seed < 0:
        raise UsageError(f"the seed is {options.seed}: give 0 or more")
    pipeline, world = open_scene_model(options.model, options.world, options.device, options.dtype, options.engine)
    requests = requested_images(world, options.splits, options.tasks, options.limit, options.count)
    image_encoder, folder = None, (options.model or shipped_model()) / IMAGE_ENCODER
    if folder.is_dir():
        image_encoder = ImageEncoder.from_pretrained(folder).to(pipeline.unet.device)
    else:
        print(f"gobelin: no retrieval scores, as there is no {folder}", file=sys.stderr)
    generation = GenerationSettings(
        sampler=options.sampler, steps=options.steps, guidance=options.guidance, seed=options.seed
    )
    with progress_bar("generating", len(requests)) as advance:
        benchmark = measure_scenes(pipeline, world, requests, generation, image_encoder, advance)
    _publish_benchmark(options, benchmark)


def _images(options: EvaluateImages) -> None:
    """Score images that are there already."""
    from gobelin.data import find_world
    from gobelin.evaluate.benchmark import measure_images

    _require_sheet_suffix(options.sheet)
    benchmark = measure_images(options.folder, None if options.world is None else find_world(options.world))
    if resized := benchmark.settings["resized"]:
        total, size = len(benchmark.images), find_world(benchmark.world).size
        print(f"gobelin: {resized:,} of {total:,} images are not {size}×{size} and were resized", file=sys.stderr)
    _publish_benchmark(options, benchmark)


def _prompts(options: EvaluatePrompts) -> None:
    """Write the list of images for another program."""
    from gobelin.data import find_world
    from gobelin.evaluate.gallery import write_image_list

    if options.seed < 0:
        raise UsageError(f"the seed is {options.seed}: give 0 or more")
    world = find_world(options.world)
    requests = requested_images(world, options.splits, options.tasks, options.limit, options.count)
    write_image_list(options.out, requests, world, options.seed)
    print(f"{len(requests):,} images to generate: {options.out}")


def _attribution(options: EvaluateAttribution) -> None:
    """Measure the attribution of words to pixels."""
    from gobelin.evaluate.attribution import attribution_report, measure_attribution

    pipeline, world = _open(options, options.limit)
    with progress_bar("tracing") as advance:
        found = measure_attribution(pipeline, world, options.limit, lambda: advance(1))
    _publish(options, found, attribution_report)


def _editing(options: EvaluateEditing) -> None:
    """Measure edits."""
    from gobelin.evaluate.editing import editing_report, measure_editing

    pipeline, world = _open(options, options.limit)
    with progress_bar("editing") as advance:
        found = measure_editing(pipeline, world, options.limit, options.kinds, lambda: advance(1))
    _publish(options, found, editing_report)


def _patching(options: EvaluatePatching) -> None:
    """Measure patches of attention."""
    from gobelin.evaluate.patching import measure_patching, patching_report

    pipeline, world = _open(options, options.limit)
    with progress_bar("patching") as advance:
        found = measure_patching(pipeline, world, options.limit, options.kinds, lambda: advance(1))
    _publish(options, found, patching_report)


def _erasure(options: EvaluateErasure) -> None:
    """Measure an erasure."""
    from gobelin.evaluate.erasure import erasure_report, measure_erasure

    pipeline, world = _open(options, options.limit)
    with progress_bar("painting") as advance:
        found = measure_erasure(pipeline, world, options.word, options.instead, options.limit, options.ridge, advance)
    _publish(options, found, erasure_report)


def _correspondence(options: EvaluateCorrespondence) -> None:
    """Measure correspondence by features."""
    from gobelin.evaluate.correspondence import correspondence_report, measure_correspondence

    pipeline, world = _open(options, options.limit)
    given = {"layers": options.layers or None, "timestep": options.timestep}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with progress_bar("comparing") as advance:
        found = measure_correspondence(pipeline, world, options.limit, lambda: advance(1), options.split, **chosen)
    _publish(options, found, correspondence_report)


def _presence(options: EvaluatePresence) -> None:
    """Measure scores of presence."""
    from gobelin.evaluate.presence import measure_presence, presence_report

    pipeline, world = _open(options, options.limit)
    with progress_bar("asking") as advance:
        found = measure_presence(pipeline, world, options.limit, lambda: advance(1), options.split)
    _publish(options, found, presence_report)


def _heads(options: EvaluateHeads) -> None:
    """Fit head weights, measure what they bring, and keep them where that is asked for."""
    from gobelin.checkpoint.diffusers_folder import HEAD_WEIGHTS
    from gobelin.evaluate.fit_heads import fit_heads, heads_report, measure_heads
    from gobelin.formats.files import write_json
    from gobelin.pipeline import shipped_model

    if not 2 <= options.scenes <= MAX_PROMPTS:
        raise UsageError(f"scenes is {options.scenes}: give a number from 2 to {MAX_PROMPTS}")
    folder = options.model or shipped_model()
    if options.save and not folder.is_dir():
        raise UsageError(f"{folder} is no folder, and head weights are kept in the model's: convert it to one first")
    pipeline, world = _open(options, options.limit)
    with progress_bar("looking") as advance:
        weights = fit_heads(pipeline, world, options.scenes, lambda: advance(1))
        found = measure_heads(pipeline, world, weights, options.scenes, options.limit, lambda: advance(1))
    if options.save:
        write_json(folder / HEAD_WEIGHTS, weights.to_json())
    _publish(options, found, heads_report)
    if options.save:
        print(f"saved: {folder / HEAD_WEIGHTS}")


def _fidelity(options: EvaluateFidelity) -> None:
    """Compare painted images with true ones."""
    from gobelin.cli.evaluate_fidelity import evaluate_fidelity

    evaluate_fidelity(options)


def _emoji(options: EvaluateEmoji) -> None:
    """Paint and judge captions of emoji."""
    from gobelin.cli.evaluate_emoji import evaluate_emoji

    _require_sheet_suffix(options.sheet)
    evaluate_emoji(options)


_MEASUREMENTS: dict[str, Callable[[Sequence[str]], None]] = {
    "scenes": lambda rest: _scenes(parse(EvaluateScenes, "evaluate scenes", rest)),
    "images": lambda rest: _images(parse(EvaluateImages, "evaluate images", rest)),
    "prompts": lambda rest: _prompts(parse(EvaluatePrompts, "evaluate prompts", rest)),
    "attribution": lambda rest: _attribution(parse(EvaluateAttribution, "evaluate attribution", rest)),
    "editing": lambda rest: _editing(parse(EvaluateEditing, "evaluate editing", rest)),
    "patching": lambda rest: _patching(parse(EvaluatePatching, "evaluate patching", rest)),
    "erasure": lambda rest: _erasure(parse(EvaluateErasure, "evaluate erasure", rest)),
    "correspondence": lambda rest: _correspondence(parse(EvaluateCorrespondence, "evaluate correspondence", rest)),
    "heads": lambda rest: _heads(parse(EvaluateHeads, "evaluate heads", rest)),
    "presence": lambda rest: _presence(parse(EvaluatePresence, "evaluate presence", rest)),
    "emoji": lambda rest: _emoji(parse(EvaluateEmoji, "evaluate emoji", rest)),
    "fidelity": lambda rest: _fidelity(parse(EvaluateFidelity, "evaluate fidelity", rest)),
}


def _require_sheet_suffix(file: Path | None) -> None:
    """Check, before anything is generated, that the sheet's name ends as an image's."""
    if file is not None and file.suffix.lower() not in _SHEET_SUFFIXES:
        raise UsageError(f"--sheet is {file}: give a name that ends in {' or '.join(_SHEET_SUFFIXES)}")


def _open(options: _ModelOptions, limit: int) -> "tuple[Pipeline, World]":
    """Check the number of scenes, as an interval needs two, and open a model of scenes with its world."""
    from gobelin.evaluate.scene_models import open_scene_model

    if not 2 <= limit <= MAX_PROMPTS:
        raise UsageError(f"limit is {limit}: give a number from 2 to {MAX_PROMPTS}")
    return open_scene_model(options.model, options.world, options.device, options.dtype, options.engine)


def _publish(options: ReportFiles, found: Any, report: "Callable[[dict[str, Any]], Report]") -> None:
    """Print what was found as its report, and write it where the options ask for that."""
    content = found.to_json()
    publish(options, content, report(content))


def _publish_benchmark(options: _BenchmarkFiles, benchmark: "Benchmark") -> None:
    """Print a benchmark's report, and write it and the contact sheet where the options ask for them."""
    from gobelin.evaluate.benchmark import benchmark_report
    from gobelin.evaluate.failures_sheet import failures_sheet

    content = benchmark.to_json()
    publish(options, content, benchmark_report(content))
    if options.sheet is not None:
        sheet = failures_sheet(benchmark.images, f"{benchmark.model}: a sample of its images, and where it fails")
        with replacing(options.sheet) as temporary:
            sheet.save(temporary, format="PNG" if options.sheet.suffix.lower() == ".png" else "JPEG", quality=90)
