"""``gobelin evaluate``: a model's scores, with their intervals and with the state of the instruments."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional

from gobelin.cli.options import parse, write_report
from gobelin.clip import ImageEncoder
from gobelin.data import find_world
from gobelin.errors import UsageError
from gobelin.evaluate import attribution, editing
from gobelin.evaluate.benchmark import Painted, Painting, judged, paint
from gobelin.evaluate.caption_sensitivity import listening
from gobelin.evaluate.failures_sheet import failures_sheet
from gobelin.evaluate.picture_folder import read_gallery, write_list
from gobelin.evaluate.picture_list import ALL_TASKS, MAX_PROMPTS, asked_for
from gobelin.evaluate.report import describe, markdown, report, tables
from gobelin.evaluate.retrieval import Retrieval, retrieval
from gobelin.evaluate.sanity_checks import check_instruments
from gobelin.formats.files import replacing, write_text
from gobelin.pipeline import Pipeline, shipped_model
from gobelin.scenes import WORLDS, World
from gobelin.training.recipes.from_scratch import IMAGE_ENCODER

SHEET_SUFFIXES = (".png", ".jpg")
SCENES_PER_PROMPT = 10  # pictures that the text encoder is tried on, for each prompt of a task


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how faithfully a model of the scenes paints what it is told.

    Prompts of fixed lists are painted, and each picture is graded without a look at its prompt: GenEval's six tasks,
    and the exact scene. Shares come with 95 % intervals, which know that pictures of one prompt are alike. The same
    pictures judged by other prompts show what chance would score.

    Some examples:
      gobelin evaluate
      gobelin evaluate runs/mine --limit 25 --json scores.json --report scores.md --sheet sheet.png
      gobelin evaluate runs/mine --splits test heldout --json final.json
      gobelin evaluate --attribution --json attribution.json
      gobelin evaluate --editing --limit 50
      gobelin evaluate --world core --write-prompts elsewhere
      gobelin evaluate --pictures elsewhere
    """

    model: Positional[Path | None] = None
    """A diffusers folder; without one, the model that comes with Gobelin."""
    world: str | None = None
    """The world of scenes that the model was trained on, nano or core; without it, what its folder says."""
    tasks: tuple[str, ...] = ALL_TASKS
    """GenEval's six, and beside them, in no mean: five, one object more than training shows, and what only some
    worlds have."""
    splits: tuple[str, ...] = ("dev", "heldout")
    """dev: held-in combinations, the list for every choice; heldout: combinations that training never saw; test:
    held-in, other prompts and other wordings, for the final table only."""
    limit: int = 100
    """Prompts for each task and split."""
    count: int = 4
    """Pictures for each prompt."""
    sampler: str | None = None
    """Without it, what the model recommends, as for the next two."""
    steps: int | None = None
    """How many denoising steps."""
    guidance: float | None = None
    """How hard to follow the prompt; 1 is not at all harder than the data."""
    seed: int = 0
    """Another number, other pictures of the same prompts."""
    device: str | None = None
    """cpu, cuda or mps; without it, or with auto, the best there is."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The precision to compute in; without it, float32. bfloat16 is about 1.5 times as fast on
    a CPU that computes in it."""
    pictures: Path | None = None
    """Judge the pictures of this folder, painted by any program, in place of a model's."""
    write_prompts: Path | None = None
    """Write what to paint to this folder's metadata.jsonl (file_name, text, seed), for any program, and stop."""
    attribution: bool = False
    """Measure word maps in place of faithfulness: whether words light up what they painted, in --limit captions."""
    editing: bool = False
    """Measure prompt-to-prompt in place of faithfulness: whether a changed colour word changes just that, in
    --limit captions."""
    json: Path | None = None
    """Write the scores here."""
    report: Path | None = None
    """Write the scores here as Markdown."""
    sheet: Path | None = None
    """Write a contact sheet here, PNG or JPEG: a sample of each task, then failures, framed in red."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What was measured, and of what."""

    pictures: list[Painted]
    content: dict[str, Any]


