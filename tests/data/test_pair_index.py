"""The pair index: what is written is read again, in no memory; what is damaged or foreign is said."""

import hashlib
import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gobelin.data import pair_index
from gobelin.data.captioned_files import SkippedImage
from gobelin.data.pair_columns import ColumnFile, StringColumn
from gobelin.data.pair_index import Pair, PairIndex, PairIndexWriter, Shard
from gobelin.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=()), max_size=12).filter(
    lambda text: not any("\ud800" <= one <= "\udfff" for one in text)
)
FIELDS = st.fixed_dictionaries(
    {
        "name": TEXTS,
        "captions": st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        "size": st.integers(0, 2**40),
        "time": st.integers(-(2**62), 2**62),
        "width": st.integers(1, 2**20),
        "height": st.integers(1, 2**20),
        "sha256": st.binary(min_size=32, max_size=32),
        "offset": st.integers(0, 2**50),
    }
)


def made(number: int, **changes) -> Pair:
    fields = {
        "name": f"{number:06}.jpg",
        "captions": (f"picture {number}",),
        "size": 1000 + number,
        "time": number,
        "width": 64,
        "height": 48,
        "sha256": hashlib.sha256(str(number).encode()).digest(),
    }
    return Pair(**fields | changes)


def write(folder: Path, *pairs: Pair) -> PairIndex:
    with PairIndexWriter(folder) as writer:
        for pair in pairs:
            writer.add(pair)
    return PairIndex(folder)


@settings(max_examples=30)
@given(fields=st.lists(FIELDS, max_size=5, unique_by=lambda fields: fields["name"]))
def test_every_pair_is_read_as_it_was_written(fields: list[dict], tmp_path_factory: pytest.TempPathFactory) -> None:
    pairs = [Pair(**one) for one in fields]
    index = write(tmp_path_factory.mktemp("index"), *pairs)
    assert list(index) == pairs
    assert list(pickle.loads(pickle.dumps(index))) == pairs
    assert [index.find(pair.name) for pair in pairs] == pairs
    assert index.find("elsewhere" * 3) is None
    assert list(index.hashes) == [pair.sha256 for pair in pairs]
    assert index[1:] == tuple(pairs[1:])


def test_names_that_are_no_utf8_are_kept(tmp_path: Path) -> None:
    odd = b"caf\xe9\n.jpg".decode("utf-8", "surrogateescape")
    index = write(tmp_path / "index", made(0, name=odd))
    assert index.names[0] == odd
    assert index.find(odd) == index[0]


def test_names_whose_keys_are_the_same_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_index, "_key", lambda name: 7)
    index = write(tmp_path / "index", *map(made, range(5)))
    assert [index.find(f"{number:06}.jpg") for number in range(5)] == list(index)
    assert index.find("another") is None


def test_two_processes_may_write_the_same_index(tmp_path: Path) -> None:
    with PairIndexWriter(tmp_path / "index") as one:
        one.add(made(0))
        with PairIndexWriter(tmp_path / "index") as two:
            two.add(made(0))
        assert list(PairIndex(tmp_path / "index")) == [made(0)]
    assert list(PairIndex(tmp_path / "index")) == [made(0)]
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_rows_count_from_the_end_too_and_end(tmp_path: Path) -> None:
    index = write(tmp_path / "index", made(0), made(1, captions=("one", "two")), made(2))
    assert index[-2] == index[1]
    assert index.captions(-2) == ("one", "two")
    with pytest.raises(IndexError):
        index[3]
    with pytest.raises(IndexError):
        index.captions(3)


def test_the_digest_is_of_names_captions_and_contents(tmp_path: Path) -> None:
    pairs = [made(0), made(1)]
    digest = write(tmp_path / "a", *pairs).digest
    assert write(tmp_path / "b", made(0, size=5, time=5), made(1, width=5)).digest == digest
    for number, other in enumerate(
        ([pairs[1], pairs[0]], [pairs[0]], [made(0, captions=("x",)), pairs[1]], [made(0, sha256=bytes(32)), pairs[1]])
    ):
        assert write(tmp_path / str(number), *other).digest != digest


def test_what_cannot_be_used_is_kept_and_counted_by_reason(tmp_path: Path) -> None:
    with PairIndexWriter(tmp_path / "index") as writer:
        for number in range(3000):
            writer.skip(SkippedImage(name=f"{number}", reason=f"no caption (of {number})"))
        writer.skip(SkippedImage(name="a", reason="truncated"))
    index = PairIndex(tmp_path / "index")
    assert index.reasons == {"no caption": 3000, "truncated": 1}
    assert index.skipped[2999] == SkippedImage(name="2999", reason="no caption (of 2999)")
    assert len(index.skipped) == 3001


