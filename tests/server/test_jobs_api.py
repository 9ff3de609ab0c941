"""Jobs: what the contract says of submitting, following, cancelling and fetching, against the pipeline itself."""

import base64
import dataclasses
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from tests.server.conftest import done, ended, paint, picture, submitted

from gobelin.control import Region, regional_attention, reweight, suppress
from gobelin.control.ablations import ablate
from gobelin.formats.png import read_png_settings
from gobelin.look.page import word_map_data
from gobelin.pipeline import Pipeline


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def of_pipeline(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def events_of(client: TestClient, job: str) -> list[tuple[str, dict[str, Any]]]:
    text = client.get(f"/v1/jobs/{job}/events").text
    blocks = [block for block in text.replace("\r\n", "\n").split("\n\n") if block.startswith("event: ")]
    return [
        (block.split("\n")[0].removeprefix("event: "), json.loads(block.split("\n")[1].removeprefix("data: ")))
        for block in blocks
    ]


def test_a_job_paints_what_the_pipeline_paints(client: TestClient, small: Pipeline, tmp_path) -> None:
    view = done(client, paint(settings={"count": 2, "negative_prompt": "blue", "guidance": 3}))
    result = small("a red circle", steps=2, seed=3, count=2, negative_prompt="blue", guidance=3)
    assert [image["settings"] for image in view["images"]] == result.settings
    for number, (image, expected) in enumerate(zip(view["images"], result.images, strict=True)):
        answer = client.get(image["url"])
        assert answer.headers["content-type"] == "image/png"
        assert np.array_equal(pixels(answer.content), of_pipeline(expected))
        file = tmp_path / f"{number}.png"
        file.write_bytes(answer.content)
        assert read_png_settings(file) == result.settings[number]
    assert (view["step"], view["steps"], view["error"], view["maps"]) == (2, 2, None, [])


def test_events_tell_of_every_step_and_end_with_the_job(client: TestClient) -> None:
    job = submitted(client, paint(settings={"steps": 4}, previews=True))
    events = events_of(client, job)
    names = [name for name, _ in events]
    assert names[-1] == "done"
    assert events[-1][1]["job"] == client.get(f"/v1/jobs/{job}").json()
    started = dict(events)["started"]
    assert started == {"steps": 4, "seeds": [3], "height": 64, "width": 64}
    assert names.index("started") < (names.index("step") if "step" in names else 99)
    for name, data in events:
        if name == "step":
            assert 1 <= data["step"] <= data["steps"] == 4
            assert all(one.startswith("data:image/png;base64,") for one in data["previews"])


def test_who_comes_late_gets_the_end_at_once(client: TestClient) -> None:
    view = done(client, paint())
    assert [name for name, _ in events_of(client, view["id"])] == ["started", "done"]


def test_maps_are_those_of_a_sharp_trace_with_every_step(client: TestClient, small: Pipeline) -> None:
    view = done(client, paint(settings={"steps": 4}, trace=True))
    data = client.get(view["maps"][0]).json()
    result = small("a red circle", steps=4, seed=3, trace="sharp")
    expected = json.loads(json.dumps(word_map_data(result.heatmaps[0])))
    assert data["steps"] == 1 + 4
    assert data["sharp"] is True
    assert {name: data[name] for name in ("text", "words", "rows", "columns", "image")} == {
        name: expected[name] for name in ("text", "words", "rows", "columns", "image")
    }
    shares = shares_of(data)
    np.testing.assert_allclose(shares[0], shares_of(expected)[0], atol=max(data["tops"]) / 250)


def shares_of(data: dict[str, Any]) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(data["shares"]), dtype=np.uint8)
    shape = data["steps"], len(data["words"]), data["rows"], data["columns"]
    return levels.reshape(shape) / 255 * np.array(data["tops"])[None, :, None, None]


