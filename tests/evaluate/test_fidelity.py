"""FID, KID and CLIP scores beside their definitions, computed anew in NumPy on features of a small network."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from tests.conftest import fill_

from gobelin.evaluate.fidelity import (
    Fidelity,
    clip_scores,
    fidelity_report,
    frechet_distance,
    image_distance,
    kernel_distance,
)
from gobelin.evaluate.image_features import ImageFeatures, encode_in_batches


class SmallNetwork(ImageFeatures):
    """A random network of 12 features."""

    description = "a small network"

    def __init__(self):
        self.layers = fill_(
            torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(392, 12)
            )
        )

    @torch.no_grad()
    def encode_images(self, images):
        return self.layers(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 64)


def pictures(count, seed, noise=0.0):
    """Blurred random images, 16×16, with noise of another kind upon them."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (count, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (coarse + noise * random.normal(0, 255, coarse.shape)).clip(0, 255).astype(np.uint8)


def encoded(*images):
    return encode_in_batches(images, [SmallNetwork()])[0]


@pytest.fixture(scope="module")
def features():
    """Features of 300 images, of 200 others, and of 200 with noise."""
    return tuple(encoded(*pictures(*each)) for each in ((300, 0), (200, 1), (200, 2, 0.2)))


def defined_fid(one, other):
    """Heusel et al., equation 6."""
    one, other = one.numpy(), other.numpy()
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1])
    apart = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    return apart + np.trace(covariances[0] + covariances[1] - 2 * np.real(root))


