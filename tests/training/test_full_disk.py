"""A disk that is full at any write: one sentence, what was saved stands, and with room the run goes on from it."""

import errno
import os
import re

import pytest
from tests.training.test_killed_runs import check, children, go_on, toml, whole  # noqa: F401 - fixtures

COUNT = int(os.environ.get("GOBELIN_TRIALS", "40"))
"""Writes that fail in the long trial; there are some hundreds in a run."""


def is_one_sentence(status, said):
    """Status 1, and one line that says that the disk is full, after what the run tells of its progress."""
    errors = [line for line in said.splitlines() if line.startswith("gobelin: ")]
    full = "the disk is full" in said or "No space left" in said or "File too large" in said
    return status == 1 and len(errors) == 1 and full and "Traceback" not in said


def kinds(operations):
    """A number for every kind of write in the run: of each file, whatever the step, the first one."""
    first = {}
    for number, line in enumerate(operations, 1):
        name = re.sub(r"[0-9a-f]{16,}|\d+", "#", line.split(" ", 1)[1].split("/model/")[-1])
        if not name.startswith(("os.remove", "os.rmdir")):
            first.setdefault(name, number)
    return list(first.values())


def fail_at(children, toml, out, whole, **how):  # noqa: F811
    status, said, _ = children.run(toml, "--out", out, **how)
    assert is_one_sentence(status, said), (how, said[-3000:])
    if "--resume" in said:
        assert f"go on with: gobelin train --out {out} --resume" in said or "--resume goes on from it" in said, said
    go_on(children, toml, out)
    check(out, whole[0])


@pytest.mark.parametrize("place", ["checkpoints/vae/.step-00000002.tmp/manifest.json", "validation.jsonl"])
def test_a_disk_that_is_full_is_said_and_the_run_goes_on(children, toml, whole, tmp_path, place):  # noqa: F811
    operation = next(number for number, line in enumerate(whole[1], 1) if place in line)
    fail_at(children, toml, tmp_path / "model", whole, operation=operation, error=errno.ENOSPC)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write(children, toml, whole, tmp_path):  # noqa: F811
    every = kinds(whole[1])
    chosen = every[:: max(1, len(every) // COUNT)]
    for operation in chosen:
        fail_at(children, toml, tmp_path / str(operation), whole, operation=operation, error=errno.ENOSPC)
    print(f"\n{len(chosen)} full disks, of {len(every)} kinds of writes")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 1000, 3000, 10_000, 30_000, 60_000, 100_000, 200_000, 500_000, 1_000_000])
def test_files_that_cannot_be_written_to_their_ends(children, toml, whole, tmp_path, limit):  # noqa: F811
    """The system itself refuses to write beyond so many bytes, also in libraries that Python does not see."""
    fail_at(children, toml, tmp_path / "model", whole, limit=limit)
