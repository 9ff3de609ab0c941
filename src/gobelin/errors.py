"""Every error that a user can meet, one small tree.

Each message is one sentence: what was expected, what came, what to do. The command line prints it without a
traceback and leaves with the error's ``exit_status``.
"""


class GobelinError(Exception):
    """The root of every error that Gobelin raises on purpose."""

    exit_status = 1

    def __str__(self) -> str:
        """Return the sentence on one line, whatever names of files and words are in it."""
        return " ".join(super().__str__().splitlines())


class UsageError(GobelinError, ValueError):
    """An argument that cannot mean anything: an unknown sampler, a size that the model cannot paint."""

    exit_status = 2


class ModelError(GobelinError):
    """A model folder or weight file that is missing, damaged, or not what its configuration says."""


class DataError(GobelinError):
    """A data set with nothing to learn from: no pairs, missing captions, unreadable images."""


class TrainingError(GobelinError):
    """A training run that cannot start, continue or go on: no checkpoint, another configuration, a NaN loss."""


class Cancelled(GobelinError):
    """A painting that was cancelled, and so has no result."""


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise an allocation that failed: PyTorch's are RuntimeErrors, those on a GPU with a class of their own."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
