"""The benchmark of scenes: generate images from prompts, grade them, and score each task with its controls.

The tasks are in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513), on a world whose truth is known; the
numbers are not comparable with GenEval's own.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gobelin.clip import ImageEncoder
from gobelin.evaluate.caption_sensitivity import (
    CaptionSensitivity,
    caption_sensitivity,
    caption_sensitivity_tables,
)
from gobelin.evaluate.gallery import read_gallery
from gobelin.evaluate.image_list import RequestedImage
from gobelin.evaluate.intervals import Share
from gobelin.evaluate.measurement_report import SPLIT_TITLES, Report, ReportTable, as_json, share_cell
from gobelin.evaluate.retrieval import Retrieval, measure_retrieval, retrieval_tables
from gobelin.evaluate.sanity_checks import SanityChecks, gate_table, run_sanity_checks
from gobelin.evaluate.scored_images import GenerationSettings, ScoredImage, generate_images, group_by_task, score_images
from gobelin.pipeline import Pipeline
from gobelin.scenes import TASKS, Prompt, World, score, swapped
from gobelin.scenes.relations import INVERSE

_SCENES_PER_PROMPT = 10  # images for retrieval, for each prompt of a task

_COMPARABLE = (
    "The tasks are GenEval's in kind (arXiv 2310.11513), on procedural scenes. GenEval's own numbers come from another "
    "world, of photographs and their objects, and cannot be compared with these."
)
_READING = (
    "Correct: everything that the prompt asks for is there, in its colour, number and place. Exact: that, and nothing "
    "else. Colour and shape right: each named one is there somewhere. Held out: combinations that training never saw. "
    "Intervals are 95 %: Wilson's, for the effective number of independent images."
)


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The shares of a task's images that are right, in the four senses of :class:`gobelin.scenes.Score`."""

    task: str
    split: str
    correct: Share
    colour: Share
    shape: Share
    exact: Share


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """The mean over the tasks of a split, which is GenEval's overall score, and the worst task."""

    split: str
    tasks: int
    correct: Share
    exact: Share
    worst: str
    worst_correct: Share


