"""Families of models, as the metadata of files of weights names them."""

from collections.abc import Mapping

# Beginnings of what kohya's sd-scripts (``library/train_util.py``) and ModelSpec (``sai_model_spec.py``) write.
_VERSIONS = {
    "sdxl": "Stable Diffusion XL",
    "stable-diffusion-xl": "Stable Diffusion XL",
    "sd_v2": "Stable Diffusion 2.x",
    "stable-diffusion-v2": "Stable Diffusion 2.x",
    "sd3": "Stable Diffusion 3",
    "stable-diffusion-3": "Stable Diffusion 3",
    "flux": "Flux",
}
_KEYS = ("ss_base_model_version", "modelspec.architecture")


def named_family(metadata: Mapping[str, str]) -> str | None:
    """Return the family other than Stable Diffusion 1.x that a file's metadata names; None where it names none."""
    said = [metadata.get(key, "").lower() for key in _KEYS]
    return next((family for start, family in _VERSIONS.items() if any(one.startswith(start) for one in said)), None)
