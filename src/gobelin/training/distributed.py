"""Data-parallel training: ``torchrun`` starts the processes, each computes gradients on its shard of every batch.

In a single process every function here does nothing.
"""

import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, distributed

from gobelin.errors import TrainingError

_Value = TypeVar("_Value")
_TIMEOUT = timedelta(minutes=30)  # the main process writes checkpoints and sample grids while the others wait


def is_torchrun() -> bool:
    """Tell whether ``torchrun`` started this process."""
    return distributed.is_torchelastic_launched()


@contextmanager
def init_process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of ``torchrun``, if it started this process; on CUDA take the GPU of the local rank.

    After an error the group is not destroyed: that would wait for the other processes, and ``torchrun`` ends them.
    Raises :class:`TrainingError` if there are fewer GPUs than processes, or for a device other than cpu and cuda.
    """
    if not is_torchrun() or distributed.is_initialized():
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"several processes train on cpu or cuda, not on {device.type}: say --device cpu")
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
                "start as many processes as GPUs"
            )
        torch.cuda.set_device(local_rank)
    distributed.init_process_group(timeout=_TIMEOUT)
    yield
    distributed.destroy_process_group()


def world_size() -> int:
    """Count the processes of the group; 1 without one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main_process() -> bool:
    """Tell whether this is rank 0, the process that writes files and prints."""
    return not is_torchrun() or os.environ["RANK"] == "0"


def rank() -> int:
    """Return this process's number among those of the group; 0 without one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_initialized() -> bool:
    """Tell whether this process is one of a group."""
    return distributed.is_initialized()


def barrier() -> None:
    """Wait until every process of the group is here."""
    if distributed.is_initialized():
        distributed.barrier()


def peak_memory() -> int:
    """Return the most bytes that this process has had: on a GPU if it has one, else resident in main memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shard() -> slice:
    """Select this process's rows of a batch: every ``world_size()``-th, from its rank on."""
    return slice(distributed.get_rank(), None, world_size()) if distributed.is_initialized() else slice(None)


def all_reduce_mean_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its mean over the processes, in one all-reduce."""
    if not distributed.is_initialized():
        return
    tensors = list(tensors)
    means = torch.cat([tensor.flatten() for tensor in tensors]) / world_size()
    distributed.all_reduce(means)
    for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def all_gather_rows(rows: Shaped[Tensor, "shard ..."], total: int) -> Shaped[Tensor, "rows ..."]:
    """Gather all shards into one tensor of ``total`` rows, in their order before :func:`shard`."""
    if not distributed.is_initialized():
        return rows
    gathered = rows.new_zeros(total, *rows.shape[1:])
    gathered[shard()] = rows
    distributed.all_reduce(gathered)
    return gathered


def broadcast(value: _Value) -> _Value:
    """Return the main process's ``value`` in every process; also a barrier."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]
