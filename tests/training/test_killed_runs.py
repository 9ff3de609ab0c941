"""Killed at any moment, a run goes on to the same files: SIGKILL between all operations of a save, and at random."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.training.runs_in_children import Children

from gobelin.cli.train import config_to_toml
from gobelin.training.config import DataConfig

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
COUNT = int(os.environ.get("GOBELIN_TRIALS", "32"))
"""Kills at random moments in the long trial."""


@pytest.fixture(scope="module")
def toml(micro, tmp_path_factory):
    config = micro(steps=3, save_every=1, sample_every=9, samples=1, data=DataConfig(count=8, validation=4))
    file = tmp_path_factory.mktemp("config") / "micro.toml"
    text = config_to_toml(config).replace("batch_size = 8", "batch_size = 2").replace("layers = 2", "layers = 1")
    file.write_text(text.replace("steps = 2\n", "steps = 1\n"))
    return file


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    made = Children(tmp_path_factory.mktemp("children"))
    yield made
    made.server.stdin.close()
    made.server.wait()


@pytest.fixture(scope="module")
def whole(children, toml, tmp_path_factory):
    """The run that nobody interrupts: its folder and its file operations."""
    out = tmp_path_factory.mktemp("whole") / "model"
    status, said, operations = children.run(toml, "--out", out)
    assert status == 0, said
    return out, operations


def hashes(out):
    """SHA-256 of every file of weights."""
    return {
        file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*.safetensors"))
    }


def records(out, name):
    """The lines of a file of records, without the times in them."""
    lines = [json.loads(line) for line in (out / "training" / name).read_text().splitlines()]
    return [(line["stage"], line.get("split"), line["step"]) for line in lines]


def check(out, whole):
    """The same weights, each record once, and nothing left over."""
    assert hashes(out) == hashes(whole)
    for name in ("metrics.jsonl", "validation.jsonl", "attention.jsonl"):
        assert sorted(records(out, name), key=repr) == sorted(records(whole, name), key=repr), name
    files = [sorted(file.relative_to(one).as_posix() for file in one.rglob("*")) for one in (out, whole)]
    assert files[0] == files[1]
    assert (out / "training" / "validation.jsonl").read_text() == (whole / "training" / "validation.jsonl").read_text()


def go_on(children, toml, out):
    """What a user does: --resume where there is something to resume, else the same command again."""
    begun = (out / "training" / "config.json").exists()
    status, said, _ = children.run(*(["--resume"] if begun else [toml]), "--out", out)
    assert status == 0, said


def of_a_save(operations):
    """Numbers of the operations of the U-Net's last save, which removes an older one, and of the one after it."""
    begin = next(
        at for at, line in enumerate(operations, 1) if "os.mkdir" in line and "unet/.step-00000003.tmp" in line
    )
    end = next(at for at, line in enumerate(operations, 1) if at > begin and "os.rmdir" in line)
    return list(range(begin, end + 2))


def kill_at(children, toml, out, operation, whole):
    status, _, _ = children.run(toml, "--out", out, operation=operation)
    assert status == -signal.SIGKILL
    go_on(children, toml, out)
    check(out, whole)


def test_killed_inside_of_a_save_a_run_ends_with_the_same_weights(children, toml, whole, tmp_path):
    places = of_a_save(whole[1])
    kill_at(children, toml, tmp_path / "model", places[len(places) // 2], whole[0])


def test_killed_between_a_checkpoint_and_its_evaluation_a_run_is_evaluated_once(children, toml, whole, tmp_path):
    evaluation = next(
        at for at, line in enumerate(whole[1], 1) if "validation.jsonl" in line and at > of_a_save(whole[1])[0]
    )
    kill_at(children, toml, tmp_path / "model", evaluation + 1, whole[0])


@pytest.mark.slow
def test_killed_at_every_operation_of_a_save(children, toml, whole, tmp_path):
    places = of_a_save(whole[1])
    for operation in places:
        kill_at(children, toml, tmp_path / str(operation), operation, whole[0])
    print(f"\n{len(places)} kills, one at each file operation of a save")


@pytest.mark.slow
def test_killed_at_any_operation_of_a_run(children, toml, whole, tmp_path):
    chosen = random.Random(0)
    for number in range(COUNT // 2):
        kill_at(children, toml, tmp_path / str(number), chosen.randrange(1, len(whole[1]) + 1), whole[0])
    print(f"\n{COUNT // 2} kills at file operations of a run of {len(whole[1])}")


@pytest.mark.slow
def test_killed_at_random_moments(children, toml, whole, tmp_path):
    """Through ``python -m gobelin``; some runs are killed more than once."""
    chosen, kills = random.Random(1), 0
    began = time.perf_counter()
    reference = tmp_path / "reference"
    subprocess.run([sys.executable, "-m", "gobelin", "train", toml, "--out", reference], env=ENVIRONMENT, check=True)
    length = time.perf_counter() - began
    assert hashes(reference) == hashes(whole[0])
    number = 0
    while kills < COUNT:
        out, number = tmp_path / str(number), number + 1
        for _ in range(3):
            begun = (out / "training" / "config.json").exists()
            how = ["--resume"] if begun else [toml]
            run = subprocess.Popen(
                [sys.executable, "-m", "gobelin", "train", *how, "--out", out], env=ENVIRONMENT, stderr=subprocess.PIPE
            )
            try:
                run.wait(length * chosen.uniform(0.3, 1.0))
                break
            except subprocess.TimeoutExpired:
                run.kill()
                run.wait()
                kills += 1
        go_on(children, toml, out)
        check(out, whole[0])
    print(f"\n{kills} kills at random moments in {number} runs of {length:.1f} s")
