"""Control-plane messages and their encoding (msgpack, one message per frame).

A message names *which* blocks of a prefill are wanted; bytes of KV cache travel
on the transport. Two kinds of endpoints are spoken to, consumer (decode) on the
left::

    instance endpoint (scheduler half)
    Describe      ->                 who are you, where are your workers?
                  <-  InstanceInfo
    Release       ->                 this prefill will not be fetched
    Renew         ->                 these prefills will be fetched later
    Drain         ->                 keep nothing for consumers any more
    GetOutstanding ->                what is still kept?
                  <-  Outstanding    (answers Drain, too)
    GetStats      ->
                  <-  Stats

    worker endpoint (worker half), one session per consumer worker
    Hello         ->                 layout, fingerprint, transport endpoints
                  <-  Hello          the same of the producer (or Refused)
    FetchBlocks   ->                 "blocks 3 to 9 of transfer T, as fetch 17"
                  <-  FetchReady     the producer has posted its half
                                     (or FetchFailed)
    Release       ->                 this worker is not needed for this prefill
    Goodbye       ->                 the consumer drops the session

A consumer may ask before the producer has computed: the producer parks the
fetch until the lease of its transfer id is granted. Everything is keyed by the
router's transfer id, never by an engine's request id.

Durations cross the wire, instants never do: two processes share no clock.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated

import msgspec

from vllm_pd.config import Digests
from vllm_pd.errors import RemoteProtocolError

PROTOCOL_VERSION = 3
"""Bump on any change that an older peer would misread.

1: first version.
2: heads of blocks, so that tensor-parallel sizes may differ; renewals; digests.
3: fetches of prefills that have not ended: their prompt, and giving them up.
"""

MAX_FRAME_LEN = 1024 * 1024
"""Largest control frame in bytes; larger ones are dropped by the socket."""

MAX_ID_LEN = 256
"""Longest id that a peer may send, in characters."""

MAX_RENEWED = 512
"""Most leases that one ``Renew`` prolongs; more take more messages."""

TransferId = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_LEN)]
"""The router's name of a prefill, checked on arrival."""


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for the bytes of two KV caches to mean the same.

    Attributes:
        model: digest of the checkpoint, or name and revision where it is not a folder.
        dtype: activation dtype, e.g. ``"bfloat16"``.
        kv_cache_dtype: dtype of the KV tensors.
        quantization: weight quantisation method, ``""`` for none.
        num_layers: layers whose KV is exchanged, over all pipeline ranks.
        num_kv_heads: KV heads of the whole model, over all tensor-parallel ranks.
        head_size: elements per head.
        block_size: tokens per block.
        kv_layout: order of dimensions inside a block and how the attention
            kernels pack it, e.g. the instruction set of the CPU kernels.
    """

    model: str
    dtype: str
    kv_cache_dtype: str
    quantization: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    kv_layout: str


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """KV cache of one worker, as its peers need to know it.

    A block of a region consists of ``num_rows`` rows, each of ``num_heads`` heads
    of ``head_len`` bytes. vLLM's CPU layout (blocks, heads, block_size, 2 * head_size)
    has one row per block; the NPU layout (blocks, block_size, heads, head_size)
    has one per token.

    Attributes:
        region_names: layer names, in the order of all region indices.
        num_rows: rows per block, per region.
        head_lens: bytes of one head in one row, per region.
        num_heads: KV heads on this worker, the same in all regions.
        num_blocks: blocks, the same in all regions.
    """

    region_names: tuple[str, ...]
    num_rows: tuple[int, ...]
    head_lens: tuple[int, ...]
    num_heads: int
    num_blocks: int

    @property
    def block_len(self) -> int:
        """Bytes of one block in all regions."""
        rows_of_head = zip(self.num_rows, self.head_lens, strict=True)
        return self.num_heads * sum(rows * length for rows, length in rows_of_head)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all control-plane messages; never sent itself."""


class Describe(Message, frozen=True, tag="describe"):
    """Anyone to an instance endpoint: describe yourself."""


class WorkerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Control endpoint of one worker."""

    tp_rank: int
    host: str
    port: int


class InstanceInfo(Message, frozen=True, tag="instance_info"):
    """Instance endpoint's answer to Describe."""

    protocol_version: int
    engine_id: str
    tp_size: int
    workers: tuple[WorkerAddress, ...]
    fingerprint: Fingerprint | None  # None until the workers have registered their KV
    num_leases: int  # prefills whose blocks still wait for a consumer
    lease_s: float


class Release(Message, frozen=True, tag="release"):
    """Anyone to an instance endpoint: this prefill will not be fetched.

    To a worker endpoint: not from this worker, whatever the others still serve.
    """

    transfer_id: TransferId


