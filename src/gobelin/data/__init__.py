"""Image-text datasets: a folder of captioned images, or procedural scenes."""

from gobelin.data.cached_dataset import CachedDataset
from gobelin.data.dataset import CaptionedImage, Dataset
from gobelin.data.image_folder import ImageFolderDataset
from gobelin.data.scene_dataset import SceneDataset, find_world

__all__ = [
    "CachedDataset",
    "CaptionedImage",
    "Dataset",
    "ImageFolderDataset",
    "SceneDataset",
    "find_world",
]
