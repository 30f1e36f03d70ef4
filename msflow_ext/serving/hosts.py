"""Who may ask the service: requests that name it by one of its own names, and web pages of its own.

A page of another site makes a browser send requests to services that only the browser's machine reaches. If its name
is changed to the service's address meanwhile (DNS rebinding), it also reads the answers. Such requests carry the
page's name in the header ``Host`` or ``Origin``.
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
    """The names of the service.

    Args:
        own: names and addresses of the service besides those of loopback.
        allowed: names and addresses of others that may stand in ``Host`` and ``Origin``; ``"*"`` for any.

    Raises:
        ValueError: something else than a name or an address.
    """

    def __init__(self, own: Iterable[str] = (), allowed: Iterable[str] = ()) -> None:
        self._allowed = _names(allowed)
        self._own = {"localhost", *(_plain(each.lower()) for each in own)}

    async def check(self, request: Request) -> None:
        """Refuse with 403 what comes from elsewhere.

        No browser leaves out ``Host``. Where it leaves out ``Origin``, no page of another site gets the answer.
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
        """Whether ``Host`` names the service; ``address`` is this machine's end of the connection."""
        named = _split(host)
        if named is None:
            return False
        return named[0] in {*self._own, *self._allowed, _plain(address)} or _is_loopback(named[0])

    def _is_same(self, origin: str, host: str | None) -> bool:
        """Whether a page of that origin is one of the service, or of a host that is allowed."""
        scheme, _, authority = origin.lower().partition("://")
        page, service = _split(authority), _split(host or "")
        if page is None or scheme not in _PORTS:
            return False
        # Both by the page's scheme: behind a proxy for HTTPS the service itself speaks HTTP.
        ends = [(each[0], each[1] or _PORTS[scheme]) for each in (page, service) if each]
        return page[0] in self._allowed or ends[1:] == ends[:1]


def _split(authority: str) -> tuple[str, int | None] | None:
    """Name and port of ``Host``; None if it is malformed."""
    found = _AUTHORITY.fullmatch(authority.lower())
    return None if found is None else (_plain(found[1]), int(found[2]) if found[2] else None)


def _plain(name: str) -> str:
    """A name without a last dot, an address in its shortest form and without brackets."""
    bare = name.strip("[]").removesuffix(".")
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        return bare


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(given: str) -> str:
    """A name that somebody gives, as ``_split`` finds it in a header."""
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
    return f"{header} {value!r} is not a name of this service; --allow-host NAME allows another one"
