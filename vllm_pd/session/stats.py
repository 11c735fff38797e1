"""What the sessions of a worker count, for the metrics of the engine."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

from vllm_pd.errors import (
    DigestMismatchError,
    IncompatiblePeerError,
    LeaseExpiredError,
    PDError,
    PeerLostError,
    TransferTimeoutError,
)


class Outcome(enum.Enum):
    """How a fetch ended."""

    OK = "ok"
    CORRUPT = "corrupt"
    EXPIRED = "expired"
    TIMEOUT = "timeout"
    PEER_LOST = "peer_lost"
    INCOMPATIBLE = "incompatible"
    ERROR = "error"


_OUTCOMES: tuple[tuple[type[PDError], Outcome], ...] = (
    (DigestMismatchError, Outcome.CORRUPT),
    (LeaseExpiredError, Outcome.EXPIRED),
    (TransferTimeoutError, Outcome.TIMEOUT),
    (PeerLostError, Outcome.PEER_LOST),
    (IncompatiblePeerError, Outcome.INCOMPATIBLE),
)


def outcome_of(error: PDError | None) -> Outcome:
    """Return the label of a fetch that ended with ``error``, None being success."""
    if error is None:
        return Outcome.OK
    return next((label for kind, label in _OUTCOMES if isinstance(error, kind)), Outcome.ERROR)


@dataclass(frozen=True, slots=True)
class FetchTimeline:
    """Where the time of a fetch went, in seconds; the longest of its parts each.

    Attributes:
        handshake_s: until the sessions with the producer's workers were ready.
        queued_s: until the producer had the blocks and was ready to send.
        transfer_s: until the last byte was here.
        verify_s: of that, computing and comparing digests.
        total_s: from the engine's order to the result.
        unseen_s: of the transfer, at most: all was here and the engine's thread, which some
            transports wait for, had not looked.
    """

    handshake_s: float = 0.0
    queued_s: float = 0.0
    transfer_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0
    unseen_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FetchRecord:
    """One fetch that ended.

    Attributes:
        request_id: the request here.
        outcome: how it ended.
        transport: by which the blocks came; ``""`` if it never came to that.
        num_bytes: bytes fetched.
        num_bytes_saved: bytes that were not fetched, being in the prefix cache.
        timeline: where the time went.
    """

    request_id: str
    outcome: Outcome
    transport: str
    num_bytes: int
    num_bytes_saved: int
    timeline: FetchTimeline


@dataclass(slots=True)
class SessionStats:
    """What happened since the last ``SessionManager.take_stats``, and what is now.

    Attributes:
        fetches: fetches that ended.
        num_bytes_sent: bytes that consumers have got from here.
        num_leases_granted: leases that began.
        num_leases_ended: leases that ended, by ``LeaseEnd`` value.
        num_handshake_failures: sessions that did not come about, by outcome value
            on the consumer, ``refused`` on the producer.
        num_dropped_frames: control frames that were ignored, by reason.
        num_leases: leases there are now.
        num_blocks_held: blocks kept for consumers now.
    """

    fetches: list[FetchRecord] = field(default_factory=list)
    num_bytes_sent: int = 0
    num_leases_granted: int = 0
    num_leases_ended: Counter[str] = field(default_factory=Counter)
    num_handshake_failures: Counter[str] = field(default_factory=Counter)
    num_dropped_frames: Counter[str] = field(default_factory=Counter)
    num_leases: int = 0
    num_blocks_held: int = 0
