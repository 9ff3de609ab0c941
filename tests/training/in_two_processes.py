"""What ``torchrun`` runs in test_distributed.py: a small stage in every way, and its weights into the given folder."""

import contextlib
import sys
from pathlib import Path

import torch
from tests.training.small_stage import STEPS, Interrupted, SmallStage, fit, make_run, text_gradients

from gobelin.training import distributed

KINDS = [(optimizer, parallelism) for optimizer in ("adamw", "muon") for parallelism in ("ddp", "fsdp")]


def main(folder: Path) -> None:
    def finish(name: str, stage: SmallStage, run) -> None:
        averaged = fit(stage, run)
        if distributed.is_main_process():
            assert all(torch.equal(stage.evaluated[STEPS][key], averaged[key]) for key in averaged)
            torch.save(averaged, folder / f"{name}.pt")

    gradients = text_gradients(distributed.shard())
    if distributed.is_main_process():
        torch.save(gradients, folder / "text-gradients.pt")
    for optimizer, parallelism in KINDS:
        kind = f"{optimizer}-{parallelism}"
        finish(kind, SmallStage(optimizer), make_run(folder / kind, parallelism, sample_every=1))
        finish(f"{kind}-2", SmallStage(optimizer, accumulate=2), make_run(folder / f"{kind}-2", parallelism))
        with contextlib.suppress(Interrupted):
            fit(SmallStage(optimizer, until=2), make_run(folder / f"{kind}-resumed", parallelism))
        distributed.barrier()
        finish(f"{kind}-resumed", SmallStage(optimizer), make_run(folder / f"{kind}-resumed", parallelism))
        with contextlib.suppress(Interrupted):
            fit(SmallStage(optimizer, until=2), make_run(folder / f"{kind}-to-one", parallelism))
        distributed.barrier()
        finish(f"{kind}-from-one", SmallStage(optimizer), make_run(folder / f"{kind}-from-one", parallelism))
        other = "ddp" if parallelism == "fsdp" else "fsdp"
        with contextlib.suppress(Interrupted):
            fit(SmallStage(optimizer, until=1), make_run(folder / f"{kind}-to-{other}", parallelism))
        distributed.barrier()
        finish(f"{kind}-to-{other}", SmallStage(optimizer), make_run(folder / f"{kind}-to-{other}", other))


if __name__ == "__main__":
    with distributed.init_process_group(torch.device("cpu")):
        main(Path(sys.argv[1]))