def test_other_views_of_a_traced_image(client: TestClient) -> None:
    view = done(client, paint(settings={"steps": 3}, trace=True))
    url = f"/v1/jobs/{view['id']}"
    sheet = client.get(f"{url}/sheet/0")
    assert pixels(sheet.content).shape[0] > 64
    with Image.open(io.BytesIO(client.get(f"{url}/animation/0").content)) as animation:
        assert (animation.format, getattr(animation, "n_frames", 1) > 1) == ("WEBP", True)
    page = client.get(f"{url}/page/0")
    assert "<word-map>" in page.text
    assert "sandbox" in page.headers["content-security-policy"]


def test_what_was_not_traced_has_no_maps(client: TestClient) -> None:
    view = done(client, paint())
    for part in ("maps", "sheet", "page", "animation"):
        answer = client.get(f"/v1/jobs/{view['id']}/{part}/0")
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")


CONTROLS = {
    "reweight": ({"kind": "reweight", "words": {"red": 2.0}}, reweight({"red": 2.0})),
    "suppress": ({"kind": "suppress", "word": "circle"}, suppress("circle")),
    "regions": (
        {"kind": "regions", "regions": {"circle": [0, 0, 0.5, 1]}},
        regional_attention({"circle": Region.box(0, 0, 0.5, 1)}),
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_do_what_they_do_in_python(client: TestClient, small: Pipeline, name: str) -> None:
    body, control = CONTROLS[name]
    view = done(client, paint(controls=[body]))
    expected = small("a red circle", steps=2, seed=3, control=control)
    assert np.array_equal(pixels(client.get(view["images"][0]["url"]).content), of_pipeline(expected.images[0]))
    plain = small("a red circle", steps=2, seed=3)
    assert not np.array_equal(of_pipeline(expected.images[0]), of_pipeline(plain.images[0]))


@pytest.mark.parametrize("broken", ["shuffle_words", "remove_bos", "silence_site"])
def test_runs_are_broken_on_purpose(client: TestClient, small: Pipeline, broken: str) -> None:
    site = "mid_block.attentions.0.transformer_blocks.0.attn2" if broken == "silence_site" else None
    view = done(client, paint(broken=broken, **({} if site is None else {"site": site})))
    expected = small("a red circle", steps=2, seed=3, control=ablate(broken, site))
    assert np.array_equal(pixels(client.get(view["images"][0]["url"]).content), of_pipeline(expected.images[0]))


def test_an_edit_has_both_images_and_their_maps(client: TestClient, small: Pipeline) -> None:
    settings = {"steps": 3, "seed": 5}
    view = done(client, {"kind": "edit", "prompt": "a red circle", "to": "a blue circle", "settings": settings})
    expected = small.edit("a red circle", "a blue circle", **settings)
    for image, theirs in zip(view["images"], expected.images, strict=True):
        assert np.array_equal(pixels(client.get(image["url"]).content), of_pipeline(theirs))
    assert len(view["maps"]) == 2
    assert view["step"] == view["steps"] == 6
    assert "blue" in client.get(view["maps"][1]).json()["words"]


def test_an_image_is_painted_over_and_inpainted(client: TestClient, small: Pipeline) -> None:
    given, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    from gobelin.images import data_url

    settings = {"init_image": data_url(given), "mask": data_url(mask), "strength": 0.9, "steps": 4}
    view = done(client, paint(settings=settings))
    expected = small("a red circle", seed=3, init_image=given, mask=mask, strength=0.9, steps=4)
    painted = pixels(client.get(view["images"][0]["url"]).content)
    assert np.array_equal(painted, of_pipeline(expected.images[0]))
    assert np.array_equal(painted[:, 32:], of_pipeline(given)[:, 32:])


def test_a_look_is_a_job_or_is_answered_at_once(client: TestClient, small: Pipeline) -> None:
    body = {"image": picture(), "caption": "a red circle", "timesteps": [100, 400], "seed": 1}
    view = done(client, {"kind": "look", **body})
    assert (view["step"], view["steps"]) == (2, 2)
    data = client.get(view["maps"][0]).json()
    at_once = client.post("/v1/look", json=body).json()
    assert at_once["maps"] == data
    (heatmaps,) = small.look(Image.new("RGB", (64, 64), "red"), "a red circle", timesteps=[100, 400], seed=1)
    assert data == json.loads(json.dumps(word_map_data(heatmaps)))


def test_seeds_are_drawn_and_recorded(client: TestClient) -> None:
    body = {"kind": "paint", "prompt": "a ring", "settings": {"steps": 1}}
    first, second = (done(client, body)["images"][0]["settings"]["seed"] for _ in range(2))
    assert first != second


def test_a_prompt_that_is_cut_is_said_to_be(client: TestClient) -> None:
    assert done(client, paint())["notes"] == []


def test_info_is_enough_for_the_page(client: TestClient, small: Pipeline) -> None:
    info = client.get("/v1/info").json()
    assert (info["model"], info["size"]) == ("small", [64, 64])
    assert info["recommended"]["steps"] == small.recommended.steps
    assert "euler" in info["samplers"]
    assert {"steps", "seed", "guidance", "init_image"} <= info["settings"]["properties"].keys()
    assert not {"trace", "control", "latents"} & info["settings"]["properties"].keys()
    assert (info["words_known"], info["pointing"]) == (None, None)
    assert info["limits"]["queue"] == 64


def test_a_models_own_examples_are_offered(serving: Callable[..., TestClient], small: Pipeline) -> None:
    own = Pipeline(dataclasses.replace(small.model, examples=("a cat", "a dog")))
    assert serving(pipeline=own).get("/v1/info").json()["examples"] == ["a cat", "a dog"]


def test_settings_are_read_from_an_image(client: TestClient) -> None:
    view = done(client, paint())
    content = client.get(view["images"][0]["url"]).content
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    answer = client.post("/v1/image-settings", json={"image": url}).json()
    assert answer["prompt"] == "a red circle"
    assert (answer["settings"]["seed"], answer["source"], answer["unknown"]) == (3, "Gobelin", [])
    refused = client.post("/v1/image-settings", json={"image": picture()})
    assert refused.status_code == 422
    assert "/tmp" not in refused.text
    assert "does not say how it was made" in refused.json()["error"]["message"]


def test_health_paints_a_step_and_metrics_count(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    done(client, paint())
    text = client.get("/metrics").text
    assert 'gobelin_jobs_total{kind="paint",state="done"}' in text
    assert "process_resident_memory_bytes" in text


def test_explanation_is_the_map_of_the_step(client: TestClient, small: Pipeline) -> None:
    from gobelin.attention import Trace

    settings = {"steps": 3, "seed": 3, "guidance": 4.0}
    view = done(client, paint(settings=settings, trace=True))
    result = small("a red circle", trace=Trace(per_step=True, per_head=True), **settings)
    for site in (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.2.attentions.0.transformer_blocks.0.attn2",
    ):
        body = {"image": 0, "step": 1, "site": site, "head": 1, "x": 40, "y": 9}
        explained = client.post(f"/v1/jobs/{view['id']}/explain", json=body).json()
        found = next(one for one in result.heatmaps[0].maps if one.name == site)
        rows, columns = found.grid(8, 8)
        row, column = 9 * rows // 64, 40 * columns // 64
        assert (explained["grid"], explained["patch"]) == ([rows, columns], [row, column])
        traced = result.heatmaps[0].maps[found][1, 1, row * columns + column]
        torch.testing.assert_close(torch.tensor(explained["softmax"]), traced, atol=1e-5, rtol=1e-4)
        query, keys = torch.tensor(explained["query"]), torch.tensor(explained["keys"])
        scores = keys @ query / len(query) ** 0.5
        torch.testing.assert_close(scores, torch.tensor(explained["scores"]), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(scores.softmax(0), traced, atol=1e-5, rtol=1e-3)
        assert explained["probs"] == pytest.approx(explained["softmax"], abs=1e-5)
        assert explained["tokens"][:5] == ["<bos>", "a", "red", "circle", "<eos>"]
        assert len(explained["tokens"]) == len(explained["softmax"]) == len(explained["values_norm"]) == 77
        assert len(explained["output"]) == len(query)
        assert {one["name"] for one in explained["sites"]} == {one.name for one in small.unet.attention_sites}


def test_maps_of_one_step_site_and_head_are_the_traced_ones(client: TestClient, small: Pipeline) -> None:
    from gobelin.attention import Trace

    view = done(client, paint(settings={"steps": 3}, trace=True))
    site = "up_blocks.2.attentions.0.transformer_blocks.0.attn2"
    result = small("a red circle", steps=3, seed=3, trace=Trace(sites=site, per_step=True, per_head=True))
    heatmaps = result.heatmaps[0]
    for query, expected in (
        ({"step": 2, "site": site, "head": 1}, heatmaps.select(steps=[2], heads=[1])),
        ({"site": site}, heatmaps.select(steps=[0, 1, 2])),
    ):
        data = client.get(view["maps"][0], params=query).json()
        theirs = word_map_data(expected)
        assert data["steps"] == 1
        np.testing.assert_allclose(shares_of(data)[0], shares_of(theirs)[0], atol=max(data["tops"]) / 250)


def test_an_explanation_of_a_broken_run_has_other_probabilities(client: TestClient) -> None:
    view = done(client, paint(trace=True))
    url, body = f"/v1/jobs/{view['id']}/explain", {"image": 0, "step": 0, "x": 1, "y": 1}
    plain = client.post(url, json=body).json()
    broken = client.post(url, json={**body, "break": "remove_bos"}).json()
    assert plain["probs"][0] > 0
    assert broken["probs"][0] == 0


def test_self_attention_is_explained_too(client: TestClient) -> None:
    view = done(client, paint(trace=True))
    site = "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    explained = client.post(f"/v1/jobs/{view['id']}/explain", json={"image": 0, "step": 1, "site": site}).json()
    rows, columns = explained["grid"]
    patches = [str(patch) for patch in range(rows * columns)]
    assert (explained["kind"], len(explained["softmax"]), explained["tokens"]) == ("self", rows * columns, patches)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"step": 99}, "step"),
        ({"site": "nowhere"}, None),
        ({"head": 99}, "head"),
        ({"x": 64}, None),
        ({"image": 1}, None),
        ({"break": "everything"}, "break"),
    ],
)
def test_explanations_refuse_what_there_is_not(client: TestClient, change: dict[str, Any], field: str | None) -> None:
    view = done(client, paint(trace=True))
    answer = client.post(f"/v1/jobs/{view['id']}/explain", json={"image": 0, "step": 0, **change})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert field is None or answer.json()["error"]["field"] == field


