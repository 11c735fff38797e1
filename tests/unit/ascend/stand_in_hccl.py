"""HCCL between two transports of one process, on the stand-in device. Breaks where its rules are.

- One thread at a time is in a call, for each device, and nothing of torch's is queued then.
- Creating a communicator blocks until the peer does it, too; so does the first operation.
- Send and Recv pair in order, on the stream; the lengths must be equal.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ascend_vllm_plugin.backend import Backend, Communicator, HcclError
from ascend_vllm_plugin.device import StreamPool
from ascend_vllm_plugin.transport import HcclTransport

from tests.stand_in_device import StandInDevice, StandInEvent, StandInStream, plain
from vllm_pd.transport.base import Transport, TransportOptions

if TYPE_CHECKING:
    import torch
    from ascend_vllm_plugin.settings import Settings

CONNECT_TIMEOUT_S = 10.0


class EngineStandInStream:
    """A stand-in stream with what the transport's engine needs besides."""

    def __init__(self, stream: StandInStream, device: StandInNpu) -> None:
        self._stream = stream
        self._device = device
        self.number = next(_numbers)

    def submit(self, work: Callable[[], object]) -> None:
        self._device.is_drained = False
        self._stream.submit(work)

    def record(self) -> EngineStandInEvent:
        self._device.is_drained = False
        return EngineStandInEvent(self._stream.record())

    def wait(self, mark: Sequence[StandInEvent]) -> None:
        self._device.is_drained = False
        self._stream.wait(mark)

    def abort(self) -> None:
        self._device.num_aborted += 1
        if not self._device.can_abort:
            raise RuntimeError("this device cannot abort")
        self._stream.abort()

    @property
    def handle(self) -> int:
        self._device.num_drained += 1
        self._device.is_drained = True
        return id(self._stream)


class EngineStandInEvent:
    def __init__(self, event: StandInEvent) -> None:
        self._event = event

    @property
    def is_over(self) -> bool:
        return self._event.is_over

    def synchronize(self) -> None:
        self._event.synchronize()


_numbers = itertools.count()