class Renew(Message, frozen=True, tag="renew"):
    """Consumer to an instance endpoint: these prefills will be fetched later.

    Each lease starts anew, but none lasts longer than the producer's ``max_lease_s``.
    """

    transfer_ids: Annotated[
        tuple[TransferId, ...], msgspec.Meta(min_length=1, max_length=MAX_RENEWED)
    ]


class Drain(Message, frozen=True, tag="drain"):
    """Anyone to an instance endpoint: keep no blocks for further consumers.

    Leases that exist are served to their end. Answered by Outstanding.
    """

    on: bool = True  # False: keep blocks again


class GetOutstanding(Message, frozen=True, tag="get_outstanding"):
    """Anyone to an instance endpoint: what do you keep for consumers?"""


class Outstanding(Message, frozen=True, tag="outstanding"):
    """Instance endpoint's answer to Drain and GetOutstanding.

    While ``draining``, both numbers only fall.
    """

    num_leases: int
    num_blocks: int
    draining: bool


class GetStats(Message, frozen=True, tag="get_stats"):
    """Anyone to an instance endpoint: what have you counted?"""


class Stats(Message, frozen=True, tag="stats"):
    """Instance endpoint's answer to GetStats."""

    counters: dict[str, float]


class Hello(Message, frozen=True, tag="hello"):
    """Either side, first on every session."""

    protocol_version: int
    engine_id: str
    tp_rank: int
    tp_size: int
    fingerprint: Fingerprint
    layout: KVLayout
    endpoints: dict[str, bytes]  # transport name -> opaque Transport.local_endpoint()


class Refused(Message, frozen=True, tag="refused"):
    """Producer's answer to a Hello that it cannot serve."""

    reason: str


class FetchBlocks(Message, frozen=True, tag="fetch_blocks"):
    """Consumer to producer: send these heads of these blocks of one prefill.

    Blocks are named by position in the prefill's own list, so a consumer cannot
    name a block that was not leased to it. A fetch of no heads moves nothing: it
    tells a producer whose heads are held by others, too, that it is not needed.

    Attributes:
        fetch_id: unique on the consumer's worker.
        transfer_id: the prefill.
        transport: name of the transport to use.
        block_offset: first block.
        num_blocks: number of blocks.
        first_head: first head, counted on the producer's worker.
        num_heads: number of heads; 0 for none.
        num_readers: workers of the consumer's engine that fetch from this producer.
        digests: how much the producer must vouch for.
        timeout_s: how long the consumer waits; the producer gives up before it.
        prompt_digest: of the prompt whose KV is wanted, to be compared; ``""`` if unknown.
    """

    fetch_id: int
    transfer_id: str
    transport: str
    block_offset: int
    num_blocks: int
    first_head: int
    num_heads: int
    num_readers: int
    digests: Digests
    timeout_s: float
    prompt_digest: str = ""

    def __post_init__(self) -> None:
        if self.block_offset < 0 or self.num_blocks < 1:
            raise ValueError(f"{self.num_blocks} blocks from {self.block_offset}")
        if self.first_head < 0 or self.num_heads < 0 or self.num_readers < 1:
            raise ValueError(f"{self.num_heads} heads from {self.first_head}")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s is {self.timeout_s}")
        if len(self.transfer_id) > MAX_ID_LEN:
            raise ValueError("transfer_id is too long")


class FetchReady(Message, frozen=True, tag="fetch_ready"):
    """Producer to consumer: my half of this fetch is posted, post yours."""

    fetch_id: int


class FetchFailure(enum.Enum):
    """Why a producer does not serve a fetch."""

    UNKNOWN_TRANSFER = "unknown_transfer"
    LEASE_ENDED = "lease_ended"
    OUT_OF_RANGE = "out_of_range"
    TRANSPORT = "transport"


class FetchFailed(Message, frozen=True, tag="fetch_failed"):
    """Producer to consumer: this fetch will not be served."""

    fetch_id: int
    failure: FetchFailure
    detail: str


class GiveUp(Message, frozen=True, tag="give_up"):
    """Consumer to producer: nobody wants this fetch any more.

    The answer is FetchFailed, or the FetchReady that is on its way already: then the
    bytes come nevertheless.
    """

    fetch_id: int


class Goodbye(Message, frozen=True, tag="goodbye"):
    """Consumer to producer: the session is over."""


AnyMessage = (
    Describe
    | InstanceInfo
    | Release
    | Renew
    | Drain
    | GetOutstanding
    | Outstanding
    | GetStats
    | Stats
    | Hello
    | Refused
    | FetchBlocks
    | FetchReady
    | FetchFailed
    | GiveUp
    | Goodbye
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Return the payload of one frame."""
    return _encoder.encode(message)


def decode(payload: bytes) -> AnyMessage:
    """Parse the payload of one frame.

    Raises:
        RemoteProtocolError: the peer sent something that is not a message.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"malformed message: {exc}") from exc
