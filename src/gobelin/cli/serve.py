"""``gobelin serve``: the page and the HTTP API."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from annotated_types import Interval

from gobelin.cli.options import Positional, parse
from gobelin.cli.painting_options import PipelineOptions
from gobelin.errors import UsageError
from gobelin.validation import Count

_NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class Serve(PipelineOptions):
    """Open the page, and an HTTP API: paint, edit and look inside, in a browser or from any program.

    It is for this machine alone unless --host and --token say otherwise. Beside an API of its own it has OpenAI's
    /v1/images/generations and AUTOMATIC1111's /sdapi/v1. Needs pip install 'gobelin[server]'.

    Some examples:
      gobelin serve
      gobelin serve path/to/a/diffusers/folder --port 8000
      gobelin serve model.safetensors --lora style.safetensors:0.7
      gobelin serve --host 0.0.0.0 --token "$(openssl rand -hex 16)"
    """

    model: Positional[str | None] = None
    """Diffusers folder, .safetensors or .ckpt file, Hub name, or a model that comes with Gobelin: tiny, the one without
    it, or emoji."""
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines can reach needs a token."""
    name: tuple[str, ...] = ()
    """Names by which a proxy before it is reached, such as paint.example.org; needs a token."""
    port: Annotated[int, Interval(ge=0, le=65535)] = 7860
    """Port to listen at; 0 takes any that is free."""
    token: str | None = None
    """Token that every request has to give; without it, the environment variable GOBELIN_TOKEN, or none."""
    queue: Count = 64
    """Jobs that may wait; more are told when to come back."""


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = parse(Serve, "serve", arguments)
    if options.lora_dir is not None:
        raise UsageError(
            "the LoRAs of one prompt would change the model for everybody: load them by --lora, without --lora-dir"
        )
    missing = [name.replace("_", "-") for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} is not installed: pip install 'gobelin[server]'")
    from gobelin.cli.serve_app import serve  # PyTorch is imported after the options are read: mistakes are quick

    serve(options)
