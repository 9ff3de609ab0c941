"""Freed memory of the C library: kept for the next tensor while a model trains; in few heaps, or given back."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

_LOCK = Lock()
_users = 0  # blocks that are running, in all threads

# Options of mallopt, malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
# While kept: nothing has a mapping of its own, nothing is given back, and the heap grows by 64 MB at a time.
_KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
# Afterwards: what glibc comes to by itself in a process that has freed a tensor of 32 MB. Its first thresholds, which
# grow from then on, are not to be had again.
_GIVEN_BACK = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20), (_TOP_PAD, 128 << 10))


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory for the next tensor while the block runs, and give it back to the system afterwards.

    glibc maps every tensor of more than 32 MB anew and unmaps it when it is freed, so that the system clears and enters
    its pages one by one: half of the time of a training step at Stable Diffusion 1.5's size. Only the main thread's
    tensors are kept, since other threads' heaps end at 64 MB. Without glibc nothing is done.
    """
    library = _glibc()
    if library is None:
        yield
        return
    _enter(library)
    try:
        yield
    finally:
        _leave(library)


def limit_heaps(count: int) -> None:
    """Let all threads share so many heaps (glibc's arenas); for a process of many threads, before they start.

    glibc makes heaps until there are eight a core, and a thread's next tensor comes from the heap that it was given:
    what was freed in the others lies there unused. Without glibc nothing is done.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_ARENA_MAX, count)


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, also from between what is in use. Without glibc nothing is done."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _enter(library: ctypes.CDLL) -> None:
    global _users
    with _LOCK:
        _users += 1
        if _users == 1:
            for option in _KEPT:
                library.mallopt(*option)


def _leave(library: ctypes.CDLL) -> None:
    global _users
    with _LOCK:
        _users -= 1
        if _users == 0:
            for option in _GIVEN_BACK:
                library.mallopt(*option)
            library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """Find the C library where it is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library
