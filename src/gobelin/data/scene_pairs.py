"""Pairs from the procedural scenes."""

from dataclasses import dataclass

from gobelin import scenes
from gobelin.data.pairs import Pair
from gobelin.errors import UsageError
from gobelin.scenes.world import SPLITS


@dataclass(frozen=True, kw_only=True)
class ScenePairs:
    """The first ``count`` scenes of a world's split; held-out combinations are in the "heldout" split alone."""

    world: scenes.World
    count: int
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"{self.count} scenes asked for: give 1 or more")
        if self.seed < 0:
            raise UsageError(f"the seed is {self.seed}: give 0 or more")
        if self.split not in SPLITS:
            raise UsageError(f"unknown split {self.split!r}: the choices are {', '.join(SPLITS)}")

    @property
    def description(self) -> str:
        return f"{self.count:,} scenes of the world {self.world.name!r} ({self.split})"

    @property
    def size(self) -> int:
        return self.world.size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        sample = self.sample(index)
        negatives = scenes.hard_negatives(sample, index)
        return Pair(image=sample.image, caption=sample.caption, negatives=tuple(negatives))

    def sample(self, index: int) -> scenes.Sample:
        """The scene behind a pair, with its masks and words."""
        return scenes.sample(self.seed, index, self.world, self.split)


def find_world(name: str) -> scenes.World:
    """The world of that name; raises :class:`UsageError` with the choices."""
    if name not in scenes.WORLDS:
        raise UsageError(f"unknown world {name!r}: the choices are {', '.join(scenes.WORLDS)}")
    return scenes.WORLDS[name]
