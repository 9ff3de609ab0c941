"""Rows on disk: found by hash, computed once, never half there."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gobelin.data import row_cache
from gobelin.data.row_cache import RowCache, content_hash, fill, hash_array
from gobelin.errors import DataError


def hashes(*names):
    return hash_array(content_hash(name) for name in names)


def rows(*values):
    return {
        "x": torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 3).contiguous(),
        "n": torch.tensor(values),
    }


def test_rows_are_read_in_any_order_from_several_shards(tmp_path):
    cache = RowCache(tmp_path)
    cache.append(hashes("a", "b"), [rows(1, 2)])
    cache.append(hashes("c"), [rows(3)])
    assert len(cache) == 0, "not before a refresh"
    cache.refresh()
    found = cache.read(hashes("c", "a", "c"))
    assert found["x"].tolist() == [[3, 3, 3], [1, 1, 1], [3, 3, 3]]
    assert found["n"].tolist() == [3, 1, 3]
    assert RowCache(tmp_path).read(hashes("b"))["n"].item() == 2


def test_each_content_is_computed_once(tmp_path):
    cache, computed = RowCache(tmp_path), []
    names = ["a", "b", "a", "c", "b"]

    def compute(positions):
        computed.extend(names[position] for position in positions)
        return rows(*(ord(names[position]) for position in positions))

    fill(cache, hashes(*names), compute)
    assert computed == ["a", "b", "c"]
    fill(cache, hashes("d", *names), lambda positions: pytest.fail("b is there") if positions.any() else rows(0))
    assert cache.read(hashes(*names))["n"].tolist() == [ord(name) for name in names]


def test_a_kill_loses_no_more_than_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "_SHARD_BYTES", 1)
    monkeypatch.setattr(row_cache, "_COMPUTED_TOGETHER", 2)
    names = [str(number) for number in range(10)]
    cache, calls = RowCache(tmp_path), []

    def dying(positions):
        calls.append(positions)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rows(*positions.tolist())

    with pytest.raises(KeyboardInterrupt):
        fill(cache, hashes(*names), dying)
    cache = RowCache(tmp_path)
    assert len(cache) == 6
    fill(cache, hashes(*names), lambda positions: rows(*positions.tolist()))
    assert cache.read(hashes(*names))["n"].tolist() == list(range(10))


def test_processes_share_what_is_missing(tmp_path):
    names = [str(number) for number in range(9)]
    for rank in range(2):
        fill(RowCache(tmp_path), hashes(*names), lambda found: rows(*found.tolist()), share=slice(rank, None, 2))
    assert len(RowCache(tmp_path)) == 9
    assert RowCache(tmp_path).read(hashes(*names))["n"].tolist() == list(range(9))


@given(cut=st.integers(0, 49), flip=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_damaged_shard_is_named_or_right(cut, flip, bit, tmp_path_factory):
    """Whichever bit of the file is another, and wherever it ends: no number is read that was not written."""
    folder = tmp_path_factory.mktemp("cache")
    RowCache(folder).append(hashes("a", "b"), [rows(1), rows(2)])
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[flip % len(content)] ^= 1 << bit
    shard.write_bytes(content[: len(content) - cut])
    said = ""
    try:
        found = RowCache(folder).read(hashes("a"))
        assert found.keys() == {"x", "n"}
        assert found["x"].tolist() == [[1, 1, 1]]
        assert found["n"].tolist() == [1]
    except DataError as error:
        said = str(error)
    assert "\n" not in said
    assert not said or "computed again" in said or "lacks" in said


@pytest.mark.parametrize("text", [b"[" * 90_000, b'{"hashes": {"shape": [1e999]}}', b"[1, 2]", b'{"hashes": 3}'])
def test_a_header_that_is_none_is_said(tmp_path, text):
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(DataError, match=r"is damaged .*computed again"):
        RowCache(tmp_path)


def test_a_shard_of_many_parts_is_a_safetensors_file(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "_COMPUTED_TOGETHER", 4)
    names = [str(number) for number in range(30)]

    def compute(positions):
        values = torch.from_numpy(positions)
        return {"half": values[:, None, None].expand(-1, 2, 3).half(), "bytes": values.byte(), "n": values}

    fill(RowCache(tmp_path), hashes(*names), compute)
    (shard,) = tmp_path.glob("*.safetensors")
    found = load_file(shard)
    assert found.keys() == {"half", "bytes", "n", "hashes", "checksums"}
    assert found["n"].tolist() == list(range(30))
    assert torch.equal(found["half"], compute(np.arange(30))["half"])
    assert torch.equal(RowCache(tmp_path).read(hashes("17", "3"))["half"], found["half"][[17, 3]])


def test_what_is_not_finite_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"x to cache in .* are not finite"):
        RowCache(tmp_path).append(hashes("a"), [{"x": torch.tensor([[float("nan")]])}])
    assert not list(tmp_path.iterdir())


def test_missing_rows_are_said(tmp_path):
    cache = RowCache(tmp_path)
    cache.append(hashes("a"), [rows(1)])
    cache.refresh()
    with pytest.raises(DataError, match="lacks 1 of 2 rows"):
        cache.read(hashes("a", "b"))


def test_reading_maps_nothing(tmp_path):
    """Memory does not grow with what was read."""
    cache = RowCache(tmp_path)
    cache.append(hashes("a"), [rows(1)])
    cache.refresh()
    cache.read(hashes("a"))
    assert str(tmp_path) not in Path(f"/proc/{os.getpid()}/maps").read_text()
    assert np.array_equal(cache.missing(hashes("a", "b", "b")), [1])