def defined_kid(one, other):
    """Bińkowski et al., equation 4, over all images."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x):
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    one, other = one.numpy(), other.numpy()
    return mean_of_pairs(one) + mean_of_pairs(other) - 2 * kernel(one, other).mean()


def test_images_are_encoded_in_batches_in_float64(features):
    network, images = SmallNetwork(), pictures(70, 3)
    counts = []
    (found,) = encode_in_batches(iter(images), [network], counts.append)
    assert found.dtype == torch.float64
    assert counts == [32, 32, 6]
    torch.testing.assert_close(found, network.encode_images(images).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [1, 2])
def test_fid_is_as_defined(features, other):
    expected = defined_fid(features[0], features[other])
    assert frechet_distance(features[0], features[other]) == pytest.approx(expected, rel=1e-6)


def test_fid_is_exact_for_features_far_from_zero(features):
    """Sums of squares lose in float32 what FID is made of."""
    expected = defined_fid(features[0], features[2])
    far = (features[0].float() + 1000, features[2].float() + 1000)
    assert frechet_distance(*far) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("other", [1, 2])
def test_kid_is_as_defined(features, other):
    """Its mean over subsets differs from the estimate over all images by the chance of 100 subsets."""
    found = kernel_distance(features[0], features[other])
    assert found.subset_size == 100
    assert found.std > 0
    assert abs(found.mean - defined_kid(features[0], features[other])) < 4 * found.std / 100**0.5


def test_kid_is_exact_where_a_subset_has_no_choice():
    """Of constant features every subset is the same."""
    one, other = torch.full((8, 4), 2.0), torch.full((8, 4), 3.0)
    found = kernel_distance(one, other)
    assert found.mean == pytest.approx(defined_kid(one, other))
    assert (found.std, found.subset_size) == (pytest.approx(0), 4)


def test_equal_images_are_at_no_distance(features):
    found = image_distance("the same", features[0], features[0])
    assert found.fid == pytest.approx(0, abs=1e-6)
    assert found.count == 300
    # the estimate knows nothing of pairs: each image beside itself takes it below zero, by little
    assert -0.2 * kernel_distance(features[0], encoded(*pictures(200, 2, 1.2))).mean < found.kid.mean < 0


def test_distances_grow_with_noise():
    true = encoded(*pictures(200, 0))
    found = [image_distance("noisy", true, encoded(*pictures(200, 1, noise))) for noise in (0, 0.3, 0.6, 1.2)]
    for values in ([one.fid for one in found], [one.kid.mean for one in found]):
        assert values == sorted(values)
        assert values[-1] > 10 * abs(values[0])


def test_few_images_raise_fid_and_not_kid():
    """Of images of one kind, FID falls with their number, and KID is about zero whatever it is."""
    fids, kids = {}, {}
    for count in (20, 80):
        pairs = [(encoded(*pictures(count, seed)), encoded(*pictures(count, 100 + seed))) for seed in range(20)]
        fids[count] = np.mean([frechet_distance(*pair) for pair in pairs])
        values = [kernel_distance(*pair).mean for pair in pairs]
        kids[count] = np.mean(values) / (np.std(values) / 20**0.5)
    assert fids[20] > 3 * fids[80]
    assert all(abs(value) < 3 for value in kids.values())


def test_kid_draws_from_its_seed_alone(features):
    before = torch.get_rng_state()
    found = [kernel_distance(*features[:2], seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] != found[2]


def test_clip_score_is_a_hundred_cosines():
    images, texts, true = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    captions = ["a", "b", "a", "c", "b", "a"]

    def cosine(x, y):
        return float(x @ y / x.norm() / y.norm())

    texts[2] = texts[5] = texts[0]  # equal captions have equal features
    texts[4] = texts[1]
    found = clip_scores("small", (images, texts), captions, (true, texts))
    own = [100 * cosine(image, text) for image, text in zip(images, texts, strict=True)]
    others = [
        np.mean([100 * cosine(images[i], texts[j]) for j in range(6) if captions[j] != captions[i]]) for i in range(6)
    ]
    assert found.painted.value == pytest.approx(np.mean(own))
    assert found.painted.margin == pytest.approx(1.959964 * np.std(own, ddof=1) / 6**0.5)
    assert found.shuffled.value == pytest.approx(np.mean(others))
    assert found.true.value == pytest.approx(np.mean([100 * cosine(*pair) for pair in zip(true, texts, strict=True)]))


def test_clip_score_has_no_baseline_where_all_captions_are_one():
    same = torch.ones(4, 3, dtype=torch.float64)
    found = clip_scores("small", (same, same), ["a"] * 4, None)
    assert found.painted.value == pytest.approx(100)
    assert (found.shuffled, found.true) == (None, None)


def small_report(features, count, **changes):
    distances = [image_distance("painted", features[0][:count], features[1][:count])]
    given = {
        "painted": "mine",
        "true": "my-images",
        "count": count,
        "size": 16,
        "features": "a small network",
        "num_features": features[0].shape[1],
        "settings": {"seed": 0},
        "resized": {"true": 0},
        "left_out": {"true": {}},
        "distances": distances,
        "clip": None,
    }
    return fidelity_report(Fidelity(**(given | changes)).to_json()).markdown()


def test_the_report_names_features_and_numbers(features):
    said = small_report(features, 200)
    assert "mine beside 200 true images of my-images, at 16×16 pixels; seed 0" in said
    assert "| painted | 200 |" in said
    assert "Features: a small network, 12." in said
    assert "100 random subsets of 100 images" in said
    assert "compare only figures of the same features" in said
    assert "NOT RELIABLE" not in said
    assert "CLIP score" not in said


def test_the_report_warns_of_too_few_images_for_fid(features):
    """Twelve images have no covariance of twelve features that can be inverted; thirteen may."""
    assert "FID IS NOT RELIABLE HERE: 12 images" in small_report(features, 12)
    assert "NOT RELIABLE" not in small_report(features, 13)


def test_the_report_says_what_was_resized_and_left_out(features):
    said = small_report(features, 200, resized={"true": 7}, left_out={"painted": {"truncated": 2}})
    assert "7 true images are not 16×16: scaled, and cropped to the middle square." in said
    assert "Left out of the painted images: truncated: 2." in said
