"""What the tests of the server share: a small model with random weights behind the app, and a client."""

import base64
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from gobelin.images import data_url, png_bytes
from gobelin.pipeline import Pipeline
from gobelin.server import ServerLimits, ServerOptions, create_app

HOST = "http://127.0.0.1:7860"
STEPS = {"steps": 2}


@pytest.fixture(scope="session")
def small(clip_model: Callable[..., Any]) -> Pipeline:
    """A pipeline of 64 × 64 pixels with random weights."""
    return Pipeline(clip_model())


@pytest.fixture(scope="module")
def app(small: Pipeline) -> FastAPI:
    return create_app(small)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client of a running app, which is shared by the tests of a file."""
    with TestClient(app, base_url=HOST) as running:
        yield running


@pytest.fixture
def serving(small: Pipeline) -> Iterator[Callable[..., TestClient]]:
    """Make clients of apps of their own: with options, or with limits that differ from the usual."""
    opened: list[TestClient] = []

    def make(options: ServerOptions | None = None, pipeline: Pipeline | None = None, **limits: Any) -> TestClient:
        chosen = pipeline or small
        usual = ServerLimits.of(chosen.model)
        app = create_app(chosen, options, ServerLimits(**{**vars(usual), **limits}))
        running = TestClient(app, base_url=HOST)
        running.__enter__()
        opened.append(running)
        return running

    yield make
    for one in opened:
        one.__exit__(None, None, None)


def paint(prompt: str = "a red circle", **more: Any) -> dict[str, Any]:
    """A request that paints in two steps."""
    return {"kind": "paint", "prompt": prompt, "settings": {**STEPS, "seed": 3, **more.pop("settings", {})}, **more}


def submitted(client: TestClient, body: dict[str, Any]) -> str:
    """Submit a job; returns its id."""
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def ended(client: TestClient, job: str) -> dict[str, Any]:
    """Wait for a job's end; returns what it is then."""
    while True:
        view = client.get(f"/v1/jobs/{job}").json()
        if view["state"] not in ("queued", "running"):
            return view
        time.sleep(0.01)


def done(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    """Submit a job, and wait until it is done."""
    view = ended(client, submitted(client, body))
    assert view["state"] == "done", view
    return view


def picture(side: int = 64, colour: str = "red") -> str:
    """An image as a ``data:`` URL."""
    return data_url(Image.new("RGB", (side, side), colour))


def plain_picture(colour: str = "red") -> str:
    """An image in base64 alone."""
    return base64.b64encode(png_bytes(Image.new("RGB", (64, 64), colour))).decode()