def run(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(Evaluate, "evaluate", arguments)
    if options.sheet is not None and options.sheet.suffix.lower() not in SHEET_SUFFIXES:
        raise UsageError(f"--sheet is {options.sheet}: give a name that ends in {' or '.join(SHEET_SUFFIXES)}")
    if options.write_prompts is not None:
        write_prompts(options, options.write_prompts)
        return
    if options.attribution or options.editing:
        content = of_words(options)
        print_report(content)
        write_report(options.json, content)
        if options.report is not None:
            write_text(options.report, markdown(content))
        return
    measured = of_folder(options, options.pictures) if options.pictures is not None else of_model(options)
    print_report(measured.content)
    write_report(options.json, measured.content)
    if options.report is not None:
        write_text(options.report, markdown(measured.content))
    if options.sheet is not None:
        title = f"{measured.content['model']}: what it paints, and where it fails"
        write_sheet(options.sheet, failures_sheet(measured.pictures, title))


def open_model(options: Evaluate) -> tuple[Pipeline, World]:
    """The model that was asked for, and the world that it is measured by."""
    chosen = None if options.world is None else find_world(options.world)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    pipeline = Pipeline.from_pretrained(options.model, options.device, dtype)
    world = chosen or world_of(pipeline)
    size = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    if size != world.size:
        raise UsageError(f"the model paints {size} pixels and the world {world.name} has {world.size}: not comparable")
    return pipeline, world


def of_words(options: Evaluate) -> dict[str, Any]:
    """Look into a model's pictures and into true ones, or edit its pictures."""
    what = "attribution" if options.attribution else "editing"
    if options.attribution and options.editing:
        raise UsageError("--attribution and --editing are two measurements: ask for one")
    if not 2 <= options.limit <= MAX_PROMPTS:
        raise UsageError(f"limit is {options.limit}: give a number from 2 to {MAX_PROMPTS}")
    plain = Evaluate()
    for name in ("tasks", "splits", "count", "sampler", "steps", "guidance", "seed", "pictures", "sheet"):
        if getattr(options, name) != getattr(plain, name):
            raise UsageError(f"--{what} paints as the model recommends, on a list of its own: leave out --{name}")
    pipeline, world = open_model(options)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("looking" if options.attribution else "editing", total=None)
        measure = {"attribution": attribution.measure, "editing": editing.measure}[what]
        measured = measure(pipeline, world, options.limit, lambda: progress.advance(bar))
    return {"model": pipeline.name, "world": world.name, what: measured}


def of_model(options: Evaluate) -> _Measured:
    """Paint with a model, and judge what it painted."""
    pipeline, world = open_model(options)
    if options.seed < 0:
        raise UsageError(f"the seed is {options.seed}: give 0 or more")
    asked = asked_for(world, options.splits, options.tasks, options.limit, options.count)
    painting = Painting(sampler=options.sampler, steps=options.steps, guidance=options.guidance, seed=options.seed)
    start = time.monotonic()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("painting", total=len(asked))
        images = paint(pipeline, asked, painting, advance=lambda painted: progress.advance(bar, painted))
        pictures = judged(asked, images, world)
    seconds = time.monotonic() - start
    recommended = pipeline.recommended
    settings = {
        "sampler": options.sampler or recommended.sampler,
        "steps": recommended.steps if options.steps is None else options.steps,
        "guidance": recommended.guidance if options.guidance is None else options.guidance,
        "guidance_rescale": recommended.guidance_rescale,
        "seed": options.seed,
        "prompts_a_task": options.limit,
        "pictures_a_prompt": options.count,
        "dtype": options.dtype or "float32",
        "pictures_per_second": round(len(asked) / seconds, 2),
    }
    content = report(
        pictures,
        check_instruments(pipeline.vae, world, each=min(100, options.limit)),
        chosen_captions(pipeline, options, world),
        heard=listening(pipeline, world, min(500, 5 * options.limit)),
        model=pipeline.name,
        world=world.name,
        settings=settings,
    )
    return _Measured(pictures=pictures, content=content)


def chosen_captions(pipeline: Pipeline, options: Evaluate, world: World) -> Retrieval | None:
    """How the model's text encoder fares against hard negatives; None where it came without its image encoder."""
    folder = (shipped_model() if options.model is None else options.model) / IMAGE_ENCODER
    if not folder.is_dir():
        print(f"gobelin: no retrieval scores, as there is no {folder}", file=sys.stderr)
        return None
    image_encoder = ImageEncoder.from_pretrained(folder).to(pipeline.unet.device)
    scenes = min(1000, SCENES_PER_PROMPT * options.limit)
    return retrieval(pipeline.text_encoder, image_encoder, pipeline.tokenizer, world, scenes)


def of_folder(options: Evaluate, folder: Path) -> _Measured:
    """Judge pictures that are there already."""
    painting = ("model", "sampler", "steps", "guidance", "device", "dtype")
    if given := [name for name in painting if getattr(options, name) is not None]:
        what = "a model" if given[0] == "model" else f"--{given[0]}"
        raise UsageError(f"--pictures judges pictures that are painted already: leave out {what}")
    gallery = read_gallery(folder, None if options.world is None else find_world(options.world))
    world, total = gallery.world, len(gallery.asked)
    if gallery.resized:
        print(
            f"gobelin: {gallery.resized:,} of {total:,} pictures are not {world.size}×{world.size} and were resized",
            file=sys.stderr,
        )
    pictures = judged(gallery.asked, gallery.images, world)
    content = report(
        pictures,
        check_instruments(None, world, each=min(100, total)),
        None,
        heard=(),
        model=folder.resolve().name,
        world=world.name,
        settings={"painted": "elsewhere", "resized": gallery.resized},
    )
    return _Measured(pictures=pictures, content=content)


def write_prompts(options: Evaluate, folder: Path) -> None:
    """The list for another program, of --world or of the model's world."""
    if options.world is not None:
        world = find_world(options.world)
    else:
        world = world_of(Pipeline.from_pretrained(options.model, "cpu"))
    asked = asked_for(world, options.splits, options.tasks, options.limit, options.count)
    write_list(folder, asked, world, options.seed)
    print(f"{len(asked):,} pictures to paint: {folder}")


def world_of(pipeline: Pipeline) -> World:
    """The world that a model says it knows; :class:`UsageError` where it says none."""
    if pipeline.world is None:
        raise UsageError(
            f"the model {pipeline.name} does not say which world of scenes it knows: say --world NAME, one of "
            f"{', '.join(WORLDS)}"
        )
    return find_world(pipeline.world)


def print_report(content: dict[str, Any]) -> None:
    """The tables."""
    console = Console(width=150)
    console.print(describe(content), highlight=False)
    for table in tables(content):
        grid = Table(*table.columns, title=table.title, title_justify="left", title_style="bold")
        for number, row in enumerate(table.rows):
            grid.add_row(*row, style="bold" if number in table.bold else None, end_section=number in table.bold)
        console.print()
        console.print(grid, highlight=False)
        if table.note:
            console.print(table.note, highlight=False)


def write_sheet(file: Path, sheet: Image.Image) -> None:
    """The contact sheet, as what its name says."""
    with replacing(file) as temporary:
        sheet.save(temporary, format="PNG" if file.suffix.lower() == ".png" else "JPEG", quality=90)
