"""Captioned images in: from a folder of anyone's pairs, or from the procedural scenes."""

from gobelin.data.folder import FolderPairs
from gobelin.data.pairs import Pair, Pairs
from gobelin.data.scenes import ScenePairs, find_world

__all__ = ["FolderPairs", "Pair", "Pairs", "ScenePairs", "find_world"]
