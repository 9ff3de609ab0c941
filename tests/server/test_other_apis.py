"""Other programs' APIs: OpenAI's, by its own client, and AUTOMATIC1111's, by payloads as its clients send them."""

import base64
import io
import json
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient
from tests.server.conftest import paint, plain_picture, submitted
from tests.server.test_requests import refusal

from gobelin.pipeline import Pipeline


def decoded(image: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


@pytest.fixture
def openai_client(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url="http://127.0.0.1:7860/v1", http_client=client, max_retries=0)


def test_openais_client_paints(openai_client: openai.OpenAI, small: Pipeline) -> None:
    more = {"seed": 3, "steps": 2}
    answer = openai_client.images.generate(
        prompt="a red circle", n=2, size="64x64", response_format="b64_json", quality="standard", extra_body=more
    )
    expected = small("a red circle", seed=3, steps=2, count=2, height=64, width=64)
    assert answer.data is not None
    for ours, theirs in zip(answer.data, expected.images, strict=True):
        assert np.array_equal(decoded(ours.b64_json or ""), np.asarray(theirs))
    assert [model.id for model in openai_client.models.list()] == ["small"]


def test_openais_client_understands_refusals(openai_client: openai.OpenAI) -> None:
    for wrong in ({"size": "big"}, {"n": 99}, {"model": "dall-e-3"}, {"response_format": "url"}, {"size": "63x64"}):
        with pytest.raises(openai.UnprocessableEntityError) as raised:
            openai_client.images.generate(**{"prompt": "a ring", **wrong})
        assert raised.value.body["message"]


TXT2IMG: dict[str, Any] = {
    # as the web UI's own documentation shows it, with every field at its default
    "prompt": "a red circle",
    "negative_prompt": "blue",
    "styles": [],
    "seed": 3,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "batch_size": 2,
    "n_iter": 1,
    "steps": 2,
    "cfg_scale": 4,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": True,
    "enable_hr": False,
    "alwayson_scripts": {},
    "override_settings": {"CLIP_stop_at_last_layers": 2},
    "override_settings_restore_afterwards": True,
}


def test_txt2img_is_answered_as_the_web_ui_does(client: TestClient, small: Pipeline) -> None:
    answer = client.post("/sdapi/v1/txt2img", json=TXT2IMG)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content.keys() == {"images", "parameters", "info"}
    settings = {"steps": 2, "guidance": 4.0, "negative_prompt": "blue", "clip_skip": 1, "sampler": "euler_ancestral"}
    expected = small("a red circle", seed=3, count=2, height=64, width=64, **settings)
    for ours, theirs in zip(content["images"], expected.images, strict=True):
        assert np.array_equal(decoded(ours), np.asarray(theirs))
    info = json.loads(content["info"])
    assert (info["seed"], info["all_seeds"], info["clip_skip"]) == (3, [3, 4], 2)
    assert info["infotexts"][0].startswith("a red circle\nNegative prompt: blue\nSteps: 2, Sampler: Euler a")
    assert set(info["ignored"]) == {
        *("subseed", "seed_resize_from_h", "seed_resize_from_w", "do_not_save_samples"),
        "override_settings_restore_afterwards",
    }
    assert content["parameters"]["steps"] == 2


def test_img2img_paints_over_and_inpaints(client: TestClient, small: Pipeline) -> None:
    given = Image.new("RGB", (64, 64), "red")
    body = {"prompt": "a ring", "seed": 3, "steps": 4, "denoising_strength": 0.5, "init_images": [plain_picture()]}
    (image,) = client.post("/sdapi/v1/img2img", json=body).json()["images"]
    expected = small("a ring", seed=3, steps=4, strength=0.5, init_image=given)
    assert np.array_equal(decoded(image), np.asarray(expected.images[0]))
    (image,) = client.post("/sdapi/v1/img2img", json={**body, "mask": plain_picture("white")}).json()["images"]
    mask = Image.new("L", (64, 64), "white")
    expected = small("a ring", seed=3, steps=4, strength=0.5, init_image=given, mask=mask)
    assert np.array_equal(decoded(image), np.asarray(expected.images[0]))


@pytest.mark.parametrize(
    "change",
    [
        {"enable_hr": True},
        {"restore_faces": True},
        {"tiling": True},
        {"subseed_strength": 0.5},
        {"refiner_checkpoint": "other"},
        {"script_name": "x/y/z plot"},
        {"alwayson_scripts": {"controlnet": {}}},
        {"styles": ["painting"]},
        {"sampler_name": "Restart"},
        {"scheduler": "Exponential"},
        {"override_settings": {"sd_vae": "other"}},
        {"override_settings": {"CLIP_stop_at_last_layers": "two"}},
        {"batch_size": 4, "n_iter": 16},
        {"prompt": ""},
        {"cfg_scale": "high"},
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(client: TestClient, change: dict[str, Any]) -> None:
    refusal(client.post("/sdapi/v1/txt2img", json={**TXT2IMG, **change}))


def test_samplers_models_options_and_progress(client: TestClient) -> None:
    samplers = {one["name"]: one["aliases"] for one in client.get("/sdapi/v1/samplers").json()}
    assert samplers["Euler a"] == ["euler_ancestral"]
    assert samplers["DPM++ 2M Karras"] == ["dpmpp_2m_karras"]
    for name in ("PLMS", "LMS Karras", "dpmpp_2m_sde_karras"):
        body = {"prompt": "a ring", "steps": 2, "sampler_name": name}
        answer = client.post("/sdapi/v1/txt2img", json=body).json()
        assert json.loads(answer["info"])["sampler_name"] in (*samplers.get(name, ()), name)
    assert client.get("/sdapi/v1/sd-models").json()[0]["model_name"] == "small"
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "small"
    progress = client.get("/sdapi/v1/progress").json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0, 0)


def test_interrupt_ends_jobs_of_this_api_alone(client: TestClient) -> None:
    job = submitted(client, paint(settings={"steps": 100}))
    while client.get(f"/v1/jobs/{job}").json()["state"] == "queued":
        pass
    assert client.post("/sdapi/v1/interrupt").status_code == 200
    assert client.get(f"/v1/jobs/{job}").json()["state"] == "running"
    assert 0 <= client.get("/sdapi/v1/progress").json()["progress"] < 1
    client.delete(f"/v1/jobs/{job}")
