"""What the supervisor tells the ``up`` that waits for it: JSON lines through a pipe."""

from __future__ import annotations

import contextlib
import os

import msgspec


class ProcessChanged(msgspec.Struct, frozen=True, tag="process"):
    """A process has another status."""

    name: str
    status: str


class DeploymentReady(msgspec.Struct, frozen=True, tag="ready"):
    """Requests can be sent."""


class DeploymentFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The deployment did not come up and is being stopped.

    Attributes:
        message: what happened.
        name: the process that failed; None: none of them, or not known.
    """

    message: str
    name: str | None = None


Event = ProcessChanged | DeploymentReady | DeploymentFailed

_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


class EventWriter:
    """The supervisor's end of the pipe. A reader that has gone is no error."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def send(self, event: Event) -> None:
        """Write one event; never blocks for long, as there are few of them."""
        if self._descriptor is None:
            return
        try:
            os.write(self._descriptor, msgspec.json.encode(event) + b"\n")
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the pipe; idempotent."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None


class EventParser:
    """Bytes of the pipe in, events out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [_decoder.decode(line) for line in lines]
