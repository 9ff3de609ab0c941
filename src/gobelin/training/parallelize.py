"""Data parallelism put on a module from outside: DistributedDataParallel, or FSDP2's ``fully_shard``.

Stages and networks know nothing of it. In a single process a module stays what it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gobelin.clip import CLIPEncoderLayer
from gobelin.layers import ResnetBlock2D
from gobelin.training import distributed
from gobelin.unet import BasicTransformerBlock

_SHARD_UNITS = (ResnetBlock2D, BasicTransformerBlock, CLIPEncoderLayer)
"""Modules whose weights FSDP gathers together."""

Parallelism: TypeAlias = Literal["ddp", "fsdp"]


def parallelize(module: nn.Module, parallelism: Parallelism, device: torch.device) -> nn.Module:
    """Return a module whose backward pass averages gradients over the processes.

    ``ddp`` keeps all weights in every process; ``fsdp`` shards weights, gradients and optimizer states among them,
    so that each holds a part. The optimizer is made after this, of the returned module's parameters.
    """
    if not distributed.is_initialized():
        return module
    if parallelism == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        # A stage's loss reaches every weight in each step, which the trainer checks: a search for others takes time.
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for child in list(module.modules()):
        if isinstance(child, _SHARD_UNITS):
            fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if device.type == "cpu":  # gloo has no averaging all-reduce (ReduceOp.AVG): it sums, and the sums are divided
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.set_force_sum_reduction_for_comms(True)
    return module


@contextmanager
def synchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """Average gradients over the processes in the backward pass of the ``last`` micro-batch of a step alone."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        cast(FSDPModule, module).set_requires_gradient_sync(last)
    yield