@dataclass(frozen=True, kw_only=True)
class ControlScore:
    """The same images scored for prompts that they were not generated for.

    ``perfect`` is the score that a model that is always right would have.
    """

    control: str
    task: str
    split: str
    correct: Share
    perfect: float


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Scored images of a model or of a folder, and the checks that go with them.

    ``settings`` say how the images were generated. ``retrieval`` is None without an image encoder, and
    ``caption_sensitivity`` empty without a model.
    """

    model: str
    world: str
    settings: dict[str, Any]
    images: list[ScoredImage]
    sanity_checks: SanityChecks
    retrieval: Retrieval | None = None
    caption_sensitivity: Sequence[CaptionSensitivity] = ()

    def to_json(self) -> dict[str, Any]:
        """Convert to dicts, lists, strings and numbers: scores, means and controls in place of the images."""
        scores = task_scores(self.images)
        return {
            "model": self.model,
            "world": self.world,
            "settings": self.settings,
            "images": len(self.images),
            "scores": as_json(scores),
            "means": as_json(mean_scores(scores)),
            "controls": as_json([*shuffled_captions(self.images), *swapped_attributes(self.images)]),
            "retrieval": as_json(self.retrieval),
            "caption_sensitivity": as_json(self.caption_sensitivity),
            "sanity_checks": self.sanity_checks.to_json(),
        }


def measure_scenes(
    pipeline: Pipeline,
    world: World,
    requests: Sequence[RequestedImage],
    generation: GenerationSettings | None = None,
    image_encoder: ImageEncoder | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Benchmark:
    """Generate the requested images with a model and score them; check the model's encoders and the grader too.

    The checks take a number of scenes in proportion to the prompts of a task. ``advance`` is called with the number
    of images of each finished batch. Without an ``image_encoder`` there is no retrieval.
    """
    generation = generation or GenerationSettings()
    prompts_a_task = 1 + max(request.number for request in requests)
    start = time.monotonic()
    images = score_images(requests, generate_images(pipeline, requests, generation, advance), world)
    seconds = time.monotonic() - start
    recommended = pipeline.recommended
    settings = {
        "sampler": generation.sampler or recommended.sampler,
        "steps": recommended.steps if generation.steps is None else generation.steps,
        "guidance": recommended.guidance if generation.guidance is None else generation.guidance,
        "guidance_rescale": recommended.guidance_rescale,
        "seed": generation.seed,
        "prompts_a_task": prompts_a_task,
        "images_a_prompt": 1 + max(request.repeat for request in requests),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "engine": pipeline.engine,
        "images_per_second": round(len(requests) / seconds, 2),
    }
    retrieval = None
    if image_encoder is not None:
        scenes = min(1000, _SCENES_PER_PROMPT * prompts_a_task)
        retrieval = measure_retrieval(pipeline.text_encoder, image_encoder, pipeline.tokenizer, world, scenes)
    return Benchmark(
        model=pipeline.name,
        world=world.name,
        settings=settings,
        images=images,
        sanity_checks=run_sanity_checks(pipeline.vae, world, each=min(100, prompts_a_task)),
        retrieval=retrieval,
        caption_sensitivity=caption_sensitivity(pipeline, world, min(500, 5 * prompts_a_task)),
    )


def measure_images(folder: Path, world: World | None = None) -> Benchmark:
    """Score a folder of images that another program generated; ``world`` None takes the one that its list names.

    Raises :class:`gobelin.errors.DataError` for a line or an image that cannot be used.
    """
    gallery = read_gallery(folder, world)
    return Benchmark(
        model=folder.resolve().name,
        world=gallery.world.name,
        settings={"generated": "elsewhere", "resized": gallery.resized},
        images=score_images(gallery.requests, gallery.images, gallery.world),
        sanity_checks=run_sanity_checks(None, gallery.world, each=min(100, len(gallery.images))),
    )


def task_scores(images: Sequence[ScoredImage]) -> list[TaskScore]:
    """Compute each task's shares, by split and task; the intervals know which images share a prompt."""
    return [
        TaskScore(
            task=task,
            split=split,
            **{
                name: Share.of([getattr(each.score, name) for each in chosen], [each.prompt.text for each in chosen])
                for name in ("correct", "colour", "shape", "exact")
            },
        )
        for (task, split), chosen in group_by_task(images).items()
    ]


def mean_scores(scores: Sequence[TaskScore]) -> list[MeanScore]:
    """Compute the means over GenEval's six tasks, split by split; further tasks do not count."""
    means = []
    for split in dict.fromkeys(row.split for row in scores):
        chosen = [row for row in scores if row.split == split and row.task in TASKS]
        if not chosen:
            continue
        worst = min(chosen, key=lambda row: row.correct.value)
        means.append(
            MeanScore(
                split=split,
                tasks=len(chosen),
                correct=Share.mean([row.correct for row in chosen]),
                exact=Share.mean([row.exact for row in chosen]),
                worst=worst.task,
                worst_correct=worst.correct,
            )
        )
    return means


def shuffled_captions(images: Sequence[ScoredImage]) -> list[ControlScore]:
    """Score images for other prompts of their task and split: this model's chance level.

    Prompts stand in a ring in random order, and each one's images are scored for the next prompt, so that none meets
    its own. The perfect model's chance level is the share of pairs of prompts that ask for the same.
    """
    controls = []
    for (task, split), chosen in group_by_task(images).items():
        prompts = list({each.prompt.text: each.prompt for each in chosen}.values())
        ring = random.Random(0).sample(prompts, len(prompts))
        following = {prompt.text: ring[at - 1] for at, prompt in enumerate(ring)}
        contents = Counter(_canonical(prompt) for prompt in prompts)
        n = len(prompts)
        if n < 2:
            continue
        controls.append(
            ControlScore(
                control="captions shuffled",
                task=task,
                split=split,
                correct=_correct(chosen, [following[each.prompt.text] for each in chosen]),
                perfect=sum(count * (count - 1) for count in contents.values()) / (n * (n - 1)),
            )
        )
    return controls