class StandInNpu(StandInDevice):
    """One NPU of a host."""

    def __init__(self, *, soc: str = "Stand-in910", host_index: str | None = None) -> None:
        super().__init__()
        self.soc = soc
        self.host_index = f"s{next(_numbers)}" if host_index is None else host_index
        self.num_drained = self.num_aborted = 0
        self.can_abort = True
        self.is_drained = False
        self.in_call = threading.Lock()
        self.num_drawn = 0
        self._pool = StreamPool(self._draw)

    def make_stream(self) -> Any:
        return self._pool.take()

    def take_back(self, stream: EngineStandInStream) -> None:
        self._pool.put(stream)

    @property
    def has_streams(self) -> bool:
        return self._pool.has_more

    def _draw(self) -> EngineStandInStream:
        self.num_drawn += 1
        return EngineStandInStream(super().make_stream(), self)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Be in a call of HCCL."""
        assert self.in_call.acquire(blocking=False), "two threads in HCCL at once"
        try:
            assert self.is_drained, "HCCL called before torch's queue was empty"
            yield
        finally:
            self.in_call.release()


@dataclass
class Wire:
    """What the two ends of a communicator have in common."""

    joined: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    warmed: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    parcels: queue.SimpleQueue[torch.Tensor] = field(default_factory=queue.SimpleQueue)
    taken: queue.SimpleQueue[bool] = field(default_factory=queue.SimpleQueue)


class StandInBackend(Backend):
    """See the module.

    Attributes:
        refusal: why communicators cannot be created.
        num_made: communicators that were created.
        num_destroyed: and destroyed.
    """

    name = "stand-in"
    wires: dict[bytes, Wire] = {}  # noqa: RUF012 - of all of this process

    def __init__(self, settings: Settings, device: StandInNpu) -> None:
        self._settings = settings
        self.device = device
        self.refusal = ""
        self.num_made = self.num_destroyed = 0

    @property
    def settings(self) -> str:
        return f"{self._settings.buffer_mb} MB"

    @property
    def exec_timeout_s(self) -> float:
        return self._settings.exec_timeout_s

    def make_root(self) -> bytes:
        with self.device.call():
            root = str(next(_numbers)).encode()
            self.wires[root] = Wire()
            return root

    def connect(self, root: bytes, *, is_leader: bool) -> Communicator:
        with self.device.call():
            if self.refusal:
                self.wires[root].joined.abort()
                raise HcclError(self.refusal)
            try:
                self.wires[root].joined.wait(CONNECT_TIMEOUT_S)
            except threading.BrokenBarrierError as exc:
                raise HcclError("the peer did not come") from exc
            self.num_made += 1
            return StandInCommunicator(self, self.wires[root])


class StandInCommunicator(Communicator):
    def __init__(self, backend: StandInBackend, wire: Wire) -> None:
        self._backend = backend
        self._wire = wire
        self._is_warm = False
        self._is_destroyed = False

    def send(self, tensor: torch.Tensor, stream: Any) -> None:
        def work() -> None:
            self._wire.parcels.put(plain(tensor).clone())
            self._wait(self._wire.taken)  # a pair, not a queue

        self._issue(stream, work)

    def recv(self, tensor: torch.Tensor, stream: Any) -> None:
        def work() -> None:
            parcel = self._wait(self._wire.parcels)
            assert parcel.numel() == tensor.numel(), "a Recv of another length than its Send"
            plain(tensor).copy_(parcel)
            self._wire.taken.put(True)

        self._issue(stream, work)

    def check(self) -> None:
        with self._backend.device.call():
            assert not self._is_destroyed

    def destroy(self) -> None:
        with self._backend.device.call():
            assert not self._is_destroyed
            self._is_destroyed = True
            self._backend.num_destroyed += 1

    def _issue(self, stream: EngineStandInStream, work: Callable[[], None]) -> None:
        assert not self._is_destroyed
        _ = stream.handle
        with self._backend.device.call():
            stream.submit(work)
            if not self._is_warm:
                self._is_warm = True
                self._wire.warmed.wait(CONNECT_TIMEOUT_S)

    def _wait(self, parcels: queue.SimpleQueue[Any]) -> Any:
        try:
            return parcels.get(timeout=self._backend.exec_timeout_s)
        except queue.Empty:
            raise RuntimeError("execution timeout") from None


class EngineThread:
    """Pumps a transport, as the thread that computes does between its steps."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._is_over = threading.Event()
        self._is_held = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._is_over.wait(0.001):
                if not self._is_held.is_set():
                    self.transport.pump()
        except BaseException as exc:  # noqa: BLE001 - told to the test by stop
            self.error = exc

    def hold(self) -> None:
        """Compute something that takes long."""
        self._is_held.set()

    def resume(self) -> None:
        self._is_held.clear()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(30.0)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


@dataclass
class Rig:
    """Transports over stand-in NPUs, each with its engine's thread."""

    devices: dict[int, StandInNpu] = field(default_factory=dict)
    backends: list[StandInBackend] = field(default_factory=list)
    engines: list[EngineThread] = field(default_factory=list)

    def make(
        self, options: TransportOptions | None = None, device: StandInNpu | None = None
    ) -> HcclTransport:
        npu = device or StandInNpu()

        def make_backend(settings: Settings, *_: Any) -> Backend:
            self.backends.append(StandInBackend(settings, npu))
            return self.backends[-1]

        transport = HcclTransport(
            options or TransportOptions(), open_device=lambda _: npu, make_backend=make_backend
        )
        self.devices[id(transport)] = npu
        self.engines.append(EngineThread(transport))
        return transport

    def device_of(self, transport: Transport) -> StandInNpu:
        return self.devices[id(transport)]

    def close(self) -> None:
        for engine in self.engines:
            engine.stop()
        for device in self.devices.values():
            device.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
