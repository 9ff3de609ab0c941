"""Whole runs of the command line in children of this process, which is forked: the imports are made once.

``python -m tests.training.runs_in_children`` reads a line of JSON for each run, [arguments, log, operation, error,
limit], and answers each with the run's exit status. ``operation`` is the number of the file operation in the run's
folder at which the child is killed (SIGKILL), or from which on every write fails with the ``error`` number; no file can
be longer than ``limit`` bytes, 0 for any length. The log has what the run printed, and beside it are its operations.
"""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

_CALLS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
"""Audit events of file operations, which Python raises before each (PEP 578); os.replace is an os.rename."""


def watch(folder: str, log: Path, operation: int, error: int) -> None:
    """Count the file operations in a folder from now on, and end or fail at one of them."""
    count = 0
    operations = log.open("a", encoding="utf-8", buffering=1)

    def happens(name: str, path: str) -> None:
        nonlocal count
        count += 1
        operations.write(f"{count} {name} {path}\n")
        if count == operation and not error:
            os.kill(os.getpid(), signal.SIGKILL)
        if error and count >= operation > 0 and name not in ("os.remove", "os.rmdir"):
            raise OSError(error, os.strerror(error), path)

    def hook(event: str, arguments: tuple) -> None:
        if event in _CALLS and isinstance(arguments[0], str | os.PathLike):
            path, reads = os.fspath(arguments[0]), event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            # Inside of a folder that is removed, names are relative to it.
            if not reads and isinstance(path, str) and (path.startswith(folder) or not path.startswith("/")):
                happens(event, path)

    fsync = os.fsync

    def synced(handle: int) -> None:
        happens("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    os.fsync = synced
    sys.addaudithook(hook)


def run(arguments: list[str], log: Path, operation: int, error: int, limit: int) -> None:
    """Run the command line in this process."""
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    watch(arguments[arguments.index("--out") + 1], log.with_suffix(".operations"), operation, error)
    sys.argv = ["gobelin", *arguments]
    runpy.run_module("gobelin", run_name="__main__")


def serve() -> None:
    """Fork a child for each line, and answer with its exit status: negative for a signal."""
    import gobelin.cli.train  # the imports that all children share
    import gobelin.training.recipes.from_scratch  # noqa: F401

    for line in sys.stdin:
        arguments, log, *how = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(arguments, Path(log), *how)
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Children:
    """The command line, whole, in a child each time."""

    def __init__(self, folder):
        self.folder, self.number = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.runs_in_children"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, operation=0, error=0, limit=0):
        """Exit status, what was printed, and the file operations."""
        self.number += 1
        log = self.folder / f"{self.number}.log"
        print(
            json.dumps([["train", *map(str, arguments)], str(log), operation, error, limit]),
            file=self.server.stdin,
            flush=True,
        )
        status = int(self.server.stdout.readline())
        return status, log.read_text(), log.with_suffix(".operations").read_text().splitlines()


if __name__ == "__main__":
    serve()
