"""The queue: batches, cancellation, readers that leave, and what is kept, with a model that waits when told to."""

import asyncio
import http.client
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient
from tests.server.conftest import done, ended, paint, picture, submitted
from tests.server.test_requests import refusal

from gobelin.captioned_images import NoisedImages
from gobelin.pipeline import Pipeline
from gobelin.server.events import follow
from gobelin.server.service import Service


@contextmanager
def held(client: TestClient) -> Iterator[None]:
    """Hold the model's thread, so that jobs wait."""
    service: Service = client.app.state.service
    holds, gate = threading.Event(), threading.Event()

    def hold() -> None:
        holds.set()
        gate.wait(60)

    service.worker.call(hold)
    holds.wait(60)
    try:
        yield
    finally:
        gate.set()


def count(client: TestClient, name: str) -> float:
    return client.app.state.service.metrics.registry.get_sample_value(name) or 0.0


def levels(client: TestClient, view: dict[str, Any]) -> list[np.ndarray]:
    contents = [client.get(image["url"]).content for image in view["images"]]
    return [np.asarray(Image.open(io.BytesIO(content))).astype(int) for content in contents]


def test_jobs_that_differ_in_prompt_and_seed_are_painted_together_as_by_themselves(
    client: TestClient, small: Pipeline
) -> None:
    jobs = [
        paint("a red circle", settings={"seed": 1}, trace=True),
        paint("a longer prompt of a blue square", settings={"seed": 20, "count": 2}, trace=True),
        paint("a ring", settings={"seed": 300}, trace=True),
    ]
    others = [
        paint("a ring", settings={"seed": 300, "steps": 3}, trace=True),
        paint("a ring", settings={"seed": 300}),
        paint("a ring", settings={"seed": 300}, trace=True, controls=[{"kind": "suppress", "word": "ring"}]),
        paint("a ring", settings={"seed": 300, "negative_prompt": "red"}, trace=True),
    ]
    before = count(client, "gobelin_batch_jobs_count")
    with held(client):
        ids = [submitted(client, body) for pair in zip(jobs, others, strict=False) for body in pair]
        ids.append(submitted(client, others[3]))
    views = [ended(client, one) for one in ids]
    assert {view["state"] for view in views} == {"done"}
    assert count(client, "gobelin_batch_jobs_count") - before == 1 + len(others)
    for body, view in zip(jobs, views[::2], strict=False):
        settings = body["settings"]
        alone = small(body["prompt"], trace="sharp", **settings)
        assert [image["settings"] for image in view["images"]] == alone.settings
        for ours, theirs in zip(levels(client, view), alone.images, strict=True):
            assert np.abs(ours - np.asarray(theirs)).max() <= 1
    alone_maps = done(client, jobs[0])
    for name in ("words", "rows", "columns", "steps"):
        assert client.get(views[0]["maps"][0]).json()[name] == client.get(alone_maps["maps"][0]).json()[name]


def test_many_images_of_a_job_are_painted_in_several_batches(
    serving: Callable[..., TestClient], small: Pipeline
) -> None:
    client = serving(batch_pixels=2 * 64 * 64)
    view = done(client, paint(settings={"count": 5, "seed": 7}))
    assert (view["step"], view["steps"]) == (3 * 2, 3 * 2)
    alone = small("a red circle", steps=2, seed=7, count=5)
    assert [image["settings"]["seed"] for image in view["images"]] == [7, 8, 9, 10, 11]
    for ours, theirs in zip(levels(client, view), alone.images, strict=True):
        assert np.abs(ours - np.asarray(theirs)).max() <= 1


