"""Captioned images in: from a folder of anyone's pairs, or from the procedural scenes."""

from gobelin.data.corpus import Corpus
from gobelin.data.image_folder import FolderPairs
from gobelin.data.pairs import Pair, Pairs
from gobelin.data.scene_pairs import ScenePairs, find_world

__all__ = ["Corpus", "FolderPairs", "Pair", "Pairs", "ScenePairs", "find_world"]
