"""Accept only requests that name the service in ``Host``, and web pages of the service itself in ``Origin``.

A web page of another site can make a browser send requests to services on the browser's machine. With DNS rebinding,
where the page's name changes to the service's address, it can also read the answers. Such requests have the name of
the page in the header ``Host`` or ``Origin``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from fastapi import HTTPException, Request

ANY = "*"
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)
_PORTS = {"http": 80, "https": 443}


class Hosts:
    """The names that requests may use for the service.

    Args:
        own: names and addresses of the service, in addition to ``localhost``, 127.0.0.1 and ::1.
        allowed: other names and addresses that ``Host`` and ``Origin`` may have; ``"*"`` for any.

    Raises:
        ValueError: one of ``allowed`` is not a name or an address.
    """

    def __init__(self, own: Iterable[str] = (), allowed: Iterable[str] = ()) -> None:
        self._allowed = _names(allowed)
        self._own = {"localhost", *(_plain(each.lower()) for each in own)}

    async def check(self, request: Request) -> None:
        """Refuse a request with 403 if its ``Host`` or ``Origin`` is not allowed.

        Every browser sends ``Host``. If it sends no ``Origin``, it shows the answer to no page of another site.
        """
        if ANY in self._allowed:
            return
        host, origin = request.headers.get("host"), request.headers.get("origin")
        server = request.scope.get("server") or ("", 0)
        if host is not None and not self._is_ours(host, str(server[0])):
            raise HTTPException(403, _refused("Host", host))
        if origin is not None and not self._is_same(origin, host):
            raise HTTPException(403, _refused("Origin", origin))

    def _is_ours(self, host: str, address: str) -> bool:
        """Return whether ``Host`` names the service; ``address`` is the connection's address on this machine."""
        named = _split(host)
        if named is None:
            return False
        return named[0] in {*self._own, *self._allowed, _plain(address)} or _is_local(named[0])

    def _is_same(self, origin: str, host: str | None) -> bool:
        """Return whether ``Origin`` is the service itself or an allowed host."""
        scheme, _, authority = origin.lower().partition("://")
        page, service = _split(authority), _split(host or "")
        if page is None or scheme not in _PORTS:
            return False
        # Use the page's scheme for both: behind an HTTPS proxy, the service itself speaks HTTP.
        ends = [(each[0], each[1] or _PORTS[scheme]) for each in (page, service) if each]
        return page[0] in self._allowed or ends[1:] == ends[:1]


def _split(authority: str) -> tuple[str, int | None] | None:
    """Return the name and port of ``Host``; None if it is malformed."""
    found = _AUTHORITY.fullmatch(authority.lower())
    return None if found is None else (_plain(found[1]), int(found[2]) if found[2] else None)


def _plain(name: str) -> str:
    """Return a name without a final dot, or an address in its shortest form without brackets."""
    bare = name.strip("[]").removesuffix(".")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        return bare


def _is_local(name: str) -> bool:
    """Return whether an address is this machine's own, such as 127.0.0.1 or ::1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(given: str) -> str:
    """Return a given name in the form that ``_split`` returns; raise ValueError if it is not a name."""
    name = _plain(given.lower())
    address = ":" in name and ipaddress.ip_address(name)  # ValueError for NAME:PORT and URLs
    if name != ANY and not address and not _AUTHORITY.fullmatch(name):
        raise ValueError
    return name


def _names(given: Iterable[str]) -> frozenset[str]:
    names = set()
    for each in given:
        try:
            names.add(_name(each))
        except ValueError:
            raise ValueError(
                f"allow_hosts must be names or addresses without scheme and port, got {each!r}"
            ) from None
    return frozenset(names)


def _refused(header: str, value: str) -> str:
    return f"{header} must be a name of this service, got {value!r}. --allow-host NAME adds a name"
