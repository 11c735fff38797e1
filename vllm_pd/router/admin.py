"""``/admin``: who belongs to the router, for those who hold the admin key.

====== ============================== =============================================
GET    /admin/instances               all instances and what is known of them
POST   /admin/instances               register one, or change the one at that address
PATCH  /admin/instances/{id}          change its role
POST   /admin/instances/{id}/drain    no new requests; removed once it is not needed
DELETE /admin/instances/{id}          forget it at once; its open requests go on
====== ============================== =============================================

Changes last as long as the router's process. What lasts longer belongs into its
configuration.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec
from aiohttp import web

from vllm_pd.config import InstanceSpec, RoleLabel, from_mapping
from vllm_pd.errors import ConfigError
from vllm_pd.router.addresses import base_url, control_address, host_port, instance_id
from vllm_pd.router.api_keys import AUTHORIZATION, unauthorized_response
from vllm_pd.router.files import read_credential
from vllm_pd.router.instance import Instance
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.replies import error_response
from vllm_pd.router.workers.changes import Add, Change, Drain, Relabel, Remove

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MakeChange = Callable[[web.Request, Change], Awaitable[None]]


class AdminKey:
    """The key of ``/admin``; only a digest of it stays in memory."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the key from a file.

        Raises:
            ConfigError: it cannot be read, or is no key.
        """
        return cls(read_credential(path))

    def opens(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request carries the key; takes equally long for any wrong one."""
        scheme, _, key = headers.get(AUTHORIZATION, "").partition(" ")
        return hmac.compare_digest(_digest(key), self._digest) and scheme.lower() == "bearer"


class _RoleChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of PATCH."""

    role: RoleLabel


class Admin:
    """Handlers of ``/admin``.

    Args:
        key: whoever has it may do everything here.
        pool_of: returns the pool of the app that a request came to; the pool is made
            when the app starts, later than its routes.
        make: makes a change in the app that a request came to, and in all other
            processes of the router.
    """

    def __init__(
        self,
        key: AdminKey,
        pool_of: Callable[[web.Request], InstancePool],
        make: MakeChange,
    ) -> None:
        self._key = key
        self._pool_of = pool_of
        self._make = make

    def routes(self) -> list[web.RouteDef]:
        """Return what to add to the app; without them ``/admin`` is a 404."""
        one = "/admin/instances/{id}"
        return [
            web.get("/admin/instances", self._guarded(self._list), allow_head=False),
            web.post("/admin/instances", self._guarded(self._register)),
            web.patch(one, self._guarded(self._relabel)),
            web.delete(one, self._guarded(self._remove)),
            web.post(f"{one}/drain", self._guarded(self._drain)),
        ]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            if not self._key.opens(request.headers):
                return unauthorized_response()
            try:
                return await handler(request)
            except ConfigError as exc:
                return error_response(400, str(exc))

        return guarded

    async def _list(self, request: web.Request) -> web.StreamResponse:
        instances = [_description(one) for one in self._pool_of(request)]
        return web.json_response({"instances": instances})

    async def _register(self, request: web.Request) -> web.StreamResponse:
        spec = from_mapping(InstanceSpec, await _read(request), source="instance")
        name = instance_id(base_url(spec.url))
        if spec.control is not None:
            control_address(spec.control)  # before anybody is told
        pool = self._pool_of(request)
        is_new = pool.get(name) is None
        await self._make(request, Add(spec))
        instance = pool.get(name)
        if instance is None:  # somebody was faster to remove it
            return _unknown(name)
        return web.json_response(_description(instance), status=201 if is_new else 200)

    async def _relabel(self, request: web.Request) -> web.StreamResponse:
        change = from_mapping(_RoleChange, await _read(request), source="change")
        instance = self._find(request)
        if instance is None:
            return _unknown(request.match_info["id"])
        await self._make(request, Relabel(instance.instance_id, change.role))
        return web.json_response(_description(instance))

    async def _drain(self, request: web.Request) -> web.StreamResponse:
        instance = self._find(request)
        if instance is None:
            return _unknown(request.match_info["id"])
        await self._make(request, Drain(instance.instance_id))
        return web.json_response(_description(instance), status=202)

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        instance = self._find(request)
        if instance is None:
            return _unknown(request.match_info["id"])
        await self._make(request, Remove(instance.instance_id))
        return web.Response(status=204)

    def _find(self, request: web.Request) -> Instance | None:
        return self._pool_of(request).get(request.match_info["id"])


async def _read(request: web.Request) -> dict[str, Any]:
    """Return the JSON object that a request carries.

    Raises:
        ConfigError: it carries something else.
    """
    try:
        return msgspec.json.decode(await request.read(), type=dict[str, Any])
    except web.RequestPayloadError as exc:
        raise ConfigError("the request body is damaged") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"the request body is no JSON object: {exc}") from exc


def _unknown(name: str) -> web.Response:
    return error_response(404, f"There is no instance {name!r}.")


def _description(instance: Instance) -> dict[str, Any]:
    """Return what is known of an instance, as plain data."""
    control, ledger = instance.control, instance.ledger
    return {
        "id": instance.instance_id,
        "url": instance.base_url,
        "role": instance.role.value,
        "state": instance.state.value,
        "breaker": instance.breaker.state.value,
        "in_flight": instance.in_flight,
        "control": None if control is None else host_port(control),
        "engine_id": instance.engine_id,
        "fingerprint": instance.fingerprint,
        "load": msgspec.to_builtins(ledger.scrape.load) if ledger.scrape else None,
    }


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
