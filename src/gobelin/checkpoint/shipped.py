"""Shipped models: the models that come with Gobelin, which open by their names as others do by their paths."""

import warnings
from importlib.resources import files
from pathlib import Path

from gobelin.checkpoint.diffusers_folder import MODEL_INDEX
from gobelin.formats.files import is_there

SHIPPED_MODELS = ("tiny", "emoji")
SHIPPED = SHIPPED_MODELS[0]
"""The model that opens where none is named."""


def shipped_model(name: str = SHIPPED) -> Path:
    """Return the folder of a model that comes with Gobelin."""
    return Path(str(files("gobelin") / "models" / name))


def find_model(given: str | Path | None) -> Path:
    """Find a model by what people write: its path, the name of one that comes with Gobelin, or nothing for the first.

    A model in a file or folder of that name comes before the one that ships. Warns where there is a folder of that name
    that holds none.
    """
    if given is None:
        return shipped_model()
    path = Path(given)
    if str(given) not in SHIPPED_MODELS or path.is_file() or is_there(path / MODEL_INDEX):
        return path
    if path.exists():
        say = f"{given} is the model that comes with Gobelin: the folder of that name here holds no model"
        warnings.warn(say, stacklevel=2)
    return shipped_model(str(given))
