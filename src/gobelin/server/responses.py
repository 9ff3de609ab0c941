"""Responses: JSON in ASCII, and every error in one shape."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gobelin.errors import GobelinError, UsageError
from gobelin.server.jobs import BusyError, NotFoundError
from gobelin.server.model_worker import error_of
from gobelin.server.schemas import ErrorBody
from gobelin.settings import EditSettings
from gobelin.validation import field_docs, nearest, shown

_STATUS_TYPES = {404: "not_found", 429: "busy", 503: "busy"}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "No JSON"},
    404: {"model": ErrorBody, "description": "No such job, image or file"},
    422: {"model": ErrorBody, "description": "A field that does not fit"},
    429: {"model": ErrorBody, "description": "The queue is full: Retry-After says when to come back"},
    500: {"model": ErrorBody, "description": "The server failed"},
    503: {"model": ErrorBody, "description": "The server is stopping"},
}
"""Errors that a route may answer with, for its documentation."""


class AsciiJsonResponse(JSONResponse):
    """JSON whose every character is ASCII, so that any text that came in can go out."""

    def render(self, content: Any) -> bytes:
        """Encode the content."""
        return to_json(content).encode("ascii")


def to_json(content: Any) -> str:
    """Write JSON on one line, in ASCII."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def error_response(
    status: int, message: str, kind: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> AsciiJsonResponse:
    """Make the response of an error."""
    content = {"error": {"message": message, "type": kind, "field": field}}
    return AsciiJsonResponse(content, status, headers=headers)


def handle_errors(app: FastAPI) -> None:
    """Have every error answered in one shape, and none with a traceback or a path."""

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: Exception) -> AsciiJsonResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, "the body is not valid JSON: send an object", "usage")
        sentence, field = _sentence_of(first)
        return error_response(422, sentence, "usage", field)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: Exception) -> AsciiJsonResponse:
        assert isinstance(error, HTTPException)
        messages = {
            400: "the body cannot be read: send JSON",
            404: "there is nothing at this address: /openapi.json lists what there is",
            405: "this address does not take that method: /openapi.json lists what it takes",
        }
        kind = _STATUS_TYPES.get(error.status_code, "usage")
        message = messages.get(error.status_code, "the request cannot be answered")
        return error_response(error.status_code, message, kind, headers=error.headers)

    @app.exception_handler(GobelinError)
    async def _ours(request: Request, error: Exception) -> AsciiJsonResponse:
        return respond_to(error)

    @app.exception_handler(Exception)
    async def _others(request: Request, error: Exception) -> AsciiJsonResponse:
        return respond_to(error)


def respond_to(error: Exception) -> AsciiJsonResponse:
    """Make the response of an error that was raised."""
    if isinstance(error, BusyError):
        return error_response(429, str(error), "busy", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, NotFoundError):
        return error_response(404, str(error), "not_found")
    content = error_of(error, field_of(error))
    status = 422 if isinstance(error, GobelinError) else 500
    return error_response(status, content["message"], "usage" if status == 422 else "failed", content["field"])


def field_of(error: BaseException) -> str | None:
    """Find the setting that a sentence of ours begins with."""
    first = str(error).split(" ", 1)[0].strip("'\"")
    return first if isinstance(error, UsageError) and first in _field_names() else None


def _field_names() -> set[str]:
    return {*field_docs(EditSettings), "caption", "timesteps", "site", "step", "head", "image", "trace"}


def _sentence_of(found: Mapping[str, Any]) -> tuple[str, str | None]:
    """Write pydantic's error as one sentence, with the name of the field."""
    place = [str(part) for part in found["loc"] if part not in ("body", "query", "path")]
    names = [part for part in place if not part.isdecimal() and part not in _TAGS]
    field = names[-1] if names else None
    kind, context = found["type"], found.get("ctx", {})
    if kind == "missing":
        return f"{field or 'the body'} is missing: /openapi.json says what belongs here", field
    if kind == "extra_forbidden":
        return f"unknown field {shown(field)}: {nearest(field or '', _known_beside(place))}", field
    what = found["msg"].removeprefix("Value error, ")
    what = what.replace("Input should be", "give").replace("should be", "give", 1)
    if kind.startswith("union_tag"):
        return f"kind is {shown(context.get('tag', 'missing'))}: give {context.get('expected_tags', 'one')}", "kind"
    given = found.get("input")
    sentence = f"{field or 'the body'} is {shown(given)}: {what[:1].lower()}{what[1:]}"
    return " ".join(sentence.splitlines())[:500], field


_TAGS = ("paint", "edit", "look", "reweight", "suppress", "regions", "int", "float", "str", "constrained-int")


def _known_beside(place: list[str]) -> list[str]:
    """List the names that were possible where an unknown one stands."""
    if "settings" in place:
        return list(field_docs(EditSettings))
    return ["kind", "prompt", "settings", "controls", "trace", "previews", "image", "caption", "timesteps", "to"]
