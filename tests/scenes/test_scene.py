import json

import pytest

from gobelin.errors import DataError
from gobelin.scenes import Scene, World, sample


def test_json_round_trip(world: World):
    for index in range(50):
        scene = sample(5, index, world).scene
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@pytest.mark.parametrize("change", [{"objects": [{"shape": "circle"}]}, {"objects": None}, {"weather": "rain"}])
def test_what_is_not_a_scene_is_refused(world: World, change):
    with pytest.raises(DataError, match="Expected a scene"):
        Scene.from_json(sample(5, 0, world).scene.to_json() | change)
    with pytest.raises(DataError, match="Expected a scene"):
        Scene.from_json({})
