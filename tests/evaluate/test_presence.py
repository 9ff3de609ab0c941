"""Presence: scores that know the truth, and captions that are false in one noun."""

from pathlib import Path

import pytest

from gobelin.evaluate.presence import AMONG, DENOISING, IN_CAPTION, false_captions, measure_presence, presence_report
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE, NANO, sample
from gobelin.scenes.relations import found_in


def test_false_captions_are_false_in_one_noun() -> None:
    made = 0
    for index in range(40):
        each = sample(3, index, CORE, "dev")
        there = {thing.shape for thing in each.scene.objects}
        for phrasing, number in false_captions(each, index):
            made += 1
            assert phrasing.mentions[number].shape not in there
            others = [mention for place, mention in enumerate(phrasing.mentions) if place != number]
            assert others == [mention for place, mention in enumerate(each.phrasing.mentions) if place != number]
            assert not found_in(phrasing.wanted, phrasing.relation, each.scene.objects, count=phrasing.count)
    assert made > 40


def test_a_score_that_knows_is_right_and_attention_is_asked_of_every_noun(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipeline.from_pretrained(trained)
    scenes = iter([sample(81, index, NANO, "dev").scene for index in range(6)])

    def knowing(images, texts) -> list[dict[str, float]]:
        shapes = [{thing.shape for thing in next(scenes).objects} for _ in images]
        return [{text: float(text.split()[-1] in there) for text in texts} for there in shapes]

    monkeypatch.setattr(pipe, "presence", knowing)
    found = measure_presence(pipe, NANO, 6, split="dev")
    assert found.told[DENOISING].value == found.told[AMONG].value == 1
    assert found.told[DENOISING].n == 6 * len(NANO.shapes)
    assert found.medians[DENOISING] == {"there": 1, "not there": 0}
    assert 0 < found.told[IN_CAPTION].value < 1
    report = presence_report(found.to_json()).markdown()
    assert "| denoising | 1.000 [1.000, 1.000] | 1.000 | 0.000 |" in report
