"""Several processes that train one model: started by ``torchrun``, each takes its part of every batch.

In a process of its own, all of this does nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from gobelin.errors import TrainingError

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)  # the others wait while the first one writes files and paints samples


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return distributed.is_torchelastic_launched()


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Be one of the processes that ``torchrun`` started, if it did; each takes a GPU of its own.

    After an error the group is left as it stands: leaving it in order would wait for the others, and it is
    ``torchrun`` that ends them. Raises :class:`TrainingError` where there are fewer GPUs than processes.
    """
    if not launched() or distributed.is_initialized():
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"several processes train on cpu or cuda, not on {device.type}: say --device cpu")
    if device.type == "cuda":
        place = int(os.environ["LOCAL_RANK"])
        if place >= torch.cuda.device_count():
            raise TrainingError(
                f"process {place} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
                "start as many processes as GPUs"
            )
        torch.cuda.set_device(place)
    distributed.init_process_group(timeout=PATIENCE)
    yield
    distributed.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return not launched() or os.environ["RANK"] == "0"


def part() -> slice:
    """The rows of a batch that this process takes."""
    return slice(distributed.get_rank(), None, count()) if distributed.is_initialized() else slice(None)


def average_(tensors: Iterable[Tensor]) -> None:
    """Make every tensor its mean over the processes, all in one exchange."""
    if not distributed.is_initialized():
        return
    tensors = list(tensors)
    means = torch.cat([tensor.flatten() for tensor in tensors]) / count()
    distributed.all_reduce(means)
    for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gathered(rows: Tensor, total: int) -> Tensor:
    """The rows of all processes, [total, ...]: row i is from the process whose part i belongs to."""
    if not distributed.is_initialized():
        return rows
    whole = rows.new_zeros(total, *rows.shape[1:])
    whole[part()] = rows
    distributed.all_reduce(whole)
    return whole


def told(value: Value) -> Value:
    """What the first process has for ``value``; all wait for it here."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]
