"""What the engine's thread is asked to issue: set-ups, moves, digests and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ascend_vllm_plugin.backend import (
    Backend,
    Communicator,
    EngineDevice,
    EngineEvent,
    EngineStream,
    HcclError,
)
from ascend_vllm_plugin.blocks import Plan
from ascend_vllm_plugin.engine import Job, NotYetError
from ascend_vllm_plugin.meeting import Meeting
from vllm_pd.transport.device import Mark

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MEETING_WINDOW_S = 0.01
"""Longest time that a step waits for the peer's engine, while a communicator is set up."""

_SEEN_LEN = 64 * 1024  # what a fault may look at and damage


@dataclass(slots=True, eq=False)
class Channel:
    """A communicator with one peer and the stream of its operations.

    Each has a stream of its own: on a common one a Send that waits for its peer would
    hold up what another peer waits for, and so in a circle.

    Attributes:
        communicator: with the peer.
        stream: of its operations and of what belongs to them.
        is_lost: an operation did not end; neither is used or freed again.
        is_spoilt: an operation failed on the device; the stream is not used again.
    """

    communicator: Communicator
    stream: EngineStream
    is_lost: bool = False
    is_spoilt: bool = False

    def give_up(self) -> None:
        """Abort what the stream has to do.

        Raises:
            RuntimeError: it cannot be aborted.
        """
        self.stream.abort()
        self.is_lost = True


@dataclass(frozen=True, slots=True)
class Tools:
    """What a worker makes communicators with.

    Attributes:
        backend: creates them.
        device: makes streams.
        after: what the first work on each stream runs after.
        warm: a byte or more on the device, to be sent over every new communicator.
    """

    backend: Backend
    device: EngineDevice
    after: Mark
    warm: torch.Tensor


class ConnectJob(Job):
    """Meet the peer's engine, create the communicator and use it once.

    The first operation blocks until the link is made, so it belongs here.

    Attributes:
        channel: once it is done, and well.
        blocked_s: time that HCCL held the engine's thread.
    """

    def __init__(
        self,
        on_done: Callable[[str | None], None],
        *,
        meeting: Meeting,
        tools: Tools,
        sends: bool,
    ) -> None:
        super().__init__(on_done)
        self._meeting = meeting
        self._tools = tools
        self._sends = sends
        self._stream: EngineStream | None = None
        self._is_lost = False
        self.channel: Channel | None = None
        self.blocked_s = 0.0

    def issue(self) -> EngineEvent | None:  # noqa: D102
        stream: EngineStream = self._tools.device.make_stream()
        self._stream = stream
        stream.wait(self._tools.after)  # torch may have given us memory that was in use
        _ = stream.handle  # from here to the end nothing of torch's may be waiting
        if not self._meeting.attend(MEETING_WINDOW_S):
            self._return_stream()  # the job may be withdrawn before it is tried again
            raise NotYetError
        started = time.monotonic()
        try:
            self.channel = self._connect(stream)
        finally:
            self.blocked_s = time.monotonic() - started
        return stream.record()

    def settle_event(self) -> EngineEvent | None:  # noqa: D102
        return None if self._stream is None else self._stream.record()

    def spoil(self) -> None:  # noqa: D102
        if self.channel is not None:
            self.channel.is_spoilt = True

    def check(self, elapsed_s: float) -> None:  # noqa: ARG002, D102
        if self.channel is None:  # it has failed, and its stream has not
            self._return_stream()

    @property
    def is_lost(self) -> bool:  # noqa: D102
        return self._is_lost if self.channel is None else self.channel.is_lost

    def give_up(self) -> None:  # noqa: D102
        if self.channel is not None:
            self.channel.give_up()
            return
        assert self._stream is not None  # it has issued something
        self._stream.abort()
        self._is_lost = True

    def _return_stream(self) -> None:
        self._tools.device.take_back(self._stream)
        self._stream = None

    def _connect(self, stream: EngineStream) -> Channel:
        is_leader = self._meeting.is_leader
        root = self._meeting.root
        if is_leader:
            root = self._tools.backend.make_root()
            self._meeting.begin(root)
        communicator = self._tools.backend.connect(root, is_leader=is_leader)
        try:
            move = communicator.send if self._sends else communicator.recv
            move(self._tools.warm, stream)
        except Exception:  # torch-npu raises anything
            _destroy(communicator, stream)
            raise
        return Channel(communicator, stream)


