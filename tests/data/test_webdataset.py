"""Tars as people have them: each sample once, read in place; what is cut, packed, linked or doubled is said."""

import gzip
import io
import json
import os
import pickle
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gobelin.data import Dataset, ImageFolderDataset, indexed_images, webdataset
from gobelin.data.webdataset import WebDataset, open_images
from gobelin.errors import DataError

Members = list[tuple[str, bytes]]


def jpeg(colour: str, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(file: Path, members: Members, kind: int = tarfile.USTAR_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def samples(first: int, count: int) -> Members:
    """As img2dataset writes them: the image, its caption and what else is known of it."""
    members: Members = []
    for number in range(first, first + count):
        colour = ["red", "lime", "blue", "black"][number % 4]
        caption = f"{colour} {number}"
        members += [
            (f"{number:09}.jpg", jpeg(colour, (16 + number, 16))),
            (f"{number:09}.txt", caption.encode()),
            (f"{number:09}.json", json.dumps({"caption": caption, "alt": f"alt {number}", "width": 3}).encode()),
        ]
    return members


def shards(folder: Path) -> Path:
    for shard in range(3):
        write_tar(folder / f"{shard:05}.tar", samples(10 * shard, 10))
        (folder / f"{shard:05}_stats.json").write_text('{"failed_to_download": 3}')
        (folder / f"{shard:05}.parquet").write_bytes(b"PAR1")
    return folder


def reasons(dataset: indexed_images.IndexedImages) -> dict[str, str]:
    return {one.name: one.reason for one in dataset.skipped}


def every_caption(dataset: indexed_images.IndexedImages) -> list[tuple[str, ...]]:
    return [dataset.captions(index) for index in range(len(dataset))]


def test_every_sample_is_read_once_in_order(tmp_path: Path) -> None:
    dataset = WebDataset(shards(tmp_path / "shards"), 16)
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 30
    assert not len(dataset.skipped)
    assert list(dataset.names)[9:11] == ["00000.tar/000000009.jpg", "00001.tar/000000010.jpg"]
    for index in range(30):
        entry, colour = dataset[index], ["red", "lime", "blue", "black"][index % 4]
        assert entry.captions == dataset.captions(index) == (f"{colour} {index}",)
        assert abs(entry.image.astype(int) - np.asarray(Image.new("RGB", (16, 16), colour))).max() < 4
    assert len(set(dataset.hashes)) == 30
    assert dataset.description == f"30 captioned images in {tmp_path / 'shards'}"
    assert (dataset.index.widths == np.arange(16, 46)).all()


def test_one_tar_is_a_data_set(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "one.tar", samples(0, 3))
    dataset = open_images(file, 16)
    assert every_caption(dataset) == [("red 0",), ("lime 1",), ("blue 2",)]
    assert [entry.image.shape for entry in dataset] == [(16, 16, 3)] * 3


def test_a_data_set_goes_to_another_process(tmp_path: Path) -> None:
    dataset = WebDataset(shards(tmp_path / "shards"), 16)
    again = pickle.loads(pickle.dumps(dataset))
    assert every_caption(again) == every_caption(dataset)
    assert (again[3].image == dataset[3].image).all()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(kind: int, tmp_path: Path) -> None:
    names = ["a" * 90, "./folder/in a/picture", "/absolute/b", "../up/c", "two\nlines"]
    names += ["日本 ünï", "n" * 180] if kind != tarfile.USTAR_FORMAT else []
    members = [(f"{name}.{end}", what) for name in names for end, what in (("JPG", jpeg("red")), ("txt", b"red"))]
    dataset = WebDataset(write_tar(tmp_path / "a.tar", members, kind), 16)
    assert list(dataset.names) == [f"a.tar/{name}.JPG" for name in names]
    assert not list(dataset.skipped)
    assert len([dataset[index] for index in range(len(dataset))]) == len(names)


def test_a_tar_by_gnu_tar_with_texts_after_images_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / ("deep" * 30)
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}.jpg").write_bytes(jpeg("red"))
        (folder / f"{number}.caption").write_text(f"picture {number}")
    os.link(folder / "3.jpg", folder / "hard.jpg")
    (folder / "soft.jpg").symlink_to("3.jpg")
    for name in ("hard", "soft"):
        (folder / f"{name}.caption").write_text("a link")
    (folder / ".hidden.jpg").write_bytes(b"x")
    listed = sorted(str(file.relative_to(tmp_path)) for file in folder.iterdir())
    listed = sorted(listed, key=lambda name: not name.endswith(".jpg"))  # all images before all texts
    subprocess.run(["tar", "cf", tmp_path / "a.tar", *listed], cwd=tmp_path, check=True)
    dataset = WebDataset(tmp_path / "a.tar", 16)
    assert sorted(every_caption(dataset)) == sorted((f"picture {number}",) for number in range(20))
    prefix = f"a.tar/folder/{'deep' * 30}"
    assert reasons(dataset) == {
        f"{prefix}/hard.jpg": "a link in a tar, and not its content",
        f"{prefix}/soft.jpg": "a link in a tar, and not its content",
    }


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    whole = jpeg("red", (200, 200))
    members = [
        *samples(0, 10),
        ("no-caption.jpg", whole),
        ("no-image.txt", b"a failed download"),
        ("broken.jpg", b"no image"),
        ("broken.txt", b"broken"),
        ("half.jpg", whole[: len(whole) // 2]),
        ("half.txt", b"half"),
        ("latin.jpg", whole),
        ("latin.txt", "caf\xe9".encode("latin-1")),
        ("empty.jpg", whole),
        ("empty.txt", b" \n"),
        ("000000001.jpg", whole),
        ("000000002.png", whole),
        ("000000003.seg.png", whole),
        ("000000003.cls", b"7"),
        ("json.jpg", whole),
        ("json.json", b"{"),
        ("other.jpg", whole),
        ("other.json", b'{"url": "x"}'),
        ("numbers.jpg", whole),
        ("numbers.json", b'{"caption": 3}'),
        ("._000000001.jpg", b"macOS"),
        ("__MACOSX/a.jpg", b"macOS"),
    ]
    dataset = WebDataset(write_tar(tmp_path / "a.tar", members), 16)
    assert len(dataset) == 10
    assert {name.removeprefix("a.tar/"): reason for name, reason in reasons(dataset).items()} == {
        "no-caption.jpg": "no caption",
        "no-image": "a sample with a caption and no image",
        "broken.jpg": "not a readable image",
        "half.jpg": "truncated",
        "latin.jpg": "its caption is not UTF-8 text (latin.txt)",
        "empty.jpg": "its caption is empty (empty.txt)",
        "000000001.jpg": "its name stands in its tar a second time, and the first is used",
        "000000002.png": "not the image of its sample (.png)",
        "000000003.seg.png": "not the image of its sample (.seg.png)",
        "json.jpg": "its caption is not JSON (json.json)",
        "other.jpg": "no 'text' or 'caption' or 'prompt' in its JSON (other.json)",
        "numbers.jpg": "its caption is no text (numbers.json)",
    }
    assert dataset.captions(1) == ("lime 1",)
    assert dataset.index.reasons["no caption"] == 1


def test_a_key_of_the_json_can_be_the_caption(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples(0, 2))
    assert every_caption(WebDataset(file, 16, "alt")) == [("alt 0",), ("alt 1",)]
    with pytest.raises(DataError, match=r"only 0 of 2 images can be used.*no 'nothing' in its JSON"):
        WebDataset(file, 16, "nothing")


@pytest.mark.parametrize("left", [0.9, 0.5, 0.31])
def test_of_a_tar_that_is_cut_off_whole_members_are_used(left: float, tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    whole = (folder / "00001.tar").read_bytes()
    for cut in range(int(left * 30 * 1024), int(left * 30 * 1024) + 1600, 97):
        (folder / "00001.tar").write_bytes(whole[:cut])
        dataset = WebDataset(folder, 16)
        kept = [caption for (caption,) in every_caption(dataset)]
        with_last = [f"{['red', 'lime', 'blue', 'black'][n % 4]} {n}" for n in (*range(10, 20),)]
        inside = [caption for caption in kept if caption in with_last]
        assert inside == with_last[: len(inside)]
        assert len(kept) == 20 + len(inside) < 30
        assert len(inside) >= cut // 3072 - 1
        cut_off = "the tar is cut off, and what is whole in it is used"
        assert dataset.index.reasons in ({cut_off: 1}, {cut_off: 1, "no caption": 1})
        assert all(dataset[index].image.size for index in range(len(dataset)))


def test_a_tar_without_its_end_is_said_and_used(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples(0, 4))
    content = file.read_bytes().rstrip(b"\0")
    file.write_bytes(content + bytes(-len(content) % 512))
    dataset = WebDataset(file, 16)
    assert len(dataset) == 4
    assert reasons(dataset) == {"a.tar": "the tar is cut off, and what is whole in it is used (it has no end mark)"}


def test_joined_and_damaged_tars_are_said(tmp_path: Path) -> None:
    one, two = (write_tar(tmp_path / f"{name}.tar", samples(start, 3)) for name, start in (("a", 0), ("b", 3)))
    joined = one.read_bytes() + two.read_bytes()
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "c.tar").write_bytes(joined)
    dataset = WebDataset(tmp_path / "joined", 16)
    assert len(dataset) == 3
    assert reasons(dataset) == {"c.tar": "the tar goes on after its end, as joined tars do, and that is not read"}
    damaged = bytearray(one.read_bytes())
    with tarfile.open(one) as tar:
        at = tar.getmembers()[3].offset
    damaged[at : at + 100] = b"x" * 100
    one.write_bytes(damaged)
    dataset = WebDataset(one, 16)
    assert len(dataset) == 1
    assert reasons(dataset)["a.tar"].startswith("the tar is damaged, and what lies before that is used (byte ")


def test_an_empty_shard_among_others_is_said(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    (folder / "00001.tar").write_bytes(b"")
    dataset = WebDataset(folder, 16)
    assert len(dataset) == 20
    assert reasons(dataset) == {"00001.tar": "the tar is cut off, and what is whole in it is used (it has no bytes)"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "has no .tar: expected a tar, or a folder of tars"),
        (lambda folder: (folder / "a.tar").write_bytes(b"<html>" * 1000), "cannot be read as a tar"),
        (lambda folder: (folder / "a.tar.gz").write_bytes(gzip.compress(bytes(10240))), r"is compressed \(gzip\)"),
        (lambda folder: (folder / "a.tar").write_bytes(gzip.compress(bytes(10240))), r"is compressed \(gzip\): unpack"),
        (lambda folder: (folder / "a.tar").symlink_to("gone.tar"), "cannot be read: No such file"),
        (lambda folder: write_tar(folder / "a.tar", [("a.txt", b"x")]), "only 0 of 1 images can be used"),
        (lambda folder: write_tar(folder / "a.tar", [("a.bin", b"x")]), "has no captioned images: expected tars with"),
        (lambda folder: write_tar(folder / "a.tar", []), "has no captioned images: expected tars with"),
    ],
)
def test_tars_with_nothing_to_learn_from_are_refused(
    make: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=sentence):
        WebDataset(tmp_path, 16)


def test_a_path_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at"):
        WebDataset(tmp_path / "nowhere", 16)
    with pytest.raises(DataError, match="no folder at"):
        open_images(tmp_path / "nowhere", 16)


def test_what_is_there_decides_how_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg("red"))
    (tmp_path / "a.txt").write_text("red")
    assert isinstance(open_images(tmp_path, 16), ImageFolderDataset)
    folder = shards(tmp_path / "below" / "shards")
    assert isinstance(open_images(folder.parent, 16), WebDataset)
    with pytest.raises(DataError, match=r"has tars and images, as below/shards/00000\.tar and a\.jpg: give a folder"):
        open_images(tmp_path, 16)


def test_unchanged_tars_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, index = shards(tmp_path / "shards"), tmp_path / "index"
    content = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(content[: len(content) // 2])
    first = WebDataset(folder, 16, index=index)
    read: list[str] = []
    scan = webdataset.scan_tar
    monkeypatch.setattr(webdataset, "scan_tar", lambda file, shard: read.append(file.name) or scan(file, shard))

    again = WebDataset(folder, 16, index=index)
    assert not read
    assert list(again.index) == list(first.index)
    assert reasons(again) == reasons(first)
    assert again.fingerprint == first.fingerprint

    write_tar(folder / "00001.tar", [*samples(100, 4), ("a.jpg", b"broken"), ("a.txt", b"broken")])
    changed = WebDataset(folder, 16, index=index)
    assert read == ["00001.tar"]
    fresh = WebDataset(folder, 16)
    assert list(changed.index) == list(fresh.index)
    assert list(changed.skipped) == list(fresh.skipped)
    assert changed.index.reasons == fresh.index.reasons
    assert changed.fingerprint == fresh.fingerprint != first.fingerprint

    (folder / "00000.tar").unlink()
    read.clear()
    fewer = WebDataset(folder, 16, index=index)
    assert not read
    assert list(fewer.names) == list(fresh.names)[10:]
    assert all((fewer[row].image == fresh[row + 10].image).all() for row in range(len(fewer)))
    assert every_caption(WebDataset(folder, 16, "alt", index=index))[0] == ("alt 100",), "another caption is read"


def test_moved_tars_are_the_same_data(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    first = WebDataset(folder, 16).fingerprint
    folder.rename(tmp_path / "moved")
    assert WebDataset(tmp_path / "moved", 16).fingerprint == first
    assert WebDataset(tmp_path / "moved", 32).fingerprint != first, "other pixels are learned"


def test_a_tar_that_is_changed_under_an_open_data_set_is_said(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", samples(0, 3))
    dataset = WebDataset(file, 16)
    file.write_bytes(file.read_bytes()[:1024])
    with pytest.raises(DataError, match=r"a\.tar ends before byte .*: it was changed since its index was made"):
        dataset[2]
    file.unlink()
    with pytest.raises(DataError, match=r"a\.tar cannot be read \(No such file or directory\): was it removed"):
        dataset[2]


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = shards(tmp_path / "shards")
    WebDataset(folder, 16, advance=lambda done, total: told.append((done, total)))
    size = sum(file.stat().st_size for file in folder.glob("*.tar"))
    assert told == sorted(told)
    assert told[-1] == (size, size)
    assert len(told) >= 30


def test_a_member_that_is_cut_is_not_read(tmp_path: Path) -> None:
    """Texts come before images here, so that the sample of the cut image would have a caption."""
    members = sorted(samples(0, 6), key=lambda member: (member[0][:9], member[0][9:] == ".jpg"))
    whole = write_tar(tmp_path / "a.tar", members).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        places = {member.name: member.offset_data for member in tar}
    for name, count in (("000000005.jpg", 5), ("000000005.txt", 5), ("000000004.jpg", 4)):
        (tmp_path / "a.tar").write_bytes(whole[: places[name] + 3])
        dataset = WebDataset(tmp_path / "a.tar", 16)
        assert len(dataset) == count
        assert [one.reason for one in dataset.skipped if one.name == "a.tar"] == [
            f"the tar is cut off, and what is whole in it is used ({name} is not whole)"
        ]
        assert "a file that cannot be read" not in dataset.index.reasons
