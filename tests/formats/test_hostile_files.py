"""Files that were made to harm: each is one clear error, or tensors no larger than the file; nothing in them runs."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from tests.trials import peak, trials

from gobelin.errors import ModelError
from gobelin.formats.weights import open_tensors

WHOLE = save({"a.weight": torch.ones(4, 3), "a.bias": torch.zeros(3, dtype=torch.float16), "n": torch.arange(2)})
START = 8 + struct.unpack("<Q", WHOLE[:8])[0]
HEADER = json.loads(WHOLE[8:START])
TRIALS = trials(200)
MOST_GROWTH = 200 * 2**20  # bytes beside the file

odd_numbers = st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1, 2**64, 1e308, -0.5]) | st.integers(0, 64)
odd_values = st.none() | st.booleans() | odd_numbers | st.text(max_size=4) | st.lists(odd_numbers, max_size=3)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """The header of a safetensors file, with lies in it."""
    header = {name: dict(one) for name, one in HEADER.items()}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*HEADER, "other", "__metadata__"]))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other"]))
        value = draw(odd_values | st.sampled_from(["F64", "F8_E4M3", "BOOL", "I64", "F4"]))
        header.setdefault(name, {})[field] = value
    text = json.dumps(header)
    if draw(st.booleans()):
        text = text[:-1] + f', "a.bias": {json.dumps(HEADER["a.weight"])}}}'  # twice
    return text.encode()


@st.composite
def tampered(draw: st.DrawFn) -> bytes:
    """A safetensors file that something happened to."""
    kind = draw(st.sampled_from(["cut", "length", "header", "deep", "bytes", "longer"]))
    if kind == "cut":
        return WHOLE[: draw(st.integers(0, len(WHOLE) - 1))]
    if kind == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, 400))) + WHOLE[8:]
    if kind == "header":
        header = draw(headers())
        return struct.pack("<Q", len(header)) + header + WHOLE[START:]
    if kind == "deep":
        depth = draw(st.integers(1, 100_000))
        header = b'{"__metadata__":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        return struct.pack("<Q", len(header)) + header + WHOLE[START:]
    if kind == "longer":
        return WHOLE + draw(st.binary(min_size=1, max_size=64))
    changed = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(st.integers(0, len(WHOLE) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


def assert_harmless(path: Path, allow_pickle: bool) -> None:
    """Refused in a sentence that names the file, or no more tensors than the file has bytes for."""
    refused, size = "", 0
    try:
        size = sum(tensor.nbytes for tensor in open_tensors(path, allow_pickle).read().values())
    except ModelError as error:
        refused = str(error)
    assert str(path) in refused if refused else size <= path.stat().st_size


@TRIALS
@given(content=tampered(), allow_pickle=st.booleans())
def test_tampered_safetensors(content: bytes, allow_pickle: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    before = peak()
    assert_harmless(path, allow_pickle)
    assert peak() - before < MOST_GROWTH + len(content)


class Payload:
    """What a pickle of it runs when a plain unpickler reads it: leaves a mark."""

    def __init__(self, function: object, *arguments: object):
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def archive(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", program)
        for name, content in members.items():
            file.writestr(f"model/data/{name}", content)
    return path


def payloads(mark: Path) -> Iterator[tuple[str, bytes]]:
    """Programs that would make the file ``mark``, by what they ask for."""
    command = f"touch {mark}"
    text = f"open({str(mark)!r}, 'w')"
    yield "posix.system", pickle.dumps({"w": Payload(os.system, command)})
    yield "builtins.exec", pickle.dumps({"w": Payload(exec, text)})
    yield "__builtin__.eval", pickle.dumps([Payload(eval, text)], protocol=0)
    yield "io.open", pickle.dumps({"state_dict": {"w": Payload(open, str(mark), "w")}}, protocol=4)
    for module, name in (
        ("os", "system"),
        ("subprocess", "getoutput"),
        ("pkgutil", "resolve_name"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("builtins", "getattr"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("importlib", "import_module"),
        ("numpyx", "evil"),
        ("torch.serialization", "_get_restore_location"),
    ):
        called = f"c{module}\n{name}\n(S{command!r}\ntR.".encode()
        yield f"{module}.{name}", called
        texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, command)]
        yield f"{module}.{name}", b"\x80\x04" + texts[0] + texts[1] + b"\x93(" + texts[2] + b"tR."


def test_no_payload_runs_and_each_is_refused_by_name(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    found = list(payloads(mark))
    assert len(found) > 25
    for number, (asked, program) in enumerate(found):
        path = archive(tmp_path / f"{number}.safetensors", program)
        with pytest.raises(ModelError, match="is a pickle, a format that can hold programs"):
            open_tensors(path)
        with pytest.raises(ModelError) as caught:
            open_tensors(path, allow_pickle=True)
        assert f"asks for {asked}:" in str(caught.value)
    assert not mark.exists()


def rebuilt(size: tuple, stride: tuple, numbers: int = 4, offset: int = 0) -> bytes:
    """The program of one float32 tensor."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{numbers}\ntQ"
    sizes = "".join(f"I{one}\n" for one in size), "".join(f"I{one}\n" for one in stride)
    called = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n({sizes[0]}t({sizes[1]}tI00\nNtR"
    return f"(dS'w'\n{called}s.".encode()


def built(state: list) -> bytes:
    """The program of one float32 storage whose attributes are set afterwards."""
    storage = "(dS'w'\n(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    return storage.encode() + pickle.dumps(state, protocol=2)[2:-1] + b"bs."


def test_a_plain_tensor_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.ckpt", rebuilt((2, 2), (2, 1)), **{"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert open_tensors(path, True).read()["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "program",
    [
        rebuilt((2, 3), (3, 1)),  # more than is stored
        rebuilt((10**9, 10**9), (0, 0)),  # one number, repeated
        rebuilt((2,), (-1,)),
        rebuilt((2**63, 2), (1, 1)),
        rebuilt((1,), (1,), offset=4),
        rebuilt((4,), (1,), numbers=-1),
        rebuilt((8,), (1,), numbers=8),  # more than the file has
        rebuilt((2,), (1,), numbers=10**15),
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 32 GB
        b"\x80\x02]p2147483647\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 8 EB
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"(" * 10**6 + b".",
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dictionary that holds itself
        b"\x80\x02]q\x00.",
        b"\x80\x02}(" + b")2\x86" * 60 + b"Nu.",  # a key of 2⁶⁰ tuples
        b"\x80\x02})q\x01" + b"h\x01h\x01\x86q\x01" * 60 + b"Ns.",
        b"\x80\x02\x8f(" + b")2\x86" * 60 + b"\x90.",  # in a set
        built(["data/0", "dtype", 4, 0, (10**8,), (0,)]),
        b"\x80\x02N.",
        b"\x80\xff.",
        b"",
        rebuilt((2, 2), (2, 1))[:-20],
    ],
)
def test_programs_that_are_no_checkpoint(program: bytes, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.ckpt", program, **{"0": bytes(16)})
    before = peak()
    with pytest.raises(ModelError, match=r"x\.ckpt"):
        open_tensors(path, allow_pickle=True).read()
    assert peak() - before < MOST_GROWTH


def test_dictionaries_within_each_other_are_walked_once(tmp_path: Path) -> None:
    """Three levels of 10,000 names for one dictionary: 10¹² ways."""
    inner = "".join(f"S'{number}'\ng0\ns" for number in range(10_000))
    path = archive(tmp_path / "x.ckpt", f"(dp0\n{inner}.".encode())
    with pytest.raises(ModelError, match="holds no tensors by name"):
        open_tensors(path, allow_pickle=True)


@TRIALS
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_tampered_checkpoints(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.ones(4, 3), "b": torch.arange(5)}, "epoch": 3}, path)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    before = peak()
    assert_harmless(path, allow_pickle=True)
    assert peak() - before < MOST_GROWTH
