# Owns: rtnetlink: links, routes, neighbours, tap addresses. Everything goes through Rtnl, one held socket.
from __future__ import annotations

from .door import Rtnl

__all__ = ["Rtnl"]
