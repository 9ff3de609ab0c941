"""Optimizer steps of the shipped model's U-Net: gobelin's ``fit`` beside a loop on diffusers' own network.

    python scripts/benchmarks/training_steps.py --json runs/benchmarks/training_steps.json      # all: some 25 minutes
    python scripts/benchmarks/training_steps.py --threads 1 --precision float32 --rounds 8 --only gobelin diffusers

Latents of 4×16×16, text embeddings of 32×192, batch 64; forward, backward, clipping, AdamW and the moving average of
the weights. The other loop is the step of diffusers' ``examples/text_to_image/train_text_to_image.py`` without
accelerate, in one process, on the same weights and the same ready batches; it draws no noise and encodes nothing,
as gobelin's does not here. Loops take turns in one process; printed are seconds a step, and medians and quartiles of
the ratios of neighbours in a round. Each number of threads, and each precision, is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from paired import print_machine, print_table, ratios, take_turns, write_results, written

from gobelin.bench.machine import machine
from gobelin.bench.training_contenders import TrainingLoop, TrainingPass, diffusers_loop, fit_loop
from gobelin.bench.training_loops import Loop
from gobelin.kernels.hardware import has_bfloat16

BASE, AGAIN = "gobelin", "gobelin again"
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss of two networks with the same weights


def arms(run: TrainingPass) -> dict[str, TrainingLoop]:
    """Name the loops: the two, and each with one part exchanged or left out."""

    def ours(**changes: Any) -> TrainingLoop:
        return lambda turn: fit_loop(run, run.ours(), turn, **changes)

    def theirs(**changes: Any) -> TrainingLoop:
        return lambda turn: diffusers_loop(run, run.theirs(), turn, **changes)

    return {
        BASE: ours(),
        AGAIN: ours(),
        "diffusers": theirs(),
        "diffusers' network in fit": lambda turn: fit_loop(run, run.theirs(), turn),
        "gobelin's network in diffusers' loop": lambda turn: diffusers_loop(run, run.ours(), turn),
        "diffusers, AdamW not fused (its script's default)": theirs(fused=False),
        "diffusers, average by foreach": theirs(foreach=True),
        "diffusers, no average": theirs(average=False),
        "gobelin, no average": ours(average=False),
        "gobelin, Muon (the preset's)": ours(optimizer="muon"),
        "gobelin, compiled": ours(compile=True),
        "diffusers, compiled": theirs(compiled=True),
    }


def main() -> None:
    """Measure every number of threads and precision in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="of each loop in a round")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="these loops alone, by name; gobelin is always there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    if not has_bfloat16(torch.device("cpu")):
        options.precision = [one for one in options.precision if one != "bfloat16"]
        print("this CPU does not multiply bfloat16 in hardware: float32 alone is measured")
    found = machine()
    print_machine(found)
    measured = []
    for precision in options.precision:
        for threads in options.threads:
            measured.append(_in_process(options, precision, threads))
            show(measured[-1])
            write_results(options.json, {"machine": found, "training_steps": measured})


def _in_process(options: argparse.Namespace, precision: str, threads: int) -> dict[str, Any]:
    """Measure in a process that begins with this number of threads."""
    command = [sys.executable, __file__, "--worker", "--threads", str(threads), "--precision", precision]
    command += ["--rounds", str(options.rounds), "--steps", str(options.steps)]
    command += ["--batch-size", str(options.batch_size), *(["--only", *options.only] if options.only else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let the loops take turns; raises where the two networks do not compute the same loss."""
    precision, (threads,) = options.precision[0], options.threads
    run = TrainingPass(model="tiny", side=16, batch=options.batch_size, precision=precision)
    losses = [run.first_loss(network).item() for network in (run.ours(), run.theirs())]
    if abs(losses[0] - losses[1]) > _TOLERANCE[precision] * losses[0]:
        raise SystemExit(f"the two networks differ: their losses are {losses}")
    chosen = {
        name: loop for name, loop in arms(run).items() if not options.only or name in (BASE, AGAIN, *options.only)
    }
    loops = [Loop(name, loop) for name, loop in chosen.items()]
    seconds = take_turns(loops, options.rounds, options.steps)
    return {
        "precision": precision,
        "threads": threads,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "steps": options.steps,
        "first_losses": losses,
        "seconds": seconds,
        "ratios": {name: ratios(one, seconds[BASE]) for name, one in seconds.items() if name != BASE},
    }


def show(measured: dict[str, Any]) -> None:
    """Print one table: how many times as long as gobelin's each loop takes."""
    rows = []
    for name, seconds in measured["seconds"].items():
        middle = sorted(seconds)[len(seconds) // 2]
        ratio = "1" if name == BASE else written(measured["ratios"][name])
        rows.append((name, f"{middle:.3f}", f"{1 / middle:.2f}", f"{measured['batch_size'] / middle:.0f}", ratio))
    print_table(
        f"{measured['precision']}, {measured['threads']} thread(s), batch {measured['batch_size']}, "
        f"{measured['rounds']} rounds of {measured['steps']} steps",
        ("loop", "seconds a step", "steps/s", "samples/s", "time, gobelin's = 1 (quartiles)"),
        rows,
    )


if __name__ == "__main__":
    main()
