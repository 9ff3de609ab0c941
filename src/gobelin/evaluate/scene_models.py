"""Models of the scenes: open a model together with the world that it is measured on."""

from pathlib import Path

from gobelin.data import find_world
from gobelin.engine_names import EngineName
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline
from gobelin.scenes import WORLDS, World


def open_scene_model(
    folder: Path | None,
    world: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    engine: EngineName = "eager",
) -> tuple[Pipeline, World]:
    """Open a model folder, None for the shipped one, and find its world: by name, or as the folder says.

    Raises :class:`UsageError` where there is no such world, or where the model's images have another size.
    """
    chosen = None if world is None else find_world(world)
    pipeline = Pipeline.from_pretrained(folder, device, dtype, engine)
    found = chosen or find_model_world(pipeline)
    size = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    if size != found.size:
        raise UsageError(
            f"the model generates images of {size} pixels and the world {found.name} has {found.size}: not comparable"
        )
    return pipeline, found


def find_model_world(pipeline: Pipeline) -> World:
    """Find the world of scenes that a model was trained on; raises :class:`UsageError` where its folder names none."""
    if pipeline.model.world is None:
        raise UsageError(
            f"the model {pipeline.name} does not name the world of scenes that it was trained on: say --world NAME, "
            f"one of {', '.join(WORLDS)}"
        )
    return find_world(pipeline.model.world)