def swapped_attributes(images: Sequence[ScoredImage]) -> list[ControlScore]:
    """Score images for their own prompt with its parts exchanged: colours swapped, relation turned, number changed.

    A model that binds words to objects scores near 0, and one that only collects words scores as on the task.
    """
    controls = []
    for (task, split), chosen in group_by_task(images).items():
        wrong = {each.prompt.text: swapped(each.prompt) for each in chosen}
        pairs = [(each, prompt) for each in chosen if (prompt := wrong[each.prompt.text])]
        if pairs:
            scored, others = zip(*pairs, strict=True)
            correct = _correct(scored, others)
            controls.append(
                ControlScore(control="attributes swapped", task=task, split=split, correct=correct, perfect=0.0)
            )
    return controls


def benchmark_report(content: dict[str, Any]) -> Report:
    """Lay out a :class:`Benchmark` from JSON: scores, controls, the model's encoders, and the sanity checks."""
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in content["settings"].items()
    )
    return Report(
        title=f"Scores of {content['model']}",
        description=f"World {content['world']}, {content['images']:,} images: {settings}.",
        tables=[
            _score_table(content),
            _control_table(content),
            *retrieval_tables(content["retrieval"]),
            *caption_sensitivity_tables(content["caption_sensitivity"]),
            gate_table(content["sanity_checks"]),
        ],
    )


def _score_table(content: dict[str, Any]) -> ReportTable:
    """Lay out the tasks' scores, each split's followed by their mean."""
    rows: list[tuple[str, ...]] = []
    bold: set[int] = set()
    means = {mean["split"]: mean for mean in content["means"]}
    for split in dict.fromkeys(row["split"] for row in content["scores"]):
        name = SPLIT_TITLES[split]
        for row in content["scores"]:
            if row["split"] == split:
                shares = [share_cell(row[key]) for key in ("correct", "colour", "shape", "exact")]
                rows.append((_task_title(row["task"]), name, *shares, f"{row['correct']['n']:,}"))
        if mean := means.get(split):
            bold.add(len(rows))
            correct, exact = share_cell(mean["correct"]), share_cell(mean["exact"])
            rows.append((f"mean of {mean['tasks']} tasks", name, correct, "", "", exact, f"{mean['correct']['n']:,}"))
    worst = "; ".join(
        f"{SPLIT_TITLES[split]}, {_task_title(mean['worst'])} {share_cell(mean['worst_correct'])}"
        for split, mean in means.items()
    )
    return ReportTable(
        title="Faithfulness to the prompt",
        columns=("task", "list", "correct", "colour right", "shape right", "exact scene", "images"),
        rows=rows,
        bold=frozenset(bold),
        note=" ".join([*([f"Worst task: {worst}."] if worst else []), _READING, _COMPARABLE]),
    )


def _control_table(content: dict[str, Any]) -> ReportTable:
    """Lay out the control scores."""
    rows = [
        (
            row["control"],
            _task_title(row["task"]),
            SPLIT_TITLES[row["split"]],
            share_cell(row["correct"]),
            f"{row['perfect']:.3f}",
        )
        for row in content["controls"]
    ]
    return ReportTable(
        title="Controls",
        columns=("the same images scored with", "task", "list", "correct", "a perfect model"),
        rows=rows,
        note=(
            "Captions shuffled: for another prompt of the task, which is chance. Attributes swapped: for the prompt "
            "with its colours exchanged, its relation turned round or its number changed; a model that draws words "
            "and not sentences scores here as it scores above."
        ),
    )


def _correct(images: Sequence[ScoredImage], others: Sequence[Prompt]) -> Share:
    """Compute the share of images that are right for other prompts than their own."""
    outcomes = [score(other, each.detections).correct for each, other in zip(images, others, strict=True)]
    return Share.of(outcomes, [each.prompt.text for each in images])


def _canonical(prompt: Prompt) -> Prompt:
    """Bring prompts that ask for the same in different words to one form, without text."""
    if prompt.relation is None:
        prompt = replace(prompt, objects=tuple(sorted(prompt.objects, key=str)))
    elif (turned := INVERSE[prompt.relation]) < prompt.relation:
        prompt = replace(prompt, objects=prompt.objects[::-1], relation=turned)
    return replace(prompt, text="")


def _task_title(task: str) -> str:
    """Write a task's name as words."""
    return task.replace("_", " ")
