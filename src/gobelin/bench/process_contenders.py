"""Contenders that are processes of their own: start-up, peak memory, and several processes at a time."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch

from gobelin.bench.picture_contenders import random_pipeline
from gobelin.bench.unet_contenders import BASE
from gobelin.bench.workload import BenchPrecision, Call, Contender, Workload
from gobelin.pipeline import shipped_model

IMPORT_TORCH = "import torch"

_START = {
    BASE: "import gobelin; gobelin.Pipeline.from_pretrained(device='cpu')('a red circle', steps=1, seed=0)",
    "diffusers": (
        "import sys; from diffusers import StableDiffusionPipeline as P; p = P.from_pretrained(sys.argv[1]); "
        "p.set_progress_bar_config(disable=True); p('a red circle', num_inference_steps=1)"
    ),
}
_PEAK = "from gobelin.bench.machine import process_memory; print(process_memory()['peak'])"
_INPUTS = (
    "x = torch.randn(1, 4, {side}, {side}, dtype=d); t = torch.tensor([500.0]); c = torch.randn(1, 77, 768, dtype=d)"
)
_FORWARD = {
    BASE: (
        "import sys, torch; from gobelin.unet import UNet; d = torch.{precision}; {inputs}; "
        "u = UNet.from_pretrained(sys.argv[1], d)\nwith torch.no_grad(): u(x, t, c)\n{peak}"
    ),
    "diffusers": (
        "import sys, torch; from diffusers import UNet2DConditionModel; d = torch.{precision}; {inputs}; "
        "u = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=d)\n"
        "with torch.no_grad(): u(x, t, c)\n{peak}"
    ),
}
_TORCH = "import torch\n{peak}"
_NO_MEMORY = ("Cannot allocate memory", "MemoryError", "bad_alloc")  # the system's word, Python's and C++'s


def start_workload(precision: BenchPrecision) -> Workload:
    """Make the workload of a fresh process that paints one step with the model that ships."""
    folder = str(shipped_model())
    return Workload(
        contenders=[
            Contender(name=BASE, prepare=partial(_process, _START[BASE], folder), against=IMPORT_TORCH),
            Contender(name=IMPORT_TORCH, prepare=partial(_process, IMPORT_TORCH, folder)),
            Contender(
                name="diffusers",
                peer="diffusers",
                prepare=partial(_process, _START["diffusers"], folder),
                against=IMPORT_TORCH,
            ),
        ],
    )


def memory_workload(side: int, precision: BenchPrecision) -> Workload:
    """Make the workload of opening a U-Net of Stable Diffusion 1.5's size from a file, and one forward pass."""
    inputs = _INPUTS.format(side=side)
    code = {name: text.format(precision=precision, inputs=inputs, peak=_PEAK) for name, text in _FORWARD.items()}
    return Workload(
        contenders=[
            Contender(name=BASE, prepare=partial(_peak, code[BASE], precision)),
            Contender(name="diffusers", peer="diffusers", prepare=partial(_peak, code["diffusers"], precision)),
            Contender(name=IMPORT_TORCH, prepare=partial(_peak, _TORCH.format(peak=_PEAK), precision)),
        ],
        unit="MB",
        is_timed=False,
    )


@cache
def _weights(precision: BenchPrecision) -> tempfile.TemporaryDirectory:
    """Write a U-Net of random weights into a folder that is there as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="gobelin-bench-")
    random_pipeline(getattr(torch, precision)).unet.save_pretrained(Path(folder.name))
    return folder


@cache
def _bytecode() -> tempfile.TemporaryDirectory:
    """Make the folder for the bytecode of all contenders, which is there as long as this process."""
    return tempfile.TemporaryDirectory(prefix="gobelin-bench-")


def _process(code: str, *arguments: str) -> Call:
    """Make a call that runs Python code in a fresh process, with this number of threads."""

    def call() -> None:
        run_python(code, arguments)

    return call


def _peak(code: str, precision: BenchPrecision) -> Call:
    """Make a call that returns the peak memory, in MB, that a fresh process prints."""
    folder = _weights(precision).name
    return lambda: float(run_python(code, [folder]).split()[-1])


def run_python(code: str, arguments: Sequence[str]) -> str:
    """Run Python code in a fresh process with as many threads as this one; returns what it prints.

    Raises :class:`RuntimeError` with the end of what it said, or that memory was short.
    """
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=_environment())
    if done.returncode == -signal.SIGKILL or any(one in done.stderr for one in _NO_MEMORY):
        raise RuntimeError("this machine has not enough free memory for it")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"its process ended with {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Make the environment of a process: as many threads as this one, and bytecode of all that it imports."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    # Where Python is told to keep no bytecode, programs that were installed with theirs would start sooner than others.
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": _bytecode().name}
    return {**os.environ, **threads, **kept}


_LOOP = """
import json, sys, torch
from gobelin.bench.unet_contenders import unet_workload
torch.set_num_threads(1)
wanted, sizes = json.loads(sys.argv[1])
workload = unet_workload(**sizes)
call = next(one for one in workload.contenders if one.name == wanted).prepare()
call()
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        call()
    print("done", flush=True)
"""


def several_processes(
    name: str, count: int, calls: int, model: str, side: int, batch: int, precision: BenchPrecision
) -> Call:
    """Start processes of one thread each, that wait; a call lets all compute some forward passes at a time."""
    sizes = {"model": model, "side": side, "batch": batch, "precision": precision}
    command = [sys.executable, "-c", _LOOP, json.dumps([name, sizes])]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread)
        for _ in range(count)
    ]

    def answers(expected: str) -> None:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != expected:
                raise RuntimeError("a process ended before its turn")

    def call() -> None:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{calls}\n")
            process.stdin.flush()
        answers("done")

    answers("ready")
    return call
