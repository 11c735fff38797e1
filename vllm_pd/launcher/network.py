"""Addresses, interfaces and used ports of this host. Looks, decides nothing."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

from vllm_pd.errors import ConfigError

_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"  # reserved for documentation; nothing is sent to it


def find_host_ip() -> str | None:
    """Return the address from which this host speaks to others; None: it has no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_ELSEWHERE, 9))
        except OSError:
            return None
        host: str = probe.getsockname()[0]
    return host


def resolve(host: str) -> str:
    """Return the address of a host name, IPv4 if it has one; HCCL_IF_IP takes no names.

    Raises:
        ConfigError: it has none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:  # UnicodeError: it cannot be a name at all
        raise ConfigError(
            f"side_channel_host {host} has no address: {exc}",
            hint="name the address that other hosts reach this host by",
        ) from exc
    return str(min(found, key=lambda entry: entry[0])[4][0])  # AF_INET < AF_INET6


def interface_of(host_ip: str) -> str:
    """Return the name of the interface that has an IPv4 address; ``""``: none has."""
    for _, name in socket.if_nameindex():
        if _address_of(name) == host_ip:
            return name
    return ""


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None  # it has none
    return socket.inet_ntoa(answer[20:24])


def used_ports(proc_net: Path = Path("/proc/net")) -> frozenset[int]:
    """Return the local TCP ports that are in use, of any address."""
    ports = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc_net / name).read_text().splitlines()[1:]
        except OSError:
            continue
        ports |= {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.strip()}
    return frozenset(ports)
