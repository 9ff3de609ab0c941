"""One optimizer step of a U-Net of Stable Diffusion 1.5's size: seconds and memory, all weights or a LoRA.

    python scripts/benchmarks/sd15_step.py --only lora --side 32 --json runs/benchmarks/sd15_step.json
    python scripts/benchmarks/sd15_step.py --side 64 --json runs/benchmarks/sd15_step.json         # every way
    python scripts/benchmarks/sd15_step.py --flops                                                 # no step: operations

Random weights, latents of 4×64×64 or 4×32×32 (images of 512² or 256²), batch 1. Each way is a process of its own that
takes steps by gobelin's ``fit``; the first is not counted. All weights in float32 take 16 bytes each: the weight, its
gradient and AdamW's two moments; the moving average takes 4 more, and ``fit`` always keeps one: without it is measured
what it costs. A process may allocate what is free on the machine when it begins, less a gigabyte, and where that is too
little, that is the result. Several ways at a time would take each other's memory: they come one after the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from paired import print_machine, print_table, write_results
from torch.utils.flop_counter import FlopCounterMode

from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.adapters.trainable import add_adapters_
from gobelin.bench.machine import limit_memory, machine, process_memory
from gobelin.bench.training_loops import Finished, MadeStage, NoAverage, TakingTurns, make_batch, quiet_run
from gobelin.errors import TrainingError
from gobelin.schedule import NoiseSchedule
from gobelin.training import trainer
from gobelin.training.config import OptimConfig
from gobelin.training.losses import UNetLoss
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class Way:
    """What is trained, and how."""

    lora: bool = False
    checkpointing: bool = True
    average: bool = True


WAYS = {
    "lora": Way(lora=True),
    "lora, activations kept": Way(lora=True, checkpointing=False),
    "full": Way(),
    "full, no average": Way(average=False),
    "full, activations kept": Way(checkpointing=False),
    "full, activations kept, no average": Way(checkpointing=False, average=False),
}


def main() -> None:
    """Measure each way in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--side", type=int, choices=(32, 64), default=64, help="of the latents")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flops", action="store_true", help="count the operations of a step, and take none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(WAYS[options.worker], options)))
        return
    found = machine()
    print_machine(found)
    operations = {
        f"{kind} {side}": count_operations(kind, side) for kind, side in (("tiny", 16), ("sd15", 32), ("sd15", 64))
    }
    write_results(options.json, {"machine": found, "operations": operations})
    print_table(
        "Operations of a sample, 10⁹ (a multiplication and an addition are two)",
        ("U-Net, latents", "forward", "forward and backward"),
        [(name, f"{one['forward'] / 1e9:.2f}", f"{one['step'] / 1e9:.2f}") for name, one in operations.items()],
    )
    if options.flops:
        return
    key = f"{options.side}, batch {options.batch_size}, {options.precision}, {options.threads} thread(s)"
    measured: dict[str, Any] = {}
    for name in options.only:
        measured[name] = _in_process(name, options)
        print(f"{name}: {measured[name]}", file=sys.stderr, flush=True)
        _write(options.json, key, measured)
    print_table(
        f"A step at latents of {key}",
        ("", "trained", "seconds a step (least to most)", "of CPU time, all threads", "peak MB"),
        [(name, *_row(one)) for name, one in measured.items()],
    )


def _row(one: dict[str, Any]) -> tuple[str, str, str, str]:
    if "failed" in one:
        return "–", one["failed"], "–", "–"
    seconds = one["seconds"]
    spread = f"{np.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"
    return (
        f"{one['trained'] / 1e6:.1f} M",
        spread,
        f"{np.median(one['cpu_seconds']):.1f}",
        f"{one['memory']['peak']:,.0f}",
    )


def _write(path: Path | None, key: str, measured: dict[str, Any]) -> None:
    """Add ways to those that were measured earlier at the same size."""
    if path is None:
        return
    steps = json.loads(path.read_text()).get("steps", {})
    steps[key] = steps.get(key, {}) | measured
    write_results(path, {"steps": steps})


def _in_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own; what ends it, such as want of memory, is a result."""
    command = [sys.executable, __file__, "--worker", name]
    for option in ("side", "batch_size", "precision", "steps", "rank"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"ended by {'a signal, ' if done.returncode < 0 else ''}{done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: Way, options: argparse.Namespace) -> dict[str, Any]:
    """Take steps, timing all but the first; what does not fit into the free memory says so."""
    limit = limit_memory()
    try:
        return _steps(way, options)
    except (TrainingError, RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        return {"failed": f"does not fit into the {limit / 1e9:.1f} GB that were free", "memory": process_memory()}


def _steps(way: Way, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    unet = UNet(UNetConfig.sd15())
    unet.gradient_checkpointing = way.checkpointing
    if way.lora:
        add_adapters_(unet, AdapterConfig(rank=options.rank), torch.Generator().manual_seed(0))
    times: list[tuple[float, float]] = []

    def turn() -> None:
        times.append((perf_counter(), process_time()))
        if len(times) > 1 + options.steps:
            raise Finished

    module = TakingTurns(UNetLoss(unet, None, NoiseSchedule()), turn)
    optim = OptimConfig(
        steps=10**9,
        batch_size=options.batch_size,
        learning_rate=1e-5,
        warmup_steps=0,
        precision=options.precision,
    )
    batches = [make_batch(unet.config, options.batch_size, _TOKENS, options.side) for _ in range(2)]
    stage = MadeStage(module=module, optim=optim, batches=batches)
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        average = nullcontext() if way.average else patch.object(trainer, "WeightAverage", NoAverage)
        with average, suppress(Finished):
            trainer.fit(cast(Any, stage), quiet_run(Path(folder)))
    seconds, cpu_seconds = np.diff(np.array(times), axis=0)[1:].T.tolist()
    return {"trained": trained, "seconds": seconds, "cpu_seconds": cpu_seconds, "memory": process_memory()}


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "memory" in str(error)


def count_operations(kind: str, side: int) -> dict[str, int]:
    """Count the operations of matrix products and convolutions of one sample, without computing them."""
    config, length = (UNetConfig.tiny(), 32) if kind == "tiny" else (UNetConfig.sd15(), _TOKENS)
    with torch.device("meta"):
        unet = UNet(config)
        batch = make_batch(config, 1, length, side)
    with FlopCounterMode(display=False) as counter:
        prediction = unet(batch.latents, batch.timesteps, batch.texts)
        forward = counter.get_total_flops()
        prediction.sum().backward()
    return {"forward": forward, "step": counter.get_total_flops()}


if __name__ == "__main__":
    main()
