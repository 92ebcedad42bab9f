# The operators' API: HTTP and JSON, with an OpenAPI document, on a Unix socket and, when it is switched on, on TCP.
from __future__ import annotations

from .server import Api, ApiError

__all__ = ["Api", "ApiError"]
