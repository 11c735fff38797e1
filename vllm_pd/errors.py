"""Every exception this package raises on purpose.

The class tells the caller what to do; the message tells the operator why.

PDError
├── ConfigError              refuse to start
│   └── TransportUnavailableError   this transport cannot reach the KV memory: try the next
├── LaunchError              a process did not start or stop as asked
├── IncompatiblePeerError    refuse the peer, never retry, recompute locally
├── ProtocolError            (abstract)
│   ├── LocalProtocolError   a bug in this process: let it propagate
│   └── RemoteProtocolError  the peer is wrong: close its session
├── TransferError            this transfer is lost: recompute its blocks
│   ├── PeerLostError
│   ├── TransferTimeoutError
│   ├── DigestMismatchError
│   └── LeaseExpiredError
├── NoInstanceError          the router has nowhere to send: HTTP 503
└── OverloadedError          too many requests: HTTP 429
"""

from __future__ import annotations

import math

MAX_RETRY_AFTER_S = 60
"""OpenAI's client libraries may ignore a longer one."""


class PDError(Exception):
    """Base class, for the few places that must catch all of them.

    Args:
        message: what happened, with the ids needed to find it in the logs.
        hint: what the operator can change, when there is such a thing.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} (hint: {self.hint})" if self.hint else message


class ConfigError(PDError):
    """An option is missing, unknown or contradicts another."""


class TransportUnavailableError(ConfigError):
    """A transport cannot be used on this machine or with this KV memory."""


class LaunchError(PDError):
    """An instance, the router or the supervisor did not start or stop as asked."""


class IncompatiblePeerError(PDError):
    """The handshake showed that the two KV caches cannot be exchanged."""


class ProtocolError(PDError):
    """A message or call is not allowed in the current state."""


class LocalProtocolError(ProtocolError):
    """This process broke the protocol."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol."""


class TransferError(PDError):
    """One transfer will not complete; no other transfer is affected."""


class PeerLostError(TransferError):
    """The session or the transport lost the peer."""


class TransferTimeoutError(TransferError):
    """The deadline passed before the last block arrived."""


class DigestMismatchError(TransferError):
    """The bytes that arrived are not those that were sent."""


class LeaseExpiredError(TransferError):
    """The producer freed the blocks before they were fetched, or never had them."""


class NoInstanceError(PDError):
    """No healthy instance of the needed role can take the request."""


class OverloadedError(PDError):
    """There is no place for the request now: HTTP 429.

    Args:
        message: what is full.
        wait_s: in how many seconds the client may expect a place.

    Attributes:
        retry_after_s: the same in whole seconds, for the header ``Retry-After``.
    """

    def __init__(self, message: str, *, wait_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = math.ceil(min(max(wait_s, 1.0), MAX_RETRY_AFTER_S))
