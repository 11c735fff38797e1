"""Who may send requests, how many, and which credential the instances see.

The key file is a YAML list::

    - name: alice
      key: sk-alice-4fd1
    - name: batch
      key: sk-batch-90ce
      max_concurrent: 8
      requests_per_minute: 600
      min_priority: 10

Only digests of the keys stay in memory, made with a secret of this process. A key
is found by its digest in a dictionary. How long that takes depends on the bytes of
the digest, but nobody outside can tell which digest a guess has, so the time says
nothing about any key; and it does not grow with the number of keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec
import yaml
from aiohttp import web

from vllm_pd.config import RouterConfig, from_mapping
from vllm_pd.errors import ConfigError, OverloadedError
from vllm_pd.router.admission import Clock, HoldTime
from vllm_pd.router.files import is_credential, read_credential, read_secret, stamp_of
from vllm_pd.router.workers.board import Row

if TYPE_CHECKING:
    from multidict import CIMultiDict

logger = logging.getLogger(__name__)

AUTHORIZATION = "Authorization"
RELOAD_INTERVAL_S = 1.0
"""Pause between two looks at the key file."""

_ANY_PRIORITY = -(2**63)

_PARTS = 1_000_000
"""Parts of a request, and of a second, in which processes show each other whole numbers."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One client as the key file writes it."""

    name: str
    key: str
    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    min_priority: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty")
        if not is_credential(self.key):
            raise ValueError("key has to be printable ASCII without spaces")
        for limit in ("max_concurrent", "requests_per_minute"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise ValueError(f"{limit} must be positive, not {value}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may do.

    Attributes:
        max_concurrent: most requests at the same time; None: any number.
        requests_per_minute: most requests per minute in the long run, and at once
            after a minute of silence; None: any number.
        min_priority: lowest, that is most urgent, ``priority`` that it may ask for.
    """

    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    min_priority: int = _ANY_PRIORITY


class Client:
    """One holder of a key, or all clients together where there are no keys.

    Attributes:
        name: for logs, metrics and the fair share; ``""`` without keys.
        limits: may be replaced at any time.
        in_use: requests being served.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        *,
        row: Row | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Begin without requests.

        Args:
            name: of the client.
            limits: of all processes of the router together.
            row: where they show each other what the client has used; None: there is one.
            clock: returns seconds, the same in all of them.
        """
        self._row = row
        self.name = name
        self.limits = limits
        self.in_use = 0
        self._clock = clock
        self._hold_time = HoldTime()
        self._allowance = math.inf  # requests; cut to what the limit allows when used
        self._allowance_at = clock()

    def priority(self, asked: int) -> int:
        """Return the priority that a request gets."""
        return max(asked, self.limits.min_priority)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request for the time of the context.

        Raises:
            OverloadedError: a limit of the client is reached.
        """
        began = self._clock()
        self._check_concurrency()
        self._use_allowance(began)
        self.in_use += 1
        self._show()
        try:
            yield
        finally:
            self.in_use -= 1
            self._show()
            self._hold_time.note(self._clock() - began)

    def _check_concurrency(self) -> None:
        limit = self.limits.max_concurrent
        if limit is None:
            return
        in_use = self.in_use + (self._row.others()[0] if self._row else 0)
        if in_use >= limit:
            raise OverloadedError(
                f"This API key may have {limit} requests open at the same time.",
                wait_s=self._hold_time.wait_s(1, of=in_use),
            )

    def _use_allowance(self, now: float) -> None:
        limit = self.limits.requests_per_minute
        if limit is None:
            return
        per_s = limit / 60.0
        allowance, at = self._latest_allowance()
        left = min(allowance + (now - at) * per_s, limit)
        if left < 1.0:
            raise OverloadedError(
                f"This API key may send {limit} requests per minute.",
                wait_s=(1.0 - left) / per_s,
            )
        self._allowance = left - 1.0
        self._allowance_at = now

    def _show(self) -> None:
        if self._row is not None:
            used = math.isfinite(self._allowance)
            left = round(self._allowance * _PARTS) if used else 0
            self._row.put(self.in_use, left, round(self._allowance_at * _PARTS) if used else 0)

    def _latest_allowance(self) -> tuple[float, float]:
        """Return what was left and when, by the process that has let a request in last."""
        states = [(self._allowance_at, self._allowance)] if math.isfinite(self._allowance) else []
        for _, left, at, _ in self._row.each() if self._row else ():
            if at:
                states.append((at / _PARTS, left / _PARTS))
        if not states:
            return self._allowance, self._allowance_at
        at_s, left_then = max(states, key=lambda state: (state[0], -state[1]))
        return left_then, at_s


class ApiKeys:
    """The clients of a key file, which may change while the router runs."""

    def __init__(
        self,
        path: Path,
        *,
        row_of: Callable[[str], Row] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Read the file.

        Args:
            path: of the file.
            row_of: where the processes of the router count for the client of a name;
                None: there is one.
            clock: returns seconds.

        Raises:
            ConfigError: it cannot be read, or is wrong.
        """
        self._path = path
        self._row_of = row_of
        self._clock = clock
        self._salt = secrets.token_bytes(32)
        self._by_digest: dict[bytes, Client] = {}
        self._stamp = stamp_of(path)
        self._load()

    def client_of(self, headers: Mapping[str, str]) -> Client | None:
        """Return whose key a request carries; None if it is nobody's."""
        scheme, _, key = headers.get(AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._by_digest.get(self._digest(key))

    def reload_if_changed(self) -> None:
        """Read the file again if it is not the one of before.

        If it cannot be used, that is logged once and the keys of before stay in
        use. Requests that are being served go on, also those of a removed key.
        """
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load()
        except ConfigError as exc:
            logger.error("the API keys stay as they were: %s", exc)  # noqa: TRY400 - one line
        else:
            logger.info("read %d API keys from %s", len(self._by_digest), self._path)

    def _load(self) -> None:
        known = {client.name: client for client in self._by_digest.values()}
        by_digest: dict[bytes, Client] = {}
        for entry in _read_entries(self._path):
            limits = Limits(entry.max_concurrent, entry.requests_per_minute, entry.min_priority)
            client = known.get(entry.name)
            if client is None:
                row = self._row_of(entry.name) if self._row_of else None
                client = Client(entry.name, limits, row=row, clock=self._clock)
            by_digest[self._digest(entry.key)] = client
            client.limits = limits
        self._by_digest = by_digest

    def _digest(self, key: str) -> bytes:
        raw = key.encode("utf-8", "surrogateescape")  # any bytes that a client sends
        return hashlib.blake2b(raw, key=self._salt, digest_size=32).digest()


class Access:
    """Whose requests are served, and as whom the router sends the legs of them."""

    def __init__(self, keys: ApiKeys | None = None, upstream_key: str | None = None) -> None:
        """Without keys, everybody is the same client; without upstream key, see below.

        The instances see the upstream key, if there is one, in place of what the
        client sent. Else they see what the client sent, unless that is a key of ours.
        """
        self._keys = keys
        self._everybody = Client("", Limits())
        self._upstream = None if upstream_key is None else f"Bearer {upstream_key}"

    @classmethod
    def from_config(cls, config: RouterConfig, row_of: Callable[[str], Row] | None = None) -> Self:
        """Read the files that the configuration names.

        Args:
            config: of the router.
            row_of: as ``ApiKeys`` takes it.

        Raises:
            ConfigError: one cannot be read, or is wrong.
        """
        keys, upstream = config.api_keys_file, config.upstream_key_file
        return cls(
            None if keys is None else ApiKeys(Path(keys), row_of=row_of),
            None if upstream is None else read_credential(Path(upstream)),
        )

    def client_of(self, headers: Mapping[str, str]) -> Client | None:
        """Return who sends a request; None if nobody who may."""
        return self._everybody if self._keys is None else self._keys.client_of(headers)

    def authorize(self, leg_headers: CIMultiDict[str]) -> None:
        """Put the credential that the instances expect into the headers of a leg."""
        if self._upstream is not None:
            leg_headers[AUTHORIZATION] = self._upstream
        elif self._keys is not None:
            leg_headers.popall(AUTHORIZATION, None)

    async def watch(self) -> None:
        """Follow changes of the key file until cancelled; returns if there is none."""
        while self._keys is not None:
            await asyncio.sleep(RELOAD_INTERVAL_S)
            self._keys.reload_if_changed()


def unauthorized_response() -> web.Response:
    """Return what vLLM 0.32 answers to a wrong or missing key."""
    return web.Response(
        status=401, body=b'{"error":"Unauthorized"}', content_type="application/json"
    )


def _read_entries(path: Path) -> list[_Entry]:
    try:
        values = yaml.safe_load(read_secret(path))
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # ValueError: an odd date
        # Its text would quote the file, keys included.
        mark = getattr(exc, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not YAML{where}") from None
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path}: expected a list of entries", hint="- {name: ..., key: ...}")
    entries = [_entry(path, number, value) for number, value in enumerate(values, start=1)]
    for field in ("name", "key"):
        if len({getattr(entry, field) for entry in entries}) < len(entries):
            raise ConfigError(f"{path}: two entries have the same {field}")
    return entries


def _entry(path: Path, number: int, value: object) -> _Entry:
    source = f"{path}, entry {number}"
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: expected a mapping", hint="- {name: ..., key: ...}")
    return from_mapping(_Entry, value, source=source)
