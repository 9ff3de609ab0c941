"""The server: Gobelin's page and HTTP API, ``gobelin serve``. It needs ``pip install "gobelin[server]"``."""

from gobelin.server.app import create_app
from gobelin.server.limits import ServerLimits, ServerOptions

__all__ = ["ServerLimits", "ServerOptions", "create_app"]
