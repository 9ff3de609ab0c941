"""Requests made up from the API's own description, by schemathesis: none is answered with an error of the server's."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from starlette.testclient import TestClient
from tests.server.conftest import HOST, done, paint

_FEW, _MANY = 2, 180  # requests of each operation, valid and invalid ones each


@pytest.fixture(scope="module")
def described(client: TestClient) -> Any:
    """The API as its own description has it."""
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    return schemathesis.openapi.from_dict(answer.json())


@pytest.fixture
def send(client: TestClient) -> Iterator[Callable[[Any], None]]:
    """Send a made-up request, and look at its answer; at the end, count."""
    statuses: dict[int, int] = {}
    real = done(client, paint(trace=True))["id"]

    def request(case: Any) -> None:
        if "job_id" in case.path_parameters and sum(statuses.values()) % 2 and case.method == "GET":
            case.path_parameters |= {"job_id": real, "number": 0}  # or all would be of jobs that there are not
        made = case.as_transport_kwargs(base_url=HOST)
        content = made.pop("data", None)
        made.pop("cookies", None)
        made["headers"] = {name: value for name, value in made["headers"].items() if name.lower() != "host"}
        if content is not None:
            made["content"] = content if isinstance(content, bytes | str) else str(content)
        answer = client.request(**made)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500 or (answer.status_code, case.path) == (503, "/healthz"), (case, answer.text)
        if answer.status_code >= 400:
            assert answer.json().keys() == {"error"}

    yield request
    print(f"{sum(statuses.values()):,} requests: {dict(sorted(statuses.items()))}")


def run(described: Any, send: Callable[[Any], None], count: int) -> None:
    """Send so many requests of each operation, of each kind."""
    quick = hypothesis.settings(
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    for found in described.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @quick
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def one(case: Any) -> None:
                send(case)

            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a request that has nothing in it
                one()


def test_made_up_requests_are_answered(described: Any, send: Callable[[Any], None]) -> None:
    run(described, send, _FEW)


@pytest.mark.slow
def test_thousands_of_made_up_requests_are_answered(described: Any, send: Callable[[Any], None]) -> None:
    run(described, send, _MANY)
