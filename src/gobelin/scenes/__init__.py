"""A world whose truth is known: procedural captioned images, a grader to read them, and prompts to score."""

from gobelin.scenes.calibration import Calibration, calibrate
from gobelin.scenes.grader import Seen, grade
from gobelin.scenes.negatives import hard_negatives
from gobelin.scenes.prompt_lists import EXTRA_TASKS, PROMPT_SPLITS, TASKS, Prompt, prompts, tasks
from gobelin.scenes.render import render
from gobelin.scenes.sampling import Sample, sample
from gobelin.scenes.scene import Scene, SceneObject
from gobelin.scenes.scoring import Verdict, judge, swapped
from gobelin.scenes.world import CORE, NANO, RICH, WORLDS, World

__all__ = [
    "CORE",
    "EXTRA_TASKS",
    "NANO",
    "PROMPT_SPLITS",
    "RICH",
    "TASKS",
    "WORLDS",
    "Calibration",
    "Prompt",
    "Sample",
    "Scene",
    "SceneObject",
    "Seen",
    "Verdict",
    "World",
    "calibrate",
    "grade",
    "hard_negatives",
    "judge",
    "prompts",
    "render",
    "sample",
    "swapped",
    "tasks",
]