def test_reasons_that_are_all_different_are_counted_too(tmp_path: Path) -> None:
    with PairIndexWriter(tmp_path / "index") as writer:
        for number in range(2000):
            writer.skip(SkippedImage(name="a", reason=f"reason {number}"))
    reasons = PairIndex(tmp_path / "index").reasons
    assert len(reasons) == 1001
    assert sum(reasons.values()) == 2000


def test_tars_and_their_pairs_are_found(tmp_path: Path) -> None:
    shards = [Shard(name=f"{number}.tar", size=number, time=7) for number in range(3)]
    with PairIndexWriter(tmp_path / "index") as writer:
        for number, count in enumerate((2, 0, 3)):
            assert writer.add_shard(shards[number]) == number
            for row in range(count):
                writer.add(made(row, name=f"{number}.tar/{row}.jpg", shard=number, offset=512))
    index = PairIndex(tmp_path / "index")
    assert index.shards() == shards
    assert [index.rows_of(number) for number in range(3)] == [range(2), range(2, 2), range(2, 5)]
    assert index.place(3) == ("2.tar", 512, 1001, True)


def test_an_index_stands_until_another_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    first = write(folder, made(0))
    with pytest.raises(OverflowError), PairIndexWriter(folder) as writer:
        writer.add(made(1, size=2**70))  # after its name was written
    assert list(PairIndex(folder)) == list(first)
    assert not list(folder.glob(".*"))
    write(folder, made(1))
    assert list(PairIndex(folder)) == [made(1)]
    assert len(list(folder.iterdir())) == 2, "the old columns are removed"
    assert list(first) == [made(0)], "and whoever reads them still has them"
    written = PairIndex(folder).folder / "index.json"
    before = written.read_text()
    write(folder, made(1))
    assert written.read_text() == before, "the same pairs are the same index"


def test_what_a_killed_process_left_is_removed_in_time(tmp_path: Path) -> None:
    for name, age in ((".old.tmp", 100_000), (".new.tmp", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "caption_ends").write_bytes(b"")
        written = time.time() - age
        os.utime(tmp_path / name / "caption_ends", (written, written))
    write(tmp_path, made(0))
    assert [file.name for file in tmp_path.glob(".*")] == [".new.tmp"]


def columns(folder: Path) -> Path:
    return folder / json.loads((folder / "index.json").read_text())["columns"]


def test_a_damaged_or_foreign_index_is_said_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    with pytest.raises(DataError, match=r"is no index of pairs: it has no index\.json"):
        PairIndex(folder)
    for damage, sentence in (
        (lambda: (folder / "index.json").write_text('{"format": "other"}'), "does not say 'gobelin pair index 1'"),
        (lambda: (folder / "index.json").write_text("[]"), "does not say 'gobelin pair index 1'"),
        (lambda: (folder / "index.json").write_bytes(b"\xff{"), "cannot be read"),
        (lambda: (folder / "index.json").write_text("[" * 100_000), "cannot be read"),
        (lambda: (folder / "index.json").write_text('{"format": "gobelin pair index 1"}'), "is damaged"),
        (lambda: (columns(folder) / "widths").write_bytes(b""), "widths has 0 bytes, expected 8"),
        (lambda: (columns(folder) / "names.ends").unlink(), "is damaged"),
        (lambda: columns(folder).rename(folder / "gone"), "is damaged"),
    ):
        write(folder, made(0), made(1))
        damage()
        with pytest.raises(DataError, match=sentence):
            PairIndex(folder)
        for left in folder.iterdir():
            if left.is_dir():
                for file in left.iterdir():
                    file.unlink()
                left.rmdir()


@pytest.mark.parametrize("ends", [(4, 9), (4, -1), (4, 3)])
def test_damaged_texts_are_said_by_their_place(ends: tuple[int, int]) -> None:
    column = StringColumn(np.frombuffer("käse".encode() + b"\0\0\0", np.uint8), np.array(ends), "names.utf8")
    assert column[0].startswith("käs")
    with pytest.raises(DataError, match=r"names\.utf8 is damaged at text 1: remove the index"):
        column[1]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="no index can be written in"):
        write(tmp_path / "file" / "index", made(0))


def test_memory_does_not_grow_with_the_pairs(tmp_path: Path) -> None:
    write(tmp_path / "few", *(made(number) for number in range(10)))
    with PairIndexWriter(tmp_path / "many") as writer:
        for number in range(5000):
            writer.add(made(number))

    def opened(name: str) -> int:
        PairIndex(tmp_path / name)
        tracemalloc.start()
        index = PairIndex(tmp_path / name)
        assert index[len(index) - 1].captions
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return kept

    assert opened("many") < opened("few") + 2000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_said() -> None:
    with ColumnFile(Path("/dev/full")) as file, pytest.raises(DataError, match="cannot be written: No space left"):
        file.write(bytes(2_000_000))
