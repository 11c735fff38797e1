"""Addresses of instances: what is accepted as one, and which two are the same. Pure."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from vllm_pd.errors import ConfigError

Address = tuple[str, int]
"""Host and port of a control endpoint."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_ODD = re.compile(r"[^!-~]|[\\{}|^`<>\"]")  # urlsplit drops some of these without a word


def base_url(url: str) -> str:
    """Return an instance's address in the one form that the router knows it by.

    Raises:
        ConfigError: it is not an http(s) address, or carries a user, a query or a
            fragment, which would have to be sent along with every request, or its path
            has a ``~``, and so the id of another one.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError(f"instance address {url!r}: {exc}") from exc
    if parts.scheme not in _DEFAULT_PORTS:
        raise ConfigError(f"instance address {url!r} does not start with http://")
    if not host or port == 0 or _ODD.search(url):
        raise ConfigError(f"instance address {url!r} has no host or port that can be used")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise ConfigError(f"instance address {url!r} must not have a user, a query or a fragment")
    if "~" in parts.path:  # it stands for a slash in the instance's id
        raise ConfigError(f"instance address {url!r} must not have a ~ in its path")
    if port is None or port == _DEFAULT_PORTS[parts.scheme]:
        authority = _bracketed(host)
    else:
        authority = host_port((host, port))
    return f"{parts.scheme}://{authority}{parts.path.rstrip('/')}"


def instance_id(url: str) -> str:
    """Return the name of the instance at a base URL, fit for a URL's path.

    One port serves one instance, whatever the scheme, so that is not part of it.
    """
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme])
    return f"{host_port(address)}{parts.path.replace('/', '~')}"


def control_address(text: str) -> Address:
    """Return the address that ``host:port`` or ``[host]:port`` names.

    Raises:
        ConfigError: it names none.
    """
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_number = port.isascii() and port.isdecimal()
    if not colon or not host or not is_number or not 1 <= int(port) <= 65535 or _ODD.search(text):
        raise ConfigError(f"control address {text!r} is not host:port")
    return host, int(port)


def host_port(address: Address) -> str:
    """Return the text that ``control_address`` reads back."""
    host, port = address
    return f"{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
