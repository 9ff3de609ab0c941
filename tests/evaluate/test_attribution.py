"""Attribution against maps that are known to be right, wrong or everywhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import AttentionSite
from gobelin.evaluate import attribution
from gobelin.evaluate.attribution import (
    AttributionCase,
    argmax_intersection,
    causality,
    ceiling,
    daam,
    found_masks,
    intersections,
    overlap,
    own_samples,
    renders,
    sharpened,
    whole_image,
    word_kind,
    word_truths,
)
from gobelin.images import tensor_to_images
from gobelin.look.heatmaps import HeatMaps
from gobelin.pipeline import Pipeline
from gobelin.scenes import CORE, Sample, grade, sample
from gobelin.tokenizer import Tokenizer

SEEING = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=2)
BLIND = AttentionSite(name="down.attn2", kind="cross", downscale=2, heads=2)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sample(0, index, CORE).caption for index in range(300)], vocab_size=768, max_length=32)


def heatmaps_of(each: Sample, tokenizer: Tokenizer) -> HeatMaps:
    """Maps that are right in head 1 of one site, and even everywhere else, for DAAM to average."""
    words = tokenizer.words(each.caption)
    shares = torch.full((2, 16 * 16, 32), 1 / 32)
    shares[1] = 1e-3
    for span, (_, things) in zip(words.spans, each.words, strict=True):
        if things:
            mask = torch.from_numpy(each.masks[list(things)].any(axis=0)).float()[None, None]
            small = F.interpolate(mask, size=(16, 16), mode="area").flatten()
            shares[1, :, list(span.tokens)] = (0.3 * small / len(span.tokens))[:, None] + 1e-3
    shares[1, :, 0] += 1 - shares[1].sum(dim=-1)
    maps = {BLIND: torch.full((1, 2, 64, 32), 1 / 32), SEEING: shares[None]}
    picture = tensor_to_images(torch.from_numpy(each.image).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    return HeatMaps(words=words, maps=maps, latent_size=(16, 16), image=picture)


@pytest.fixture(scope="module")
def cases(tokenizer: Tokenizer) -> list[AttributionCase]:
    found = []
    for index in range(24):
        each = sample(5, index, CORE)
        heatmaps = heatmaps_of(each, tokenizer)
        right = replace(heatmaps, maps={SEEING: heatmaps.maps[SEEING][:, 1:]})
        found.append(
            AttributionCase(
                heatmaps=heatmaps,
                sharp=right,
                looked=right,
                truths=word_truths(each, heatmaps, torch.from_numpy(each.masks)),
            )
        )
    return found


def test_maps_that_are_right_reach_the_ceiling_and_no_more(cases: list[AttributionCase]) -> None:
    right = intersections(cases, sharpened)
    perfect = ceiling(cases, SEEING)
    assert right["noun", 0.4].value == pytest.approx(perfect.value, abs=0.01)
    assert right["noun", 0.4].n == perfect.n == sum(t.kind == "noun" for case in cases for t in case.truths)
    assert 0.75 < perfect.value < 0.95
    assert ceiling(cases, BLIND).value < perfect.value - 0.05
    assert {kind for kind, _ in right} == {"noun", "colour", "relation", "place", "number"}
    assert argmax_intersection(cases, sharpened).value > 0.7


def test_maps_that_are_even_or_wrong_do_not(cases: list[AttributionCase]) -> None:
    even = [replace(case, sharp=case.heatmaps.select(sites=[BLIND])) for case in cases]
    assert intersections(even, sharpened)["noun", 0.4].value == 0
    everywhere = whole_image(cases)
    assert 0.02 < everywhere.value < 0.15
    exchanged = [
        replace(other, truths=case.truths)
        for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)
        if len(other.heatmaps.words) > max((t.number for t in case.truths), default=0)
    ]
    assert intersections(exchanged, sharpened)["noun", 0.4].value < 0.15


def test_daam_is_drawn_by_every_head(cases: list[AttributionCase]) -> None:
    assert intersections(cases, daam)["noun", 0.4].value > 0.5  # even maps have no range, and do not harm it


def test_the_graders_masks_are_the_scenes_own() -> None:
    told = 0
    for index in range(30):
        each = sample(6, index, CORE)
        masks = found_masks(each.phrasing, grade(each.image, CORE))
        if masks is not None:  # None for "a circle and a red shape" where the circle is red too
            told += 1
            for mention in each.phrasing.mentions:
                things = list(mention.things)
                assert overlap(masks[things].any(dim=0), torch.from_numpy(each.masks[things].any(axis=0))) > 0.85
    assert told >= 25


def test_pictures_that_are_not_right_have_no_masks() -> None:
    samples = [sample(6, index, CORE) for index in range(40)]
    for each, other in zip(samples, [*samples[1:], samples[0]], strict=True):
        if each.phrasing.wanted != other.phrasing.wanted and len(each.masks) != len(other.masks):
            assert found_masks(each.phrasing, grade(other.image, CORE)) is None
    assert found_masks(samples[0].phrasing, []) is None


@pytest.mark.parametrize(
    ("word", "things", "kind"),
    [
        ("circle", 1, "noun"),
        ("boxes", 3, "noun"),
        ("red", 1, "colour"),
        ("three", 3, "number"),
        ("4", 4, "number"),
        ("above", 2, "relation"),
        ("left", 2, "relation"),
        ("left", 1, "place"),
    ],
)
def test_words_are_of_kinds(word: str, things: int, kind: str) -> None:
    assert word_kind(word, things) == kind


@pytest.fixture(scope="module")
def pipe(trained: Path) -> Pipeline:
    return Pipeline.from_pretrained(trained)


def test_a_model_is_looked_into_by_true_renders_and_by_its_own_pictures(pipe: Pipeline, monkeypatch) -> None:
    cases = list(renders(pipe, CORE, 3))
    assert [len(case.heatmaps.maps) for case in cases] == [len(pipe.unet.attention_sites) // 2] * 3
    assert all(probs.shape[:2] == (1, 2) for probs in cases[0].heatmaps.maps.values())
    assert {site.kind for case in cases for site in case.sharp.maps} == {"self", "cross"}
    assert all(case.sharp.sharp and not case.heatmaps.sharp for case in cases)
    assert intersections(cases, daam) != intersections(cases, sharpened)

    def seen(image, world) -> list:  # an untrained model paints nothing that the grader would find
        return grade(sample(attribution.ATTRIBUTION_SEED, seen.index, CORE, "test").image, CORE)

    seen.index = 0
    monkeypatch.setattr(attribution, "grade", seen)
    own = list(own_samples(pipe, CORE, 1))
    assert len(own) == 1
    for correlations in causality(pipe, own).values():
        assert correlations.keys() == {truth.kind for truth in own[0].truths}
        assert all(-1 <= mean.value <= 1 for mean in correlations.values())


def test_overlap_is_intersection_over_union() -> None:
    def mask(*on: int) -> Tensor:
        return torch.tensor([place in on for place in range(4)])

    assert overlap(mask(0, 1), mask(1, 2)) == pytest.approx(1 / 3)
    assert overlap(mask(), mask()) == 1
    assert overlap(mask(), mask(3)) == 0