class EndJob(Job):
    """Destroy a communicator after what it is used for; its stream is free then, if it is well."""

    must_run = True

    def __init__(self, channel: Channel, device: EngineDevice) -> None:
        super().__init__(lambda _: None)
        self._channel = channel
        self._device = device
        self._event: EngineEvent | None = None

    def give_up(self) -> None:  # noqa: D102
        raise AssertionError("the end of a communicator leaves nothing under way")

    def issue(self) -> EngineEvent | None:  # noqa: D102
        if self._channel.is_lost:
            return None  # it may be busy for ever: its memory is lost until the process ends
        is_well = self._has_ended_well()
        is_well &= _destroy(self._channel.communicator, self._channel.stream)
        if is_well and not self._channel.is_spoilt:
            self._device.take_back(self._channel.stream)
        return None

    def _has_ended_well(self) -> bool:
        """Return whether the stream can be used again, once nothing is under way on it.

        Raises:
            NotYetError: something is.
        """
        try:
            if self._event is None:
                self._event = self._channel.stream.record()
            if not self._event.is_over:
                raise NotYetError
            self._event.synchronize()  # returns at once, or says that the stream failed
        except RuntimeError as exc:  # nothing runs on it any more
            logger.debug("hccl: %s", exc)
            return False
        return True


def _destroy(communicator: Communicator, stream: EngineStream) -> bool:
    """Destroy a communicator while torch issues nothing to the device; return whether torch can."""
    is_well = True
    try:
        _ = stream.handle
    except RuntimeError as exc:  # what torch has queued will never be issued
        logger.debug("hccl: %s", exc)
        is_well = False
    communicator.destroy()
    return is_well


@dataclass(frozen=True, slots=True)
class Sample:
    """A portion of a transfer that is copied to the host, to be hashed.

    Attributes:
        plan: its blocks, of which it is a chunk.
        chunk: which.
        host: as many bytes of pinned memory.
    """

    plan: Plan
    chunk: int
    host: torch.Tensor


@dataclass(frozen=True, slots=True)
class Load:
    """What a transfer moves, and through which memory.

    Attributes:
        plan: the blocks.
        lens: bytes of each chunk.
        buffer: device memory, as long as the longest chunk.
        exec_timeout_s: after which an operation gives the other side up.
    """

    plan: Plan
    lens: tuple[int, ...]
    buffer: torch.Tensor
    exec_timeout_s: float


class _StreamJob(Job):
    def __init__(self, on_done: Callable[[str | None], None], channel: Channel) -> None:
        super().__init__(on_done)
        self._channel = channel

    @property
    def is_lost(self) -> bool:
        return self._channel.is_lost

    def give_up(self) -> None:
        self._channel.give_up()

    def spoil(self) -> None:
        self._channel.is_spoilt = True

    def settle_event(self) -> EngineEvent | None:
        return None if self.is_lost else self._channel.stream.record()

    def _check_channel(self) -> None:
        """Refuse to issue anything behind what was given up.

        Raises:
            HcclError: the channel is lost.
        """
        if self.is_lost:
            raise HcclError("an earlier operation did not end")

    def _take(self, sample: Sample, buffer: torch.Tensor) -> None:
        """Copy a portion of the KV cache to the host."""
        length = sample.host.numel()

        def work() -> None:
            sample.plan.gather(sample.chunk, buffer)
            sample.host.copy_(buffer[:length], non_blocking=True)

        self._channel.stream.submit(work)


