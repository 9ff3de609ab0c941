"""Requests that do not fit: each is answered with one sentence in one shape, which names its field and no secret."""

import base64
import json
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.server.conftest import paint, picture, plain_picture, submitted

NESTED = "[" * 100_000 + "]" * 100_000

BODIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "a wrong type": (paint(settings={"steps": "many"}), "steps"),
    "a number as text": (paint(settings={"steps": "8"}), "steps"),
    "a fraction of a step": (paint(settings={"steps": 2.5}), "steps"),
    "true for a number": (paint(settings={"steps": True}), "steps"),
    "too many steps": (paint(settings={"steps": 100_000}), "steps"),
    "no steps": (paint(settings={"steps": 0}), "steps"),
    "a huge count": (paint(settings={"count": 10**9}), "count"),
    "a huge number": (paint(settings={"seed": 2**70}), "seed"),
    "seeds for other images": (paint(settings={"seed": [1, 2, 3]}), None),
    "a misspelt setting": (paint(settings={"stepz": 3}), "stepz"),
    "a setting of Python's": (paint(settings={"trace": True}), "trace"),
    "an unknown sampler": (paint(settings={"sampler": "eulr"}), None),
    "a size that is none": (paint(settings={"height": 63, "width": 64}), None),
    "too many pixels": (paint(settings={"height": 8192, "width": 8192}), None),
    "too much work": (paint(settings={"height": 512, "width": 512, "count": 16, "steps": 150}), None),
    "an empty prompt": (paint(""), "prompt"),
    "a blank prompt": (paint("   "), None),
    "a prompt of a million letters": (paint("x" * 1_000_000), "prompt"),
    "a lone surrogate": (paint("a \ud800 circle"), "prompt"),
    "a weight without end": (paint("(red:1000) circle"), None),
    "a misspelt field": (paint(promt="a ring"), "promt"),
    "no kind": ({"prompt": "a ring"}, "kind"),
    "another kind": ({**paint(), "kind": "sculpt"}, "kind"),
    "no prompt": ({"kind": "paint"}, "prompt"),
    "a list": ([], None),
    "text": ("paint", None),
    "nothing": (None, None),
    "a path for an image": (paint(settings={"init_image": "/etc/passwd"}), "init_image"),
    "an address for an image": (paint(settings={"init_image": "http://127.0.0.1:1/x.png"}), "init_image"),
    "a file's address": (paint(settings={"init_image": "file:///etc/passwd"}), "init_image"),
    "an image that is none": (paint(settings={"init_image": "data:image/png;base64,AAAA"}), "init_image"),
    "an image in no base64": (paint(settings={"init_image": "data:image/png;base64,%%%"}), "init_image"),
    "an SVG": (paint(settings={"init_image": "data:image/svg+xml;base64,AAAA"}), "init_image"),
    "an image of too many pixels": (paint(settings={"init_image": picture(5000)}), "init_image"),
    "a mask without an image": (paint(settings={"mask": picture()}), "mask"),
    "a strength without an image": (paint(settings={"strength": 0.5}), "strength"),
    "a word that is not there": (paint(controls=[{"kind": "suppress", "word": "square"}]), None),
    "a region outside": (paint(controls=[{"kind": "regions", "regions": {"red": [0, 0, 2, 1]}}]), None),
    "a region of three sides": (paint(controls=[{"kind": "regions", "regions": {"red": [0, 0, 1]}}]), None),
    "a weight below 0": (paint(controls=[{"kind": "reweight", "words": {"red": -1}}]), None),
    "an unknown control": (paint(controls=[{"kind": "hypnotise"}]), "kind"),
    "too many controls": (paint(controls=[{"kind": "suppress", "word": "red"}] * 99), "controls"),
    "a site for nothing": (paint(site="x"), None),
    "a silent site that is not named": (paint(broken="silence_site"), None),
    "a silent site that is not there": (paint(broken="silence_site", site="x"), None),
    "an edit to nothing": ({"kind": "edit", "prompt": "a red ring", "to": ""}, "to"),
    "an edit of many": ({"kind": "edit", "prompt": "a ring", "to": "a star", "settings": {"count": 2}}, None),
    "an edit of a size that is none": (
        {"kind": "edit", "prompt": "a ring", "to": "a star", "settings": {"height": 63}},
        None,
    ),
    "a look without an image": ({"kind": "look", "caption": "a ring"}, "image"),
    "a look at no timestep": ({"kind": "look", "image": picture(), "caption": "a ring", "timesteps": []}, "timesteps"),
    "a look past the end": ({"kind": "look", "image": picture(), "caption": "a", "timesteps": [1000]}, None),
}


