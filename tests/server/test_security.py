"""Security: other sites' pages, other names of this address, other machines, bodies too large or too slow."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.server.conftest import paint, submitted
from tests.server.test_requests import refusal

from gobelin.errors import UsageError
from gobelin.server import ServerOptions
from gobelin.server.security import STANDALONE_CSP, Guard, check_options

OURS = "127.0.0.1:7860"
TOKEN = "0123456789abcdef"
STATE_CHANGES = [("POST", "/v1/jobs"), ("DELETE", "/v1/jobs/abc"), ("POST", "/sdapi/v1/interrupt")]
READS = [("GET", "/v1/info"), ("GET", "/healthz"), ("GET", "/")]
FOREIGN: dict[str, dict[str, str]] = {
    "another name": {"Host": "evil.example"},
    "another name with our port": {"Host": "evil.example:7860"},
    "a name that begins like ours": {"Host": "127.0.0.1.evil.example:7860"},
    "a name that ends like ours": {"Host": "evil-localhost:7860"},
    "a user in the name": {"Host": "127.0.0.1:7860@evil.example"},
    "another machine's number": {"Host": "192.168.1.5:7860"},
    "an empty name": {"Host": ""},
    "a port that is none": {"Host": "127.0.0.1:port"},
    "another site": {"Host": OURS, "Origin": "http://evil.example"},
    "the same site by https": {"Host": OURS, "Origin": "https://evil.example:7860"},
    "another port": {"Host": OURS, "Origin": "http://127.0.0.1:3000"},
    "another name of ours": {"Host": OURS, "Origin": "http://localhost:7860"},
    "no origin that can be told": {"Host": OURS, "Origin": "null"},
    "a file": {"Host": OURS, "Origin": "file://"},
    "an extension": {"Host": OURS, "Origin": "chrome-extension://abcdef"},
    "an image of another site's page": {"Host": OURS, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    "a neighbour of the site": {"Host": OURS, "Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize(("method", "path"), [*STATE_CHANGES, *READS], ids=lambda part: part)
def test_other_sites_may_not_use_it(client: TestClient, headers: dict[str, str], method: str, path: str) -> None:
    body = {"json": paint()} if path == "/v1/jobs" else {}
    assert refusal(client.request(method, path, headers=headers, **body))["type"] == "usage"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": OURS},
        {"Host": OURS, "Origin": f"http://{OURS}", "Sec-Fetch-Site": "same-origin"},
        {"Host": "localhost:7860", "Origin": "http://localhost:7860"},
        {"Host": "[::1]:7860", "Origin": "http://[::1]:7860"},
        {"Host": "localhost:9000"},  # a port that was forwarded
    ],
)
def test_our_own_page_and_programs_may(client: TestClient, headers: dict[str, str]) -> None:
    assert client.get("/v1/info", headers=headers).status_code == 200
    assert client.post("/v1/jobs", json=paint(settings={"steps": 1}), headers=headers).status_code == 202


def test_a_link_of_another_site_opens_the_page_and_nothing_else(client: TestClient) -> None:
    link = {"Host": OURS, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code in (200, 404)  # 404 while the page has no files
    assert client.get("/v1/info", headers=link).status_code == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_only_json_changes_anything(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/jobs", content=json.dumps(paint()), headers={"Content-Type": kind})
    assert answer.status_code == 415
    refusal(answer)


def test_large_bodies_are_refused_before_they_are_read(serving: Callable[..., TestClient]) -> None:
    client = serving(body=1000)
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/jobs", content=b" " * 1001, headers=headers).status_code == 413
    parts = (b" " * 100 for _ in range(100))  # of no length that is said
    answer = client.post("/v1/jobs", content=parts, headers=headers)
    assert answer.status_code == 413
    refusal(answer)


def guarded(limits: Any, receive: Callable[[], Any], headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    """Send a request to a guard by hand; returns what it sent."""
    from gobelin.server.metrics import Metrics

    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a request that is refused goes no further")

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, ServerOptions(), limits, Metrics())
    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": headers, "query_string": b""}
    asyncio.run(guard(scope, receive, send))
    return sent


def test_slow_bodies_are_not_waited_for(client: TestClient) -> None:
    from dataclasses import replace

    async def drip() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b" ", "more_body": True}

    limits = replace(client.app.state.service.limits, body_seconds=0.1)
    sent = guarded(limits, drip, [(b"host", OURS.encode()), (b"content-type", b"application/json")])
    assert sent[0]["status"] == 408


def test_two_hosts_are_one_too_many(client: TestClient) -> None:
    async def nothing() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    hosts = [(b"host", OURS.encode()), (b"host", b"evil.example")]
    assert guarded(client.app.state.service.limits, nothing, hosts)[0]["status"] == 403


def test_headers_say_that_nothing_foreign_belongs_here(client: TestClient) -> None:
    for path in ("/v1/info", "/nothing", "/assets/word_map.js"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith(
            "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"
        )
        assert "access-control-allow-origin" not in headers
    assert "sandbox allow-scripts" in STANDALONE_CSP
    assert "allow-same-origin" not in STANDALONE_CSP


def test_markup_in_a_prompt_stays_text(client: TestClient) -> None:
    from tests.server.conftest import done

    prompt = "<script>alert(1)</script> red"
    view = done(client, paint(prompt, trace=True, settings={"steps": 1}))
    assert client.get(f"/v1/jobs/{view['id']}").headers["content-type"] == "application/json"
    page = client.get(f"/v1/jobs/{view['id']}/page/0").text
    assert "<script>alert" not in page


def test_other_machines_need_a_token(serving: Callable[..., TestClient]) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(UsageError, match="give a --token"):
            check_options(ServerOptions(host=host))
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        check_options(ServerOptions(host=host))
    with pytest.raises(UsageError, match="16 ASCII characters"):
        check_options(ServerOptions(token="short"))

    client = serving(ServerOptions(host="0.0.0.0", token=TOKEN))
    asked = {"Host": "192.168.1.5:7860"}
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "gobelin_token=wrong"}, {"Authorization": TOKEN}):
        for path in ("/v1/info", "/v1/jobs/abc", "/healthz", "/metrics", "/openapi.json"):
            answer = client.get(path, headers={**asked, **wrong})
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "token")
            assert TOKEN not in answer.text
        assert client.get("/assets/word_map.js", headers={**asked, **wrong}).status_code == 200
    for right in ({"Authorization": f"Bearer {TOKEN}"}, {"Cookie": f"a=b; gobelin_token={TOKEN}"}):
        assert client.get("/v1/info", headers={**asked, **right}).status_code == 200
    named = {"Host": "evil.example", "Authorization": f"Bearer {TOKEN}"}
    assert client.get("/v1/info", headers=named).status_code == 403


def test_a_proxys_name_is_allowed_with_a_token(serving: Callable[..., TestClient]) -> None:
    with pytest.raises(UsageError, match="give a --token"):
        check_options(ServerOptions(names=("paint.example.org",)))
    client = serving(ServerOptions(names=("paint.example.org",), token=TOKEN))
    asked = {"Host": "paint.example.org", "Authorization": f"Bearer {TOKEN}"}
    assert client.get("/v1/info", headers={**asked, "Origin": "https://paint.example.org"}).status_code == 200
    assert client.get("/v1/info", headers={**asked, "Origin": "https://evil.example"}).status_code == 403
    assert client.get("/v1/info", headers={**asked, "Host": "evil.example"}).status_code == 403


def test_a_browser_signs_in_once(serving: Callable[..., TestClient]) -> None:
    client = serving(ServerOptions(host="0.0.0.0", token=TOKEN))
    wrong = client.get("/", params={"token": "wrong" * 4}, follow_redirects=False)
    assert "set-cookie" not in wrong.headers
    assert client.get("/v1/info", params={"token": TOKEN}).status_code == 401  # on the page's own address alone
    answer = client.get("/", params={"token": TOKEN}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=Strict" in answer.headers["set-cookie"]
    assert client.get("/v1/info").status_code == 200


def test_ids_cannot_be_guessed_or_listed(client: TestClient) -> None:
    ids = {submitted(client, paint(settings={"steps": 1})) for _ in range(3)}
    assert len(ids) == 3
    assert all(len(one) == 24 for one in ids)
    assert client.get("/v1/jobs").status_code == 405
