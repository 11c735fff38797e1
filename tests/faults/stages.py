"""Stages of a fetch, and how a process that takes part notices that it is there.

A stage is noticed by a method that is wrapped in the process that is to fail, or in
the surviving one where only that one takes part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from vllm_pd.protocol.messages import (
    Describe,
    FetchBlocks,
    FetchReady,
    Hello,
    InstanceInfo,
)
from vllm_pd.session.channel import ControlClient, ControlServer
from vllm_pd.session.producer import Producer
from vllm_pd.transport.base import Transport
from vllm_pd.transport.chunks import Move
from vllm_pd.transport.link import Link
from vllm_pd.transport.links import LinkPool
from vllm_pd.transport.payload import DirectPayload
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.sources import MappedSource, ProcessSource, Source
from vllm_pd.transport.tcp import TcpTransport

Act = Callable[[], None]
Patch = Callable[[Any, str, Any], None]
"""Replaces an attribute; ``setattr``, or one that is undone after a test."""

STAGES = (
    "describe",  # the producer is asked where its workers are, and has not answered
    "described",
    "hello",  # the handshake has begun
    "greeted",
    "parked",  # the fetch waits for a prefill that has not ended
    "ready",  # FetchReady is sent, or here
    "copying",  # some bytes are there, not all
    "copied",  # the last byte is there, the producer does not know
    "told",  # it knows, and the consumer does not know that
    "confirmed",  # the transfer is over, and nobody has been told
)


def watch(patch: Patch, role: str, stage: str, kind: str, act: Act) -> None:
    """Call ``act`` when this process reaches a stage.

    Args:
        patch: how to replace methods.
        role: ``producer`` or ``consumer``: what this process is.
        stage: one of ``STAGES``.
        kind: of transport: ``shm``, ``readv`` or ``tcp``.
        act: what to do; it may not come back.
    """
    _WATCHERS[role, stage](patch, kind, act)


def watch_parked(patch: Patch, act: Act) -> None:
    """Call ``act`` when a producer in this process has a fetch without a grant."""

    def after(_result: Any, _producer: Producer, _identity: bytes, message: Any, _now: Any) -> None:
        if isinstance(message, FetchBlocks):
            act()

    _wrap(patch, Producer, "handle", after=after)


def watch_copy(patch: Patch, kind: str, act: Act) -> None:
    """Call ``act`` when a consumer in this process has copied some of the bytes."""
    if kind == "tcp":
        _wrap(patch, DirectPayload, "landed", after=lambda *_: act())
        return
    source: type[Source] = MappedSource if kind == "shm" else ProcessSource
    original = source.read
    once = iter([act])

    def read_in_two(self: Source, moves: Sequence[Move], *args: Any) -> None:
        half = len(moves) // 2
        original(self, moves[:half], *args)
        for do in once:
            do()
        original(self, moves[half:], *args)

    patch(source, "read", read_in_two)


def _watch_one_copy(patch: Patch, act: Act) -> None:
    """Watch a tcp producer between two chunks; in a one-sided copy it has no part."""
    _wrap(
        patch,
        DirectPayload,
        "take",
        before=lambda _self, _posted, index, _chunk: act() if index == 1 else None,
    )


_WATCHERS: dict[tuple[str, str], Callable[[Patch, str, Act], None]] = {
    ("producer", "describe"): lambda p, _, act: _on_message(p, ControlServer, InstanceInfo, act),
    ("producer", "described"): lambda p, _, act: _on_message(
        p, ControlServer, InstanceInfo, after=act
    ),
    ("producer", "hello"): lambda p, _, act: _on_message(p, ControlServer, Hello, act),
    ("producer", "greeted"): lambda p, _, act: _on_message(p, ControlServer, Hello, after=act),
    ("producer", "parked"): lambda p, _, act: watch_parked(p, act),
    ("producer", "ready"): lambda p, _, act: _on_message(p, ControlServer, FetchReady, after=act),
    ("producer", "copying"): lambda p, _, act: _watch_one_copy(p, act),
    ("producer", "copied"): lambda p, kind, act: (
        _watch_last_chunk(p, act) if kind == "tcp" else _on_frame(p, "confirmed", act)
    ),
    ("producer", "told"): lambda p, _, act: _on_frame(p, "confirmed", after=act),
    ("producer", "confirmed"): lambda p, _, act: _on_outcome(p, act),
    ("consumer", "describe"): lambda p, _, act: _on_message(p, ControlClient, Describe, after=act),
    ("consumer", "described"): lambda p, _, act: _on_arrival(p, InstanceInfo, act),
    ("consumer", "hello"): lambda p, _, act: _on_message(p, ControlClient, Hello, after=act),
    ("consumer", "greeted"): lambda p, _, act: _on_arrival(p, Hello, act),
    ("consumer", "ready"): lambda p, _, act: _on_arrival(p, FetchReady, act),
    ("consumer", "copying"): lambda p, kind, act: watch_copy(p, kind, act),
    ("consumer", "copied"): lambda p, kind, act: _on_frame(p, _last_word(kind), act),
    ("consumer", "told"): lambda p, kind, act: _on_frame(p, _last_word(kind), after=act),
    ("consumer", "confirmed"): lambda p, _, act: _on_outcome(p, act),
}


def _last_word(kind: str) -> str:
    """Return the type of the frame by which a consumer tells that it has the last byte."""
    return "received" if kind == "tcp" else "copied"


def _wrap(
    patch: Patch,
    owner: Any,
    name: str,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        result = original(*args, **kwargs)
        if after is not None:
            after(result, *args)
        return result

    patch(owner, name, wrapped)


def _on_message(
    patch: Patch, owner: Any, kind: type, before: Act | None = None, *, after: Act | None = None
) -> None:
    """Watch a control message being sent."""
    _wrap(
        patch,
        owner,
        "send",
        before=lambda *args: before() if before and isinstance(args[-1], kind) else None,
        after=lambda *args: after() if after and isinstance(args[-1], kind) else None,
    )


def _on_arrival(patch: Patch, kind: type, act: Act) -> None:
    """Watch a control message arriving at a client."""
    _wrap(
        patch,
        ControlClient,
        "receive",
        after=lambda message, *_: act() if isinstance(message, kind) else None,
    )


def _on_frame(
    patch: Patch, kind: str, before: Act | None = None, *, after: Act | None = None
) -> None:
    """Watch a frame being sent on a data link."""

    def is_it(frame: bytes) -> bool:
        decoded = msgspec.msgpack.decode(frame)
        return isinstance(decoded, dict) and decoded.get("type") == kind

    _wrap(
        patch,
        LinkPool,
        "send",
        before=lambda *args: before() if before and is_it(args[3]) else None,
        after=lambda *args: after() if after and is_it(args[4]) else None,
    )


def _on_outcome(patch: Patch, act: Act) -> None:
    """Watch a transfer that is over, before the session hears of it."""
    kinds: tuple[type[Transport], ...] = (ShmTransport, TcpTransport)
    for kind in kinds:
        _wrap(patch, kind, "poll", after=lambda outcomes, *_: act() if outcomes else None)


def _watch_last_chunk(patch: Patch, act: Act) -> None:
    """Watch the last byte of a transfer leave a tcp producer."""
    taken: set[int] = set()

    def after_flush(_result: Any, link: Link) -> None:
        if taken == {0, 1, 2} and not link.waits_to_write:
            act()

    _wrap(
        patch,
        DirectPayload,
        "take",
        before=lambda _self, _posted, index, _chunk: taken.add(index),
    )
    _wrap(patch, Link, "flush", after=after_flush)
