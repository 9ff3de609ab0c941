"""Procedural scenes: captioned images whose contents are known, a grader that reads them, and lists of prompts."""

from gobelin.scenes.calibration import Calibration, calibrate
from gobelin.scenes.grader import Detection, grade
from gobelin.scenes.negatives import hard_negatives
from gobelin.scenes.prompt_lists import EXTRA_TASKS, PROMPT_SPLITS, TASKS, Prompt, prompts, tasks
from gobelin.scenes.render import render
from gobelin.scenes.sampling import Sample, sample
from gobelin.scenes.scene import Scene, SceneObject
from gobelin.scenes.scoring import Score, score, swapped
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
    "Detection",
    "Prompt",
    "Sample",
    "Scene",
    "SceneObject",
    "Score",
    "World",
    "calibrate",
    "grade",
    "hard_negatives",
    "prompts",
    "render",
    "sample",
    "score",
    "swapped",
    "tasks",
]
