"""How faithfully a model paints what it is told: scene prompts, painted, graded, counted.

The tasks are in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513), on a world whose truth is known; the
numbers are not comparable with GenEval's own.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from gobelin.evaluate.intervals import Share
from gobelin.evaluate.picture_list import Asked, batches
from gobelin.pipeline import Pipeline
from gobelin.scenes import TASKS, Prompt, Seen, Verdict, World, grade, judge, swapped
from gobelin.scenes.relations import INVERSE

CPU_BATCH = 32  # more are no faster on a CPU, and take more memory
GPU_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Painting:
    """How to paint; None is what the model recommends. ``seed`` is added to every picture's own."""

    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Painted:
    """A picture painted for a prompt, what the grader saw in it, and the verdict."""

    asked: Asked
    image: Image.Image
    seen: list[Seen]
    verdict: Verdict

    @property
    def prompt(self) -> Prompt:
        """What the picture was painted for."""
        return self.asked.prompt


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What was right in a task's pictures; see :class:`gobelin.scenes.Verdict` for what each word means."""

    task: str
    split: str
    correct: Share
    colour: Share
    shape: Share
    exact: Share


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """The mean over the tasks of a split, GenEval's overall score, and the task that was worst."""

    split: str
    tasks: int
    correct: Share
    exact: Share
    worst: str
    worst_correct: Share


@dataclass(frozen=True, kw_only=True)
class Control:
    """The same pictures judged by prompts that they were not painted for.

    ``perfect`` is what a painter that is always right would score so.
    """

    control: str
    task: str
    split: str
    correct: Share
    perfect: float


def paint(
    pipeline: Pipeline,
    asked: Sequence[Asked],
    painting: Painting | None = None,
    advance: Callable[[int], None] = lambda painted: None,
) -> Iterator[Image.Image]:
    """The pictures that are asked for, in their order; a picture is the same whatever the batches.

    ``advance`` hears after every batch how many pictures it had, for a progress bar.
    """
    painting = painting or Painting()
    most = CPU_BATCH if pipeline.unet.device.type == "cpu" else GPU_BATCH
    for batch in batches(asked, most):
        with torch.inference_mode():
            result = pipeline(
                [each.prompt.text for each in batch],
                seed=painting.seed + batch[0].seed,
                sampler=painting.sampler,
                steps=painting.steps,
                guidance=painting.guidance,
            )
        yield from result.images
        advance(len(batch))


def judged(asked: Iterable[Asked], images: Iterable[Image.Image], world: World) -> list[Painted]:
    """Grade each picture without a look at its prompt, then judge what was seen by the prompt."""
    pictures = []
    for each, image in zip(asked, images, strict=True):
        seen = grade(image, world)
        pictures.append(Painted(asked=each, image=image, seen=seen, verdict=judge(each.prompt, seen)))
    return pictures


def task_scores(pictures: Sequence[Painted]) -> list[TaskScore]:
    """What was right, by split and task; the intervals know which pictures share a prompt."""
    return [
        TaskScore(
            task=task,
            split=split,
            **{
                name: Share.of(
                    [getattr(picture.verdict, name) for picture in chosen],
                    [picture.prompt.text for picture in chosen],
                )
                for name in ("correct", "colour", "shape", "exact")
            },
        )
        for (task, split), chosen in by_task(pictures).items()
    ]


def mean_scores(scores: Sequence[TaskScore]) -> list[MeanScore]:
    """The means over GenEval's tasks, split by split; what stands beside the six does not count."""
    means = []
    for split in dict.fromkeys(score.split for score in scores):
        chosen = [score for score in scores if score.split == split and score.task in TASKS]
        if not chosen:
            continue
        worst = min(chosen, key=lambda score: score.correct.value)
        means.append(
            MeanScore(
                split=split,
                tasks=len(chosen),
                correct=Share.mean([score.correct for score in chosen]),
                exact=Share.mean([score.exact for score in chosen]),
                worst=worst.task,
                worst_correct=worst.correct,
            )
        )
    return means


def shuffled_captions(pictures: Sequence[Painted]) -> list[Control]:
    """Pictures judged by other prompts of their task and split: what this painter scores by chance.

    Prompts stand in a ring in random order, and each one's pictures are judged by the next prompt. The perfect
    painter's chance is how often two prompts of the list ask for the same.
    """
    controls = []
    for (task, split), chosen in by_task(pictures).items():
        prompts = list({picture.prompt.text: picture.prompt for picture in chosen}.values())
        ring = random.Random(0).sample(prompts, len(prompts))
        following = {prompt.text: ring[at - 1] for at, prompt in enumerate(ring)}
        wishes = Counter(_wish(prompt) for prompt in prompts)
        n = len(prompts)
        if n < 2:
            continue
        controls.append(
            Control(
                control="captions shuffled",
                task=task,
                split=split,
                correct=_correct(chosen, [following[picture.prompt.text] for picture in chosen]),
                perfect=sum(count * (count - 1) for count in wishes.values()) / (n * (n - 1)),
            )
        )
    return controls


def swapped_attributes(pictures: Sequence[Painted]) -> list[Control]:
    """Pictures judged by their own prompt with its parts exchanged: colours swapped, relation turned, number changed.

    A painter that keeps words apart scores near 0, and one that only collects them scores as it does on the task.
    """
    controls = []
    for (task, split), chosen in by_task(pictures).items():
        wrong = {picture.prompt.text: swapped(picture.prompt) for picture in chosen}
        asked = [(picture, prompt) for picture in chosen if (prompt := wrong[picture.prompt.text])]
        if asked:
            painted, others = zip(*asked, strict=True)
            correct = _correct(list(painted), list(others))
            controls.append(Control(control="attributes swapped", task=task, split=split, correct=correct, perfect=0.0))
    return controls


def by_task(pictures: Sequence[Painted]) -> dict[tuple[str, str], list[Painted]]:
    """The pictures of each (task, split), in their order."""
    groups: dict[tuple[str, str], list[Painted]] = {}
    for picture in pictures:
        groups.setdefault((picture.prompt.task, picture.asked.split), []).append(picture)
    return groups


def _correct(pictures: Sequence[Painted], others: Sequence[Prompt]) -> Share:
    """How many pictures are right for other prompts than their own."""
    outcomes = [judge(other, picture.seen).correct for picture, other in zip(pictures, others, strict=True)]
    return Share.of(outcomes, [picture.prompt.text for picture in pictures])


def _wish(prompt: Prompt) -> Prompt:
    """What a prompt asks for, the same for all wordings of it."""
    if prompt.relation is None:
        prompt = replace(prompt, objects=tuple(sorted(prompt.objects, key=str)))
    elif (turned := INVERSE[prompt.relation]) < prompt.relation:
        prompt = replace(prompt, objects=prompt.objects[::-1], relation=turned)
    return replace(prompt, text="")
