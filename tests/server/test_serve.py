"""``gobelin serve``: one line with the address, a clean end, and mistakes in one sentence."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.server.conftest import paint

from gobelin.cli import serve
from gobelin.cli.main import main
from gobelin.cli.serve_app import listen
from gobelin.errors import UsageError


@contextmanager
def running(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start ``gobelin serve`` in a process of its own; gives it and its port."""
    command = [sys.executable, "-m", "gobelin", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"Gobelin paints at http://127\.0\.0\.1:(\d+); Ctrl-C stops it\n", line)
    try:
        assert found is not None, (line, process.stderr and process.stderr.read())
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


def test_it_paints_with_the_shipped_model_and_ends_at_a_signal_while_a_job_runs(tmp_path: Path) -> None:
    """SIGINT, as from Ctrl-C; what runs is cancelled, and who follows it is told."""
    with running(tmp_path) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = json.dumps(paint("a red circle", settings={"steps": 150, "count": 4}))
        connection.request("POST", "/v1/jobs", body, {"Content-Type": "application/json"})
        job = json.loads(connection.getresponse().read())["id"]
        connection.request("GET", f"/v1/jobs/{job}/events")
        events = connection.getresponse()
        while not events.readline().startswith(b"event: step"):
            pass
        process.send_signal(signal.SIGINT)
        rest = events.read().decode()
        assert rest.replace("\r\n", "\n").rstrip().endswith("event: cancelled\ndata: {}")
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_ends_at_sigterm(tmp_path: Path) -> None:
    with running(tmp_path) as (process, _):
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run the command with arguments that are refused; gives back the status and the sentence."""

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leaving:
            main(["serve", *arguments])
        said = capsys.readouterr().err
        assert said.startswith("gobelin: ")
        assert said.count("\n") == 1
        return leaving.value.code, said.removeprefix("gobelin: ").rstrip()

    return run


def test_a_port_that_is_taken(refused) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, said = refused("--port", str(port))
        assert (status, said) == (2, f"port {port} is taken: stop what listens there, or give another by --port")


def test_an_address_for_others_without_a_token(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOBELIN_TOKEN", raising=False)
    status, said = refused("--host", "0.0.0.0")
    assert (status, "give a --token" in said) == (2, True)
    assert "16" in refused("--host", "0.0.0.0", "--token", "short")[1]
    assert "no address of this machine" in refused("--host", "203.0.113.7", "--token", "0123456789abcdef")[1]
    assert "no address of this machine" in refused("--host", "no such name", "--token", "0123456789abcdef")[1]


def test_what_is_not_installed(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    there = serve.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else there(name))
    assert refused() == (2, "uvicorn is not installed: pip install 'gobelin[server]'")


def test_other_mistakes(refused) -> None:
    assert "pip" not in refused("--port", "70000")[1]
    assert "--lora-dir" in refused("--lora-dir", "loras")[1]
    assert "queue" in refused("--queue", "0")[1]
    with pytest.raises(UsageError, match="no address"):
        listen("203.0.113.7", 0)
