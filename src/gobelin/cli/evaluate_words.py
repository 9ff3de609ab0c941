"""The work of the measurements of words, features and heads of attention, on scenes whose truth is known."""

from collections.abc import Callable
from typing import Any

from gobelin.checkpoint.diffusers_folder import HEAD_WEIGHTS
from gobelin.checkpoint.shipped import find_model
from gobelin.cli.evaluate_options import (
    EvaluateAttribution,
    EvaluateCorrespondence,
    EvaluateEditing,
    EvaluateErasure,
    EvaluateHeads,
    EvaluatePatching,
    EvaluatePresence,
    MeasuredModel,
)
from gobelin.cli.report_files import ReportFiles, progress_bar, publish
from gobelin.errors import UsageError
from gobelin.evaluate.attribution import attribution_report, measure_attribution
from gobelin.evaluate.correspondence import correspondence_report, measure_correspondence
from gobelin.evaluate.editing import editing_report, measure_editing
from gobelin.evaluate.erasure import erasure_report, measure_erasure
from gobelin.evaluate.fit_heads import fit_heads, heads_report, measure_heads
from gobelin.evaluate.image_list import MAX_PROMPTS
from gobelin.evaluate.measurement_report import Report
from gobelin.evaluate.patching import measure_patching, patching_report
from gobelin.evaluate.presence import measure_presence, presence_report
from gobelin.evaluate.scene_models import open_scene_model
from gobelin.formats.files import write_json
from gobelin.pipeline import Pipeline
from gobelin.scenes import World


def evaluate_attribution(options: EvaluateAttribution) -> None:
    """Measure the attribution of words to pixels."""
    pipeline, world = _open(options, options.limit)
    with progress_bar("tracing") as advance:
        found = measure_attribution(pipeline, world, options.limit, lambda: advance(1))
    _publish(options, found, attribution_report)


def evaluate_editing(options: EvaluateEditing) -> None:
    """Measure edits."""
    pipeline, world = _open(options, options.limit)
    with progress_bar("editing") as advance:
        found = measure_editing(pipeline, world, options.limit, options.kinds, lambda: advance(1))
    _publish(options, found, editing_report)


def evaluate_patching(options: EvaluatePatching) -> None:
    """Measure patches of attention."""
    pipeline, world = _open(options, options.limit)
    with progress_bar("patching") as advance:
        found = measure_patching(pipeline, world, options.limit, options.kinds, lambda: advance(1))
    _publish(options, found, patching_report)


def evaluate_erasure(options: EvaluateErasure) -> None:
    """Measure an erasure."""
    pipeline, world = _open(options, options.limit)
    with progress_bar("painting") as advance:
        found = measure_erasure(pipeline, world, options.word, options.instead, options.limit, options.ridge, advance)
    _publish(options, found, erasure_report)


def evaluate_correspondence(options: EvaluateCorrespondence) -> None:
    """Measure correspondence by features."""
    pipeline, world = _open(options, options.limit)
    given = {"layers": options.layers or None, "timestep": options.timestep}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with progress_bar("comparing") as advance:
        found = measure_correspondence(pipeline, world, options.limit, lambda: advance(1), options.split, **chosen)
    _publish(options, found, correspondence_report)


def evaluate_presence(options: EvaluatePresence) -> None:
    """Measure scores of presence."""
    pipeline, world = _open(options, options.limit)
    with progress_bar("asking") as advance:
        found = measure_presence(pipeline, world, options.limit, lambda: advance(1), options.split)
    _publish(options, found, presence_report)


def evaluate_heads(options: EvaluateHeads) -> None:
    """Fit head weights, measure what they bring, and keep them where that is asked for."""
    if not 2 <= options.scenes <= MAX_PROMPTS:
        raise UsageError(f"scenes is {options.scenes}: give a number from 2 to {MAX_PROMPTS}")
    folder = find_model(options.model)
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


def _open(options: MeasuredModel, limit: int) -> tuple[Pipeline, World]:
    """Check the number of scenes, as an interval needs two, and open a model of scenes with its world."""
    if not 2 <= limit <= MAX_PROMPTS:
        raise UsageError(f"limit is {limit}: give a number from 2 to {MAX_PROMPTS}")
    return open_scene_model(options.model, options.world, options.device, options.dtype, options.engine)


def _publish(options: ReportFiles, found: Any, report: Callable[[dict[str, Any]], Report]) -> None:
    """Print what was found as its report, and write it where the options ask for that."""
    content = found.to_json()
    publish(options, content, report(content))