def test_a_full_queue_says_when_to_come_back(serving: Callable[..., TestClient]) -> None:
    client = serving(queue=2)
    with held(client):
        first, second = (submitted(client, paint(settings={"steps": steps})) for steps in (1, 2))
        assert [client.get(f"/v1/jobs/{one}").json()["position"] for one in (first, second)] == [1, 2]
        for path, body in (
            ("/v1/jobs", paint()),
            ("/v1/images/generations", {"prompt": "a ring"}),
            ("/sdapi/v1/txt2img", {"prompt": "a ring"}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert refusal(answer)["type"] == "busy"
        client.delete(f"/v1/jobs/{first}")
        assert client.get(f"/v1/jobs/{second}").json()["position"] == 1
        third = submitted(client, paint())
    assert [ended(client, one)["state"] for one in (first, second, third)] == ["cancelled", "done", "done"]


def test_waiting_images_take_a_bounded_memory(serving: Callable[..., TestClient]) -> None:
    client = serving(waiting_bytes=3000)
    with held(client):
        body = paint(settings={"init_image": picture(), "steps": 4})
        codes = [client.post("/v1/jobs", json=body).status_code for _ in range(4)]
    assert codes[0] == 202
    assert codes[-1] in (429, 503)


def test_a_cancelled_job_ends_within_a_step(client: TestClient) -> None:
    job = submitted(client, paint(settings={"steps": 150}))
    while client.get(f"/v1/jobs/{job}").json()["step"] < 3:
        time.sleep(0.001)
    client.delete(f"/v1/jobs/{job}")
    steps = count(client, "gobelin_step_seconds_count")
    waited = done(client, paint(settings={"steps": 1}))
    assert count(client, "gobelin_step_seconds_count") <= steps + 1 + 1  # the one that ran, and the other job's own
    assert (ended(client, job)["state"], waited["state"]) == ("cancelled", "done")


def test_one_of_a_batch_is_cancelled_and_the_others_go_on(client: TestClient) -> None:
    with held(client):
        jobs = [submitted(client, paint(settings={"steps": 20, "seed": seed})) for seed in range(3)]
    while client.get(f"/v1/jobs/{jobs[1]}").json()["step"] < 2:
        time.sleep(0.001)
    assert client.delete(f"/v1/jobs/{jobs[1]}").json()["state"] == "cancelled"
    assert [ended(client, one)["state"] for one in jobs] == ["done", "cancelled", "done"]


def test_a_look_is_cancelled_within_a_timestep(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    service: Service = client.app.state.service
    noised, add_noise = [], NoisedImages.at

    def at(images: NoisedImages, timestep: int) -> Any:
        noised.append(timestep)
        if len(noised) == 2:
            (job,) = service.store.running
            service.store.cancel(job)
        return add_noise(images, timestep)

    with monkeypatch.context() as patched:
        patched.setattr(NoisedImages, "at", at)
        body = {"kind": "look", "image": picture(), "caption": "a ring", "timesteps": [100, 200, 300, 400]}
        view = ended(client, submitted(client, body))
        done(client, paint(settings={"steps": 1}))
    assert (view["state"], view["images"], noised) == ("cancelled", [], [100, 200])


def test_an_edit_is_cancelled_within_a_step(client: TestClient) -> None:
    body = {"kind": "edit", "prompt": "a red circle", "to": "a blue circle", "settings": {"steps": 60}}
    job = submitted(client, body)
    while client.get(f"/v1/jobs/{job}").json()["step"] < 2:
        time.sleep(0.001)
    client.delete(f"/v1/jobs/{job}")
    assert ended(client, job)["state"] == "cancelled"
    assert done(client, paint(settings={"steps": 1}))["state"] == "done"


def test_the_model_answers_others_between_the_steps_of_a_job(client: TestClient) -> None:
    view = done(client, paint(trace=True))
    job = submitted(client, paint(settings={"steps": 150}))
    while client.get(f"/v1/jobs/{job}").json()["step"] < 2:
        time.sleep(0.001)
    assert client.post(f"/v1/jobs/{view['id']}/explain", json={}).status_code == 200
    assert client.get(f"/v1/jobs/{job}").json()["state"] == "running"
    client.delete(f"/v1/jobs/{job}")


def test_old_jobs_are_dropped_by_number_and_by_bytes(serving: Callable[..., TestClient]) -> None:
    client = serving(kept_jobs=3)
    jobs = [done(client, paint(settings={"steps": 1, "seed": seed}))["id"] for seed in range(5)]
    assert [client.get(f"/v1/jobs/{one}").status_code for one in jobs] == [404, 404, 200, 200, 200]

    client = serving(kept_bytes=60_000)
    jobs = [done(client, paint(settings={"steps": 1, "seed": seed}, trace=True))["id"] for seed in range(5)]
    statuses = [client.get(f"/v1/jobs/{one}").status_code for one in jobs]
    assert (statuses[0], statuses[-1]) == (404, 200)
    kept, size = client.app.state.service.store.kept
    assert 1 <= kept < 5
    assert kept == 1 or size <= 60_000


def test_an_error_of_the_model_fails_the_job_and_not_the_server(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise KeyError("/root/secret/path")

    with monkeypatch.context() as patched:
        patched.setattr("gobelin.server.runs.PaintRun._start", fails)
        view = ended(client, submitted(client, paint()))
    assert (view["state"], view["error"]["type"], view["images"]) == ("failed", "failed", [])
    assert "secret" not in view["error"]["message"]
    assert "secret" in capsys.readouterr().err
    assert done(client, paint())["state"] == "done"


def test_memory_is_given_back_when_nobody_waits(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    given = threading.Event()
    monkeypatch.setattr("gobelin.server.model_worker.give_back_freed_memory", given.set)
    done(client, paint())
    assert given.wait(60)


def test_health_is_503_when_the_model_does_not_paint(
    serving: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serving()
    monkeypatch.setattr("gobelin.server.info_api._HEALTH_SECONDS", 0.2)
    with held(client):
        assert client.get("/healthz").status_code == 503
    monkeypatch.setattr("gobelin.server.info_api._HEALTH_SECONDS", 60)
    assert client.get("/healthz").status_code == 200

    def fails(pipeline: Pipeline) -> None:
        raise RuntimeError("the model is broken")

    monkeypatch.setattr("gobelin.server.info_api.paint_a_step", fails)
    client.app.state.service.worker.last_step = float("-inf")
    assert client.get("/healthz").status_code == 503


def test_who_listens_slowly_gets_the_newest_step_and_holds_no_others(client: TestClient) -> None:
    service: Service = client.app.state.service
    with held(client):
        job = service.store.find(submitted(client, paint(settings={"steps": 30})))

        heard: list[tuple[str, dict[str, Any]]] = []
        begun = threading.Event()

        async def listen() -> None:
            events = follow(service.store, job)
            heard.append(await anext(events))
            begun.set()
            while not job.is_finished:
                await asyncio.sleep(0.01)
            heard.extend([event async for event in events])

        reading = threading.Thread(target=lambda: asyncio.run(listen()))
        reading.start()
        begun.wait(60)
    reading.join(60)
    assert [name for name, _ in heard] == ["queued", "started", "done"]
    assert not job.listeners


@pytest.fixture(scope="module")
def live(client: TestClient) -> Iterator[int]:
    """The port of a real server of the same app, whose worker runs already."""
    config = uvicorn.Config(client.app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    running = threading.Thread(target=server.run)
    running.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    running.join()


def listening(port: int, job: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/v1/jobs/{job}/events")
    return connection


def test_a_reader_that_leaves_is_forgotten_and_the_job_goes_on(client: TestClient, live: int) -> None:
    service: Service = client.app.state.service
    job = service.store.find(submitted(client, paint(settings={"steps": 60}, previews=True)))
    readers = [listening(live, job.id) for _ in range(10)]
    for reader in readers:
        reader.getresponse().read(10)
    assert len(job.listeners) == 10
    for reader in readers:
        reader.close()
    assert ended(client, job.id)["state"] == "done"
    assert until(lambda: not job.listeners)


def test_a_client_that_leaves_an_answer_that_it_waits_for_cancels_its_job(client: TestClient, live: int) -> None:
    service: Service = client.app.state.service
    connection = http.client.HTTPConnection("127.0.0.1", live, timeout=60)
    body = '{"prompt": "a ring", "steps": 150}'
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    assert until(lambda: any(job.caller == "openai" for job in service.store.running))
    (job,) = (job for job in service.store.running if job.caller == "openai")
    connection.close()
    assert until(lambda: job.is_finished)
    assert job.state == "cancelled"


def until(holds: Callable[[], bool]) -> bool:
    """Wait until something holds; False after a minute."""
    for _ in range(6000):
        if holds():
            return True
        time.sleep(0.01)
    return False
