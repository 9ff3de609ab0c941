"""Data-parallel training: ``torchrun`` starts the processes, each computes gradients on its shard of every batch.

In a single process every function here does nothing. The process that fails first says why, and the others end without
a word; ``torchrun --max-restarts 1`` starts them again, and the run that they began goes on from its newest checkpoint.
"""

import itertools
import os
import resource
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gobelin.errors import TrainingError

_Value = TypeVar("_Value")
_TIMEOUT = timedelta(minutes=30)  # of what all processes compute together
_WAIT = timedelta(days=7)  # for the main process, which may look at millions of images first, or paint a prior
_STARTED = itertools.count()  # the process groups of this process, in which all processes agree


def is_torchrun() -> bool:
    """Tell whether ``torchrun`` started this process."""
    return distributed.is_torchelastic_launched()


@contextmanager
def init_process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of ``torchrun``, if it started this process; on CUDA take the GPU of the local rank.

    After an error the group is not destroyed: that would wait for the other processes, and ``torchrun`` ends them.
    Raises :class:`TrainingError` if there are fewer GPUs than processes, for a device other than cpu and cuda, and
    where another process is gone. Only the first process to fail raises; the others exit (SystemExit).
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
    store, number, count = next(rendezvous("env://", timeout=_TIMEOUT))
    store = PrefixStore(f"group-{next(_STARTED)}", store)  # a store outlives a group, and with it what was in it
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # machines count their restarts apart
        # The store outlives a restart, and with it the addresses of the processes that were there before.
        store = PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(store=store, rank=number, world_size=count, timeout=_TIMEOUT)
    _waiting_group(distributed.group.WORLD)  # now, as all processes have to make it at the same time
    try:
        yield
    except (Exception, CheckpointException, KeyboardInterrupt) as error:
        if not _is_first_to_fail(store):
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
        if is_disconnected(error):
            raise TrainingError(
                f"process {number} lost the others, one of which was killed or is not reached any more: "
                "--resume goes on from the newest checkpoint"
            ) from error
        raise
    # A thread of gloo that lets go of its last tensor while the interpreter ends aborts the process ("terminate called
    # without an active exception"). Groups that nothing holds end their threads; FSDP's caches hold theirs, so a
    # barrier, which has no tensors and waits without Python's lock, lets go of the tensors before.
    distributed.barrier()
    _waiting_group.cache_clear()
    distributed.destroy_process_group()


def _is_first_to_fail(store: Store) -> bool:
    """Tell whether no other process has failed before; ``torchrun`` itself holds the store."""
    try:
        return store.add("gobelin/failed", 1) == 1
    except RuntimeError:  # torchrun is gone
        return is_main_process()


def is_disconnected(error: BaseException) -> bool:
    """Recognise the error of a process whose peer is gone: gloo's has no class of its own."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def launch() -> str:
    """Name the ``torchrun`` that started this process, by its own name and process: the same after a restart."""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()}" if is_torchrun() else ""


def command(arguments: Sequence[str]) -> str:
    """Write the shell's command of ``gobelin`` with these arguments, started as this process was."""
    if not is_torchrun():
        return shlex.join(["gobelin", *arguments])
    count = os.environ["LOCAL_WORLD_SIZE"]
    nodes = [] if count == os.environ["WORLD_SIZE"] else ["--nnodes", os.environ["GROUP_WORLD_SIZE"]]
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", count, "-m", "gobelin", *arguments])


def is_restarted() -> bool:
    """Tell whether ``torchrun`` started its processes again, after one had failed (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


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


def wait_for_main() -> None:
    """Wait until every process is here, of which the main one may be late by days."""
    if distributed.is_initialized():
        distributed.barrier(_waiting_group(distributed.group.WORLD))


@lru_cache(maxsize=1)
def _waiting_group(world: ProcessGroup) -> ProcessGroup:
    """Make the group of all processes whose barriers are waited at for as long as it takes."""
    return cast(ProcessGroup, distributed.new_group(backend="gloo", timeout=_WAIT))


def any_process(flag: bool, device: torch.device) -> bool:
    """Tell every process whether ``flag`` is set in any; also a barrier."""
    if not distributed.is_initialized():
        return flag
    asked = torch.tensor(float(flag), device=device)
    distributed.all_reduce(asked)
    return bool(asked)


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


def concat_rows(rows: Float[Tensor, "shard width"]) -> Float[Tensor, "rows width"]:
    """Concatenate the rows of all processes, of which each may have another number, with gradients, in float32.

    Every process computes the whole loss of them, and so the backward pass adds up as many gradients as there are
    processes: what a mean over the processes, as DDP takes it, divides by again.
    """
    if not distributed.is_initialized():
        return rows
    counts = all_gather_rows(torch.tensor([len(rows)], device=rows.device), world_size()).tolist()
    return _ConcatRows.apply(rows.float(), counts) if any(counts) else rows.float()


class _ConcatRows(torch.autograd.Function):
    """``all_gather`` of rows; its gradient is the sum over the processes of the gradients of their copies."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.split(ctx.counts)[distributed.get_rank()], None


def broadcast(value: _Value) -> _Value:
    """Return the main process's ``value`` in every process; also a barrier."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]
