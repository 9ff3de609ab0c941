"""Checkpoints of a training run: ``torch.distributed.checkpoint`` in safetensors, whole and with checksums.

Every process writes its shards, and any number of processes, sharded or not, reads them again. A checkpoint takes its
name when all of it is on disk; older ones are removed after that. Nothing in it is a pickle.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from gobelin.errors import TrainingError
from gobelin.formats.files import sync_folder
from gobelin.training import distributed

MANIFEST = "manifest.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files
KEPT = 2
"""Checkpoints that are kept: where the newest is damaged, the one before it stands."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Tensor]) -> None:
    """Write ``folder/step-N`` by way of a temporary folder, then remove all but the last two; all processes call it.

    Raises :class:`TrainingError` if it cannot be written, for instance to a full disk; the previous one then stands.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        if distributed.is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with _quiet():
            state_dict_saver.save(dict(state), storage_writer=writer, no_dist=not distributed.is_initialized())
        distributed.barrier()
        if distributed.is_main_process():
            _write_manifest(temporary, step)
        if distributed.is_main_process():
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            sync_folder(folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        if distributed.is_disconnected(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        before = newest_step(folder)
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {folder} ({_reason(error)}): "
            + (f"that of step {before} stands, --resume goes on from it" if before else "there is none before it")
        ) from error
    if distributed.is_main_process():
        for older in _checkpoints(folder)[:-KEPT]:
            shutil.rmtree(older, ignore_errors=True)
    distributed.barrier()


def load_checkpoint(folder: Path, state: dict[str, Tensor]) -> int:
    """Read the newest checkpoint into the tensors of ``state``, in place; returns its step, 0 if there is none.

    Raises :class:`TrainingError` for files that are not those that were written, or not of this stage.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    try:
        manifest = json.loads((newest / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if _sha256(newest / name) != expected:
                raise ValueError(f"{name} is not the file that was written")
        with _quiet():
            reader = HuggingFaceStorageReader(str(newest))
            state_dict_loader.load(state, storage_reader=reader, no_dist=not distributed.is_initialized())
    except (Exception, CheckpointException) as error:  # the parsers of JSON and safetensors raise what they meet
        after = f"from step {_step(checkpoints[-2])}" if len(checkpoints) > 1 else "from the beginning of the stage"
        raise TrainingError(f"the checkpoint {newest} is damaged: remove its folder to go on {after}") from error
    return manifest["step"]


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    return max((_step(one) for one in _checkpoints(folder)), default=0)


def _write_manifest(folder: Path, step: int) -> None:
    """Flush every file to disk (fsync), and record its SHA-256."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = _sha256(path)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"step": step, "files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quiet() -> warnings.catch_warnings:
    """Silence torch's remark that a single process saves alone."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def is_disk_full(error: BaseException) -> bool:
    """Recognise an error of writing for want of room: of the system, or of safetensors, which names it in its text."""
    said = str(error)
    return getattr(error, "errno", None) in _NO_ROOM or any(os.strerror(number) in said for number in _NO_ROOM)


def _reason(error: BaseException) -> str:
    """Say in a line why a file could not be written; the checkpoint's own exception holds those of all processes."""
    causes = (
        [one for failure in error.failures.values() for one in failure[:1]]
        if isinstance(error, CheckpointException)
        else [error]
    )
    cause = causes[0] if causes else error
    return "the disk is full" if is_disk_full(cause) else (str(cause).splitlines() or [type(cause).__name__])[0]