def test_cancelled_and_unknown_jobs(client: TestClient) -> None:
    job = submitted(client, paint(settings={"steps": 100}))
    assert client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    assert ended(client, job)["images"] == []
    assert [name for name, _ in events_of(client, job)] == ["cancelled"]
    assert client.get(f"/v1/jobs/{job}/images/0").status_code == 404
    for path in ("/v1/jobs/abc", "/v1/jobs/abc/events", "/v1/jobs/abc/images/0"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")


@pytest.mark.parametrize(
    "body",
    [
        paint("!!!", trace=True),
        paint(trace=True, settings={"cache_interval": 2, "steps": 4}),
        paint(trace=True, settings={"merge_tokens": 0.5}),
        paint(trace=True, settings={"guidance": 1}),
        paint(trace=True, settings={"sampler": "heun", "steps": 3}),
        paint(trace=True, settings={"height": 40, "width": 88}),
        paint(trace=True, settings={"seed": [5, 1], "count": 2}),
        paint("a red circle " * 30, trace=True),
        paint("(red:1.4) [circle]", trace=True, settings={"weights": "comfyui"}),
    ],
    ids=lambda body: str({**body["settings"], "prompt": body["prompt"][:20]}),
)
def test_traces_go_with_every_setting(client: TestClient, body: dict[str, Any]) -> None:
    view = done(client, body)
    data = client.get(view["maps"][0]).json()
    assert data["steps"] == 1 + view["steps"]
    assert client.get(view["maps"][0], params={"step": 0, "head": 0}).status_code == 200
    assert client.post(f"/v1/jobs/{view['id']}/explain", json={"step": 1, "x": 30, "y": 30}).status_code == 200


def test_a_trace_that_would_take_too_much_memory_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/jobs", json=paint("red " * 900, trace=True, settings={"steps": 150, "count": 2}))
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "trace")
