"""What a consumer is asked to fetch, and what the parts of it add up to. Pure.

A fetch is an order to one or several workers of a producer: each contributes a part,
and the order ends with the last part that moves bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_pd.errors import PDError
from vllm_pd.protocol.heads import Part
from vllm_pd.protocol.messages import WorkerAddress
from vllm_pd.protocol.state import Fetch, FetchState
from vllm_pd.session.stats import FetchRecord, FetchTimeline, outcome_of


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """Blocks of a remote prefill that a request here needs.

    Attributes:
        request_id: the request here.
        transfer_id: the prefill there.
        remote_engine_id: the producer.
        remote_host: host of its instance endpoint.
        remote_port: port of it.
        block_offset: first block of the prefill that is wanted.
        block_ids: where the blocks go, in this worker's KV cache.
        prompt_digest: of the prompt, for the producer to compare; ``""`` if unknown.
        wait_s: how long the prefill may still take.
    """

    request_id: str
    transfer_id: str
    remote_engine_id: str
    remote_host: str
    remote_port: int
    block_offset: int
    block_ids: tuple[int, ...]
    prompt_digest: str = ""
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The end of a fetch; ``error`` is None when every byte is in place."""

    request_id: str
    block_ids: tuple[int, ...]
    record: FetchRecord
    error: PDError | None = None


@dataclass(slots=True, eq=False)
class Order:
    """A request's blocks, on their way from one or several producer workers.

    Attributes:
        request: what is wanted.
        started: when it was.
        deadline: when to give up.
        num_open: parts that move bytes and have not ended.
        error: the first one of a part.
    """

    request: FetchRequest
    started: float
    deadline: float
    num_open: int = 0
    num_bytes: int = 0
    transport: str = ""
    handshake_s: float = 0.0
    queued_s: float = 0.0
    transfer_s: float = 0.0
    verify_s: float = 0.0
    unseen_s: float = 0.0
    error: PDError | None = None

    def end_part(self, part: OrderPart, now: float, error: PDError | None) -> bool:
        """Take note of the end of a part that moves bytes; return whether it was the last."""
        requested = part.requested or now
        ready = part.ready or now
        self.handshake_s = max(self.handshake_s, requested - self.started)
        self.queued_s = max(self.queued_s, ready - requested)
        self.transfer_s = max(self.transfer_s, now - ready)
        self.error = self.error or error
        self.num_open -= 1
        return not self.num_open

    def result(self, now: float, *, block_len: int) -> FetchResult:
        """Return how the order ended.

        Args:
            now: the end.
            block_len: bytes of one block in all regions.
        """
        request = self.request
        # What the prefill still took is no part of the fetch.
        started = self.started + (self.queued_s if request.wait_s else 0.0)
        record = FetchRecord(
            request_id=request.request_id,
            outcome=outcome_of(self.error),
            transport=self.transport,
            num_bytes=0 if self.error else self.num_bytes,
            num_bytes_saved=request.block_offset * block_len,
            timeline=FetchTimeline(
                handshake_s=self.handshake_s,
                queued_s=self.queued_s,
                transfer_s=self.transfer_s,
                verify_s=self.verify_s,
                total_s=now - started,
                unseen_s=self.unseen_s,
            ),
        )
        return FetchResult(request.request_id, request.block_ids, record, self.error)


@dataclass(slots=True, eq=False)
class OrderPart:
    """What one producer worker contributes to an order, while it has not ended.

    Attributes:
        fetch: its state.
        order: the whole.
        part: which heads.
        worker: the producer's.
        requested: when it was asked for; 0 before.
        ready: when the producer was ready to send; 0 before.
    """

    fetch: Fetch
    order: Order
    part: Part
    worker: WorkerAddress
    requested: float = 0.0
    ready: float = 0.0

    @property
    def moves_bytes(self) -> bool:
        """Whether bytes come, or the worker is only told that it is not needed."""
        return bool(self.part.num_heads)

    @property
    def is_receiving(self) -> bool:
        """Whether bytes may arrive, so that only the transport can end it."""
        return self.fetch.state is FetchState.RECEIVING
