"""The page's files: those of the package, by their names, and nothing else."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated

from fastapi import APIRouter, Path, Response

from gobelin.server.code_excerpts import code_excerpts
from gobelin.server.jobs import NotFoundError
from gobelin.server.responses import AsciiJsonResponse

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_OF_LOOK = ("word_map.js", "trust.js")
_INDEX = "index.html"


def page_routes() -> APIRouter:
    """Make the routes of the page: its files are listed once, and no name leads anywhere else."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> Response:
        return _answer(_INDEX)

    @router.get("/v1/code")
    async def code() -> Response:
        """Return the lines of code that "How it works" shows."""
        return AsciiJsonResponse(code_excerpts())

    @router.get("/assets/{name}")
    async def asset(name: Annotated[str, Path(max_length=100)]) -> Response:
        return _answer(name)

    return router


def list_page_files() -> dict[str, Traversable]:
    """List the page's files by name."""
    folder = files("gobelin.server") / "page"
    there = list(folder.iterdir()) if folder.is_dir() else []
    found = {one.name: one for one in there if any(one.name.endswith(suffix) for suffix in _TYPES)}
    return {**found, **{name: files("gobelin.look") / name for name in _OF_LOOK}}


def _answer(name: str) -> Response:
    file = list_page_files().get(name)
    if file is None:
        raise NotFoundError("there is no such file")
    kind = next(kind for suffix, kind in _TYPES.items() if name.endswith(suffix))
    return Response(file.read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})
