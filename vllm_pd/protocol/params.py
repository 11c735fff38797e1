"""The ``kv_transfer_params`` that the router carries from producer to consumer.

The keys are those of vLLM's NixlConnector, so that proxies written for it drive
this connector too; ``transfer_id``, ``remote_prompt_digest`` and
``remote_lease_s`` are additions.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_pd.errors import RemoteProtocolError
from vllm_pd.protocol.messages import MAX_ID_LEN

TIMELINE = "timeline"
"""In the params of a decode request that asks for its timeline, and in those of its answer."""


class RemotePrefill(msgspec.Struct, frozen=True, kw_only=True):
    """Where a decode request finds its prompt's KV cache.

    Attributes:
        transfer_id: names the prefill on the producer.
        remote_engine_id: the producer; a restarted one has another id.
        remote_request_id: the producer's request id, for its logs.
        remote_host: host of the producer's instance endpoint.
        remote_port: port of it.
        remote_num_tokens: leading prompt tokens whose KV is there; None: all of the
            prompt will be, as the prefill has not ended yet.
        remote_prompt_digest: ``prompt_digest`` of those tokens; ``""`` if unknown.
        remote_lease_s: how long the producer keeps it unless renewed; 0 if unknown.
    """

    transfer_id: str
    remote_engine_id: str
    remote_host: str
    remote_port: int
    remote_num_tokens: int | None
    remote_request_id: str = ""
    remote_prompt_digest: str = ""
    remote_lease_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.remote_port < 65536:
            raise ValueError(f"remote_port {self.remote_port} is not a port")
        if self.remote_num_tokens is not None and self.remote_num_tokens < 0:
            raise ValueError(f"remote_num_tokens is {self.remote_num_tokens}")
        if not 0 < len(self.transfer_id) <= MAX_ID_LEN:
            raise ValueError("transfer_id is empty or too long")
        f"{self.transfer_id}{self.remote_host}".encode()  # a ValueError where it cannot be sent
        if not 0 <= self.remote_lease_s < math.inf:  # false for nan, too
            raise ValueError(f"remote_lease_s is {self.remote_lease_s}")


def pending_prefill_params(
    transfer_id: str, *, engine_id: str, host: str, port: int
) -> dict[str, Any]:
    """Return what sends a decode request to wait for a prefill that has not ended yet.

    Args:
        transfer_id: of the prefill.
        engine_id: of the producer; if that restarts, the request is computed locally.
        host: host of the producer's instance endpoint.
        port: port of it.
    """
    remote = RemotePrefill(
        transfer_id=transfer_id,
        remote_engine_id=engine_id,
        remote_host=host,
        remote_port=port,
        remote_num_tokens=None,
    )
    return {"do_remote_prefill": True, "do_remote_decode": False, **msgspec.to_builtins(remote)}


def is_of_pd_connector(params: Mapping[str, Any]) -> bool:
    """Return whether params of a finished prefill are those of this connector."""
    return isinstance(params.get("remote_prompt_digest"), str)


def wants_remote_decode(params: Mapping[str, Any] | None) -> bool:
    """Return whether a request's KV cache is to be kept for a consumer."""
    return bool(params) and params is not None and bool(params.get("do_remote_decode"))


def transfer_id_of(params: Mapping[str, Any], *, default: str) -> str:
    """Return the router's transfer id, or one made from ``default`` if it minted none.

    vLLM takes request ids of any length from a client's header, so a long one is
    replaced by its digest.
    """
    transfer_id = params.get("transfer_id")
    if isinstance(transfer_id, str) and 0 < len(transfer_id) <= MAX_ID_LEN:
        return transfer_id
    if len(default) <= MAX_ID_LEN:
        return default
    return hashlib.blake2b(default.encode(), digest_size=16).hexdigest()


def remote_prefill_params(
    remote: RemotePrefill, *, block_ids: Sequence[int], tp_size: int
) -> dict[str, Any]:
    """Return what the producer's engine answers to the router."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": list(block_ids),
        "tp_size": tp_size,
        **msgspec.to_builtins(remote),
    }


def parse_remote_prefill(params: Mapping[str, Any] | None) -> RemotePrefill | None:
    """Return the remote prefill that a request names, or None if it names none.

    Raises:
        RemoteProtocolError: the params are there but cannot be used.
    """
    if not params or not params.get("do_remote_prefill"):
        return None
    try:
        return msgspec.convert(params, RemotePrefill)
    except msgspec.ValidationError as exc:
        raise RemoteProtocolError(f"kv_transfer_params: {exc}") from exc


def prompt_digest(token_ids: Sequence[int], *, salt: str = "") -> str:
    """Return a digest of a prompt, so that KV of another prompt is never loaded.

    Args:
        token_ids: the tokens whose KV is meant.
        salt: whatever else the KV depends on, e.g. the name of a LoRA adapter.
    """
    digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16)
    digest.update(salt.encode())
    return digest.hexdigest()
