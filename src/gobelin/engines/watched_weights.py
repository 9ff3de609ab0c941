"""Weights that are watched: a LoRA that is loaded, or any other change, is seen before the next pass."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WatchedWeights:
    """Watch a network's parameters: whether they are others than before, and a fingerprint of them.

    They are compared by memory and version, which costs microseconds a tensor, and where asked for by the sum of their
    bits. The tensors that were seen are held, so that no other can take their place in memory.
    """

    def __init__(self, network: nn.Module):
        self._places = [(module._parameters, name) for module in network.modules() for name in module._parameters]
        self._seen: list[tuple[Tensor, int]] = []
        self._sums: list[int] = []
        self._fingerprint: str | None = None

    def have_changed(self, read: bool = False) -> bool:
        """Tell whether any parameter is another, or was written to, since the last call; the first call says so.

        With ``read``, weights are read too: a write through ``weight.data`` is one that PyTorch keeps no count of.
        """
        now = list(self._tensors())
        sums = [sum_of_bits(tensor) for tensor in now] if read else self._sums
        same = len(now) == len(self._seen) and all(
            tensor.data_ptr() == before.data_ptr() and tensor.dtype == before.dtype and _version(tensor) == version
            for tensor, (before, version) in zip(now, self._seen, strict=True)
        )
        if same and sums == self._sums:
            return False
        self._sums = sums if read else [sum_of_bits(tensor) for tensor in now]
        self._seen = [(tensor.detach(), _version(tensor)) for tensor in now]
        self._fingerprint = None
        return True

    def fingerprint(self) -> str:
        """Compute the SHA-256 of the weights as they were last seen, once for each state."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for tensor, _ in self._seen:
                digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _tensors(self) -> Iterator[Tensor]:
        for parameters, name in self._places:
            if (tensor := parameters.get(name)) is not None:
                yield tensor


def sum_of_bits(tensor: Tensor) -> int:
    """Add up the bits of a tensor as whole numbers, as fast as memory is read: they change with nearly every write."""
    flat = tensor.detach().flatten()
    in_a_word = 8 // flat.element_size()
    words = len(flat) // in_a_word * in_a_word
    if flat.storage_offset() % in_a_word:
        flat = flat.clone()
    return int(flat[:words].view(torch.int64).sum() + flat[words:].view(torch.uint8).sum())


def _version(tensor: Tensor) -> int:
    """Count the writes to a tensor; of one that was made in inference mode nobody counts them."""
    return 0 if tensor.is_inference() else tensor._version