def refusal(answer: Any) -> dict[str, Any]:
    """The error of an answer, which has to be of the one shape, one sentence, and without secrets."""
    assert 400 <= answer.status_code < 500, answer.text[:300]
    content = answer.json()
    assert content.keys() == {"error"}
    error = content["error"]
    assert error.keys() == {"message", "type", "field"}
    assert error["type"] in ("usage", "busy", "not_found", "cancelled", "failed")
    message = error["message"]
    assert message
    assert "\n" not in message
    assert len(message) <= 600
    for secret in ("Traceback", "/tmp", "/root", "site-packages", ".py", "pydantic"):
        assert secret not in message
    return error


@pytest.mark.parametrize("name", BODIES)
def test_what_does_not_fit_is_refused_in_one_sentence(client: TestClient, name: str) -> None:
    body, field = BODIES[name]
    content = json.dumps(body)
    answer = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    error = refusal(answer)
    assert error["type"] == "usage"
    assert field is None or error["field"] == field, error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"kind": "paint", "prompt": "a", "settings": {"guidance": NaN}}',
        b'{"kind": "paint", "prompt": "a", "settings": {"guidance": Infinity}}',
        b'{"kind": "paint", "prompt": "a", "settings": {"guidance": 1e999}}',
        b'{"kind": "paint", "prompt": "a", "settings": {"seed": ' + b"9" * 5000 + b"}}",
        NESTED.encode(),
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    ],
    ids=["empty", "cut", "bytes", "nan", "infinity", "overflow", "digits", "nested", "objects"],
)
def test_what_is_no_json_is_refused(client: TestClient, content: bytes) -> None:
    refusal(client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"}))


def test_misspelt_names_say_what_was_meant(client: TestClient) -> None:
    for body, meant in ((paint(settings={"stepz": 3}), "steps"), (paint(promt="a"), "prompt")):
        assert f"did you mean '{meant}'?" in refusal(client.post("/v1/jobs", json=body))["message"]


def test_other_addresses_and_methods(client: TestClient) -> None:
    assert refusal(client.get("/nothing/here"))["type"] == "not_found"
    assert client.get("/assets/..%2f..%2fsettings.py").status_code == 404
    assert client.get("/assets/__init__.py").status_code == 404
    assert client.get("/assets/word_map.js").headers["content-type"].startswith("text/javascript")
    refusal(client.put("/v1/jobs", json={}))
    refusal(client.get("/v1/jobs/../../etc/passwd"))
    refusal(client.get(f"/v1/jobs/{'a' * 500}"))
    refusal(client.get("/v1/jobs/abc/images/-1"))
    refusal(client.get("/v1/jobs/abc/images/" + "9" * 400))


def test_no_parameter_is_a_path_or_an_address(client: TestClient) -> None:
    """Every text that a request may give, given the path of a file that is there, opens nothing."""
    path = "/etc/hostname"
    for body in (
        paint(path),
        paint(settings={"negative_prompt": path}),
        paint(controls=[{"kind": "reweight", "words": {"red": 1.0}}]),
    ):
        submitted(client, body)
    for body in (
        paint(settings={"sampler": path}),
        paint(settings={"mask": path, "init_image": picture()}),
        {"kind": "look", "image": path, "caption": "a"},
    ):
        refusal(client.post("/v1/jobs", json=body))
    refusal(client.post("/v1/image-settings", json={"image": path}))
    refusal(client.post("/v1/look", json={"image": path, "caption": "a"}))
    refusal(client.post("/sdapi/v1/img2img", json={"prompt": "a", "init_images": [path]}))
    refusal(client.post("/sdapi/v1/img2img", json={"prompt": "a", "init_images": ["http://127.0.0.1:1/a.png"]}))


def broken_images() -> dict[str, bytes]:
    good = base64.b64decode(plain_picture())
    return {
        "cut off": good[: len(good) // 2],
        "header alone": good[:30],
        "wrong pixels": good[:60] + bytes(100) + good[160:],
        "not an image": b"<html>" * 50,
        "nothing": b"",
        "huge claims": good[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + good[24:],
    }


@pytest.mark.parametrize("name", broken_images())
def test_broken_images_are_refused(client: TestClient, name: str) -> None:
    url = "data:image/png;base64," + base64.b64encode(broken_images()[name]).decode()
    for path, body in (
        ("/v1/jobs", paint(settings={"init_image": url})),
        ("/v1/jobs", {"kind": "look", "image": url, "caption": "a ring"}),
        ("/v1/image-settings", {"image": url}),
    ):
        refusal(client.post(path, json=body))
