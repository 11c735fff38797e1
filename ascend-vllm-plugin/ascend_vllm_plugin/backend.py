"""What the transport needs of a library that sends from NPU to NPU.

Two backends: ``ctypes`` on libhccl with communicators of our own, and torch_npu's
``ProcessGroupHCCL``. Everything here is called on the engine's thread only, as HCCL
wants the operations of all communicators of a device issued one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vllm_pd.transport.device import DeviceInterface, Mark

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class HcclError(Exception):
    """HCCL refused or failed; one line, with what to do about it."""


class EngineEvent(Protocol):
    """A point in a stream's work."""

    @property
    def is_over(self) -> bool:
        """Whether all work before this point is done; does not wait.

        Raises:
            RuntimeError: the device failed.
        """

    def synchronize(self) -> None:
        """Wait for it."""


class EngineStream(Protocol):
    """Work of the device that runs in order, beside the model's."""

    def submit(self, work: Callable[[], object]) -> None:
        """Call ``work``, whose tensor operations run on this stream."""

    def record(self) -> EngineEvent:
        """Return an event behind all that was submitted so far."""

    def wait(self, mark: Mark) -> None:
        """Let what is submitted from now on run after ``mark``; does not block."""

    def abort(self) -> None:
        """Let the device do nothing more of what was submitted; does not wait for it.

        Raises:
            RuntimeError: it cannot be made to.
        """

    @property
    def handle(self) -> int:
        """``aclrtStream``, after all work that torch has queued was issued to the device."""


class EngineDevice(DeviceInterface, Protocol):
    """The NPU, as the engine's thread sees it."""

    @property
    def soc(self) -> str:
        """Name of the chip."""

    @property
    def host_index(self) -> str:
        """Its number in this container, whatever it is called in this process."""

    def make_stream(self) -> Any:
        """Return an ``EngineStream`` that nobody else has from here.

        Raises:
            RuntimeError: there is none any more.
        """

    def take_back(self, stream: Any) -> None:
        """Take such a stream for the next one who asks: it has nothing to do, and is well."""

    @property
    def has_streams(self) -> bool:
        """Whether ``make_stream`` has one; any thread may ask."""


class Communicator(ABC):
    """Two workers; one of them sends, the other one receives."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        """Issue the sending of bytes; they must not change until the stream has passed it.

        The first one of a communicator blocks until the peer receives.

        Raises:
            HcclError: HCCL refused.
        """

    @abstractmethod
    def recv(self, tensor: torch.Tensor, stream: EngineStream) -> None:
        """Issue the receiving of as many bytes as the peer sends. Otherwise as ``send``."""

    @abstractmethod
    def check(self) -> None:
        """Look for errors that HCCL found meanwhile.

        Raises:
            HcclError: there is one.
        """

    @abstractmethod
    def destroy(self) -> None:
        """Give its memory and sockets back; errors are logged. Nothing of it may be used."""


class Backend(ABC):
    """Makes communicators."""

    name: ClassVar[str]

    @abstractmethod
    def make_root(self) -> bytes:
        """Return what the follower needs to meet the leader; begins to listen for it.

        Raises:
            HcclError: HCCL refused.
        """

    @abstractmethod
    def connect(self, root: bytes, *, is_leader: bool) -> Communicator:
        """Create a communicator; blocks until the peer does the same.

        Raises:
            HcclError: HCCL refused, or the peer did not come.
        """

    @property
    @abstractmethod
    def settings(self) -> str:
        """What both sides must have alike, in words."""
