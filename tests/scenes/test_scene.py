import json

import pytest

from gobelin.errors import DataError
from gobelin.scenes import Scene, World, sample


def test_json_round_trip(world: World):
    for index in range(50):
        scene = sample(5, index, world).scene
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_scenes_written_before_there_were_textures_are_read():
    data = json.loads(json.dumps(sample(5, 0).scene.to_json()))
    del data["gradient"]
    for thing in data["objects"]:
        del thing["texture"], thing["size"]
    assert Scene.from_json(data) == sample(5, 0).scene


@pytest.mark.parametrize(
    "change", [{"objects": [{"shape": "circle"}]}, {"objects": None}, {"weather": "rain"}, {"gradient": [1]}]
)
def test_what_is_not_a_scene_is_refused(world: World, change):
    with pytest.raises(DataError, match="Expected a scene"):
        Scene.from_json(sample(5, 0, world).scene.to_json() | change)
    with pytest.raises(DataError, match="Expected a scene"):
        Scene.from_json({})
