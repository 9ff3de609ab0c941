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

Value = TypeVar("Value")
PATIENCE = timedelta(days=1)  # the others wait while the first one trains what is not shared


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that ``torchrun`` started, if it did."""
    if not distributed.is_torchelastic_launched() or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return os.environ.get("RANK", "0") == "0"


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
