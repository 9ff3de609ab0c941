"""Memory that is freed and kept: no page is entered twice, and all of it is given back at the end; few heaps; gaps."""

import ctypes
import subprocess
import sys

import pytest

from gobelin import allocator
from gobelin.allocator import give_back_freed_memory, keep_freed_memory, limit_heaps

IN_A_PROCESS = """
import resource
from contextlib import nullcontext

import torch

from gobelin.allocator import keep_freed_memory

MB = 1 << 20


def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MB


def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        held = [torch.ones(size * MB, dtype=torch.uint8) for size in (40, 90, 50, 64)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


torch.set_num_threads(1)
faults(1)
resting, once = megabytes(), 244 * MB / resource.getpagesize()
assert faults(4) > 3 * once, "each has pages of its own"
for _ in range(2):
    with keep_freed_memory():
        with keep_freed_memory():
            faults(4)
        # The fewest of three: beside other work the system may take pages away to move them.
        assert min(faults(4) for _ in range(3)) < once / 8, "all have pages that are there"
        assert megabytes() > resting + 200
    assert megabytes() < resting + 50, "given back"
"""


@pytest.mark.skipif(allocator._glibc() is None, reason="glibc's alone")
def test_pages_are_entered_once_and_given_back():
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Calls(ctypes.CDLL):
    """Stands in for glibc."""

    def __init__(self):  # opens no library
        self.made = []

    def mallopt(self, option, value):
        self.made.append((option, value))
        return 1

    def malloc_trim(self, pad):
        self.made.append("trimmed")


def test_the_last_of_all_blocks_gives_back_after_errors_too(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(allocator, "_glibc", lambda: calls)
    one, other = keep_freed_memory(), keep_freed_memory()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert calls.made == list(allocator._KEPT)
    assert not other.__exit__(ValueError, ValueError("mine"), None), "it is raised"
    assert calls.made == [*allocator._KEPT, *allocator._GIVEN_BACK, "trimmed"]


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    with keep_freed_memory():
        assert allocator._users == 0


BETWEEN_WHAT_IS_USED = """
import ctypes
import resource

from gobelin.allocator import give_back_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
SIZE = 16 << 10


def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


resting = megabytes()
blocks = [library.malloc(SIZE) for _ in range(10_000)]
for block in blocks:
    ctypes.memset(block, 1, SIZE)
for number, block in enumerate(blocks, 1):
    if number % 100:
        library.free(block)
assert megabytes() > resting + 100, "the last block holds all that lies below it"
give_back_freed_memory()
assert megabytes() < resting + 30
"""


@pytest.mark.skipif(allocator._glibc() is None, reason="glibc's alone")
def test_what_was_freed_between_blocks_in_use_is_given_back():
    done = subprocess.run([sys.executable, "-c", BETWEEN_WHAT_IS_USED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_given_back_without_glibc(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(allocator, "_glibc", lambda: calls)
    give_back_freed_memory()
    assert calls.made == ["trimmed"]
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    give_back_freed_memory()
    assert len(calls.made) == 1


HEAPS_OF_THREADS = """
import ctypes
import sys
import tempfile
import threading
from pathlib import Path

from gobelin.allocator import limit_heaps

if sys.argv[1] != "-":
    limit_heaps(int(sys.argv[1]))
library = ctypes.CDLL(None)
library.fopen.restype = library.malloc.restype = ctypes.c_void_p
library.malloc_info.argtypes, library.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
met = threading.Barrier(8)


def allocate():
    met.wait()
    for _ in range(100):
        library.malloc(1000)
    met.wait()


threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "heaps.xml")
    stream = library.fopen(str(file).encode(), b"w")
    library.malloc_info(0, stream)
    library.fclose(stream)
    print(file.read_text().count("<heap "))
"""


def heaps_of_threads(limit: str) -> int:
    done = subprocess.run([sys.executable, "-c", HEAPS_OF_THREADS, limit], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(allocator._glibc() is None, reason="glibc's alone")
def test_threads_share_as_many_heaps_as_they_are_given():
    assert heaps_of_threads("2") <= 2
    assert heaps_of_threads("-") > 2, "without the limit there are more"


def test_heaps_are_left_alone_without_glibc(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(allocator, "_glibc", lambda: calls)
    limit_heaps(2)
    assert calls.made == [(-8, 2)]
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    limit_heaps(2)
    assert len(calls.made) == 1