class SampleJob(_StreamJob):
    """Copy another portion to the host."""

    def __init__(
        self,
        on_done: Callable[[str | None], None],
        channel: Channel,
        sample: Sample,
        buffer: torch.Tensor,
    ) -> None:
        super().__init__(on_done, channel)
        self._sample = sample
        self._buffer = buffer

    def issue(self) -> EngineEvent | None:  # noqa: D102
        self._check_channel()
        self._take(self._sample, self._buffer)
        return self._channel.stream.record()


class _MoveJob(_StreamJob):
    """Move a whole transfer, chunk after chunk through one buffer: the stream keeps order."""

    def __init__(
        self,
        on_done: Callable[[str | None], None],
        channel: Channel,
        load: Load,
        *,
        sample: Sample | None,
    ) -> None:
        super().__init__(on_done, channel)
        self._load = load
        self._sample = sample

    def check(self, elapsed_s: float) -> None:
        limit_s = self._load.exec_timeout_s
        if elapsed_s >= limit_s:
            # A stream may go on after an operation that waited in vain.
            raise HcclError(f"the peer did not take part within {limit_s:g} s")
        _ = self._channel.stream.handle  # HCCL is asked while torch issues nothing
        self._channel.communicator.check()


class SendJob(_MoveJob):
    """Gather and send; ``on_issued`` tells the consumer then, so that it waits for nothing."""

    def __init__(
        self,
        on_done: Callable[[str | None], None],
        channel: Channel,
        load: Load,
        *,
        sample: Sample | None,
        on_issued: Callable[[], None],
    ) -> None:
        super().__init__(on_done, channel, load, sample=sample)
        self._on_issued = on_issued

    def issue(self) -> EngineEvent | None:  # noqa: D102
        self._check_channel()
        stream, load = self._channel.stream, self._load
        for chunk, length in enumerate(load.lens):
            stream.submit(lambda chunk=chunk: load.plan.gather(chunk, load.buffer))  # type: ignore[misc]
            self._channel.communicator.send(load.buffer[:length], stream)
        if self._sample is not None:
            self._take(self._sample, load.buffer)
        event = stream.record()
        self._on_issued()
        return event


class RecvJob(_MoveJob):
    """Receive and scatter. The peer has issued its half, so this one must be, too."""

    must_run = True

    def __init__(
        self,
        on_done: Callable[[str | None], None],
        channel: Channel,
        load: Load,
        *,
        sample: Sample | None,
        device: EngineDevice,
        on_received: Callable[[memoryview], None] | None,
    ) -> None:
        super().__init__(on_done, channel, load, sample=sample)
        self._device = device
        self._on_received = on_received

    def issue(self) -> EngineEvent | None:  # noqa: D102
        self._check_channel()
        stream, load = self._channel.stream, self._load
        for chunk, length in enumerate(load.lens):
            self._channel.communicator.recv(load.buffer[:length], stream)
            if self.is_dropped:
                continue
            if chunk == 0:
                self._show(load.buffer[: min(length, _SEEN_LEN)])
                # A step that was issued earlier may still write to these blocks, for a
                # request that had them before.
                stream.wait(self._device.mark())
            stream.submit(lambda chunk=chunk: load.plan.scatter(chunk, load.buffer))  # type: ignore[misc]
        if self._sample is not None and not self.is_dropped:
            self._take(self._sample, load.buffer)
        return stream.record()

    def _show(self, part: torch.Tensor) -> None:
        """Let a fault see, and damage, the first bytes. This waits for the device."""
        if self._on_received is None:
            return
        stream = self._channel.stream
        host = self._device.allocate_host(part.numel())
        stream.submit(lambda: host.copy_(part, non_blocking=True))
        stream.record().synchronize()
        self._on_received(memoryview(host.numpy()))  # type: ignore[arg-type]
        stream.submit(lambda: part.copy_(host, non_blocking=True))
        stream.record().synchronize()
