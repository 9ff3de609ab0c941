"""``gobelin verify``: audit a model, and compare it with another."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gobelin.cli.options import Positional, parse, write_report
from gobelin.cli.painting_options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class Verify(ModelOptions):
    """Check a model: keys, shapes, numbers, schedule, and that it comes back identical after it is written.

    Stops with one sentence at a key that is missing, left over, of another shape, or holds NaN. The exit status is 1 if
    the model is not sound.

    Some examples:
      gobelin verify model.safetensors
      gobelin verify folder --against other-folder
      gobelin verify folder --json report.json
    """

    model: Positional[str]
    """A diffusers folder, a .safetensors or .ckpt file, or a Hub name."""
    against: str | None = None
    """Another model: print the largest difference of every block's output on the same input."""
    no_round_trip: bool = False
    """Do not write the model to a temporary folder and read it again."""
    json: Path | None = None
    """Write the whole report to this file."""


def run(arguments: Sequence[str]) -> None:
    """Run ``gobelin verify``."""
    options = parse(Verify, "verify", arguments)
    import torch  # PyTorch is imported after the options are read: help and mistakes are quick
    from rich.console import Console

    from gobelin.checkpoint import open_model
    from gobelin.checkpoint.audit import audit_model, compare_models

    console, cpu = Console(), torch.device("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = open_model(options.model, cpu, None, **options.files())
    audit = audit_model(model, [str(one.message) for one in caught], round_trips=not options.no_round_trip)
    report = audit.json()
    console.print(audit.table())
    for line in audit.summary():
        console.print(line, markup=False)
    if options.against is not None:
        # Other options say how to read the first model, and need not fit the second.
        other = {"allow_pickle": options.allow_pickle, "tokenizer": options.tokenizer}
        comparison = compare_models(model, open_model(options.against, cpu, None, **other))
        report["differences"] = comparison.differences
        console.print(comparison.table())
    write_report(options.json, report)
    if not audit.sound:
        sys.exit(1)
