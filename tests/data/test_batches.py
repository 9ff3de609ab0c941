"""Order and randomness: every image once an epoch, the same in any cut of the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gobelin.data.batches import Order, derive_seed, normals, uniforms


def order(seed=0, stage="vae", batch_size=3, dataset_size=7, buckets=None):
    return Order(seed=seed, stage=stage, batch_size=batch_size, dataset_size=dataset_size, buckets=buckets)


@given(dataset_size=st.integers(1, 40), batch_size=st.integers(1, 30))
def test_every_epoch_sees_every_image_once(dataset_size, batch_size):
    steps = -(-3 * dataset_size // batch_size)
    made = order(5, batch_size=batch_size, dataset_size=dataset_size)
    seen = torch.cat([made.indices(step) for step in range(steps)])
    for epoch in seen[: 3 * dataset_size].reshape(3, dataset_size):
        assert sorted(epoch.tolist()) == list(range(dataset_size))


def test_orders_differ_by_seed_stage_and_epoch():
    first = order(0, "vae", 30, 30).indices(0).tolist()
    assert first == order(0, "vae", 30, 30).indices(0).tolist()
    for seed, stage, step in ((1, "vae", 0), (0, "unet", 0), (0, "vae", 1)):
        assert first != order(seed, stage, 30, 30).indices(step).tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 7))
def test_with_buckets_a_batch_is_of_one_and_an_epoch_leaves_none_out(buckets, batch_size):
    buckets = np.array(buckets, np.uint8)
    made = order(batch_size=batch_size, dataset_size=len(buckets), buckets=buckets)
    steps = int(made.steps_per_epoch)
    for epoch in range(2):
        batches = [made.indices(epoch * steps + step).tolist() for step in range(steps)]
        assert all(len(batch) == batch_size and len({buckets[index] for index in batch}) == 1 for batch in batches)
        assert {index for batch in batches for index in batch} == set(range(len(buckets)))
        for bucket in np.unique(buckets):  # no more repeats than fill the last batch
            seen = [index for batch in batches for index in batch if buckets[index] == bucket]
            count = int((buckets == bucket).sum())
            assert len(seen) == -(-count // batch_size) * batch_size


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_sample_draws_the_same_numbers_in_any_part_of_the_batch(parts):
    made = order(batch_size=8, dataset_size=100)
    whole = made.randoms(3, slice(None))
    expected = torch.cat([uniforms(whole)[:, None, None], normals(whole, 2, 5).reshape(8, 1, -1)], dim=2)
    for part in range(parts):
        rows = slice(part, None, parts)
        own = made.randoms(3, rows)
        drawn = torch.cat([uniforms(own)[:, None, None], normals(own, 2, 5).reshape(8 // parts, 1, -1)], dim=2)
        assert torch.equal(drawn, expected[rows])


def test_samples_draw_different_and_normal_numbers():
    made = order(batch_size=64, dataset_size=100)
    drawn = torch.stack([normals(made.randoms(step, slice(None)), 50) for step in range(20)])
    assert drawn.reshape(-1, 50).unique(dim=0).shape[0] == 64 * 20
    assert drawn.mean().abs() < 0.01
    assert abs(drawn.std() - 1) < 0.01
    other = normals(order(stage="unet", batch_size=64, dataset_size=100).randoms(0, slice(None)), 50)
    assert not torch.equal(other, drawn[0])


def test_seeds_fit_a_generator_and_differ():
    seeds = {
        derive_seed(seed, purpose, number) for seed in (0, 1, 2**40) for purpose in ("a", "b") for number in range(5)
    }
    assert len(seeds) == 30
    for seed in seeds:
        torch.Generator().manual_seed(seed)
