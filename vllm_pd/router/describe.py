"""What the router says to the instances' control endpoints: questions and releases.

It asks who an instance is and what it keeps for others, and tells it of prefills that
nobody will fetch. It never tells an instance to drain: that instance would keep
nothing for requests of other routers either, and would stay so if it came back.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PeerLostError, RemoteProtocolError
from vllm_pd.protocol.messages import (
    AnyMessage,
    Describe,
    GetOutstanding,
    InstanceInfo,
    Outstanding,
    Release,
)
from vllm_pd.router.addresses import Address
from vllm_pd.session.channel import ControlContext
from vllm_pd.session.outbox import Outbox

T = TypeVar("T", InstanceInfo, Outstanding)

ANSWER_TIMEOUT_S = 3.0
"""Longest wait for an answer; an instance endpoint answers from a thread of its own."""


class ControlLink:
    """Speaks to control endpoints, from the thread of one event loop.

    Args:
        cluster_key_file: the instances' key; without one, only endpoints on this host
            are spoken to, because nobody else proves who they are.

    Raises:
        ConfigError: the key file cannot be used.
    """

    def __init__(self, cluster_key_file: str | None) -> None:
        self._context = ControlContext(ConnectorConfig(cluster_key_file=cluster_key_file))
        self._outbox = Outbox(self._context)

    async def describe(self, address: Address) -> InstanceInfo:
        """Ask an instance who it is.

        Raises:
            PeerLostError: nobody answers there, or not in time, or not to us.
            RemoteProtocolError: what answers does not speak the protocol.
        """
        return await self._ask(address, Describe(), InstanceInfo)

    async def outstanding(self, address: Address) -> Outstanding:
        """Ask an instance what it keeps for others.

        Raises:
            PeerLostError: nobody answers there, or not in time, or not to us.
            RemoteProtocolError: what answers does not speak the protocol.
        """
        return await self._ask(address, GetOutstanding(), Outstanding)

    def release(self, address: Address, transfer_id: str) -> None:
        """Tell an instance that a prefill will not be fetched; best effort, never waits."""
        now = time.monotonic()
        self._outbox.check(now)  # an instance that restarted needs a new connection
        self._outbox.send(address, Release(transfer_id=transfer_id), now)

    def close(self) -> None:
        """Close all connections, after trying to deliver what was sent."""
        self._outbox.close()
        self._context.close()

    async def _ask(self, address: Address, question: AnyMessage, kind: type[T]) -> T:
        host, port = address
        if not self._context.may_connect(host):
            raise PeerLostError(f"{host} is not this host, and there is no cluster key")
        client = self._context.client(host, port)
        try:
            client.send(question)
            descriptors = (client.socket.fileno(), client.monitor.fileno())
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                client.check()
                while (answer := client.receive()) is None:
                    await _readable(descriptors)
                    client.check()
        except TimeoutError as exc:
            raise PeerLostError(
                f"{client.address}: no answer within {ANSWER_TIMEOUT_S:g} s"
            ) from exc
        finally:
            client.close()
        if not isinstance(answer, kind):
            raise RemoteProtocolError(f"{client.address}: {type(answer).__name__} is no answer")
        return answer


def fingerprint_key(info: InstanceInfo) -> str | None:
    """Return a text that is equal for instances that can exchange KV cache.

    None while the instance does not know its own fingerprint.
    """
    if info.fingerprint is None:
        return None
    facts = msgspec.msgpack.encode((info.protocol_version, info.fingerprint))
    return hashlib.blake2b(facts, digest_size=8).hexdigest()


async def _readable(descriptors: Iterable[int]) -> None:
    """Wait until one of the descriptors is readable.

    ZeroMQ's become readable once for all that came: read everything before waiting.
    """
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()
    for descriptor in descriptors:
        loop.add_reader(descriptor, woken.set)
    try:
        await woken.wait()
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
