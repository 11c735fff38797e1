"""Control-plane messages and their encoding (msgpack, one message per frame).

A message names *which* blocks of a prefill are wanted; bytes of KV cache travel
on the transport. Two kinds of endpoints are spoken to, consumer (decode) on the
left::

    instance endpoint (scheduler half)
    Describe      ->                 who are you, where are your workers?
                  <-  InstanceInfo
    Release       ->                 this prefill will not be fetched

    worker endpoint (worker half), one session per consumer worker
    Hello         ->                 layout, fingerprint, transport endpoints
                  <-  Hello          the same of the producer (or Refused)
    FetchBlocks   ->                 "blocks 3 to 9 of transfer T, as fetch 17"
                  <-  FetchReady     the producer has posted its half
                                     (or FetchFailed)
    Goodbye       ->                 the consumer drops the session

A consumer may ask before the producer has computed: the producer parks the
fetch until the lease of its transfer id is granted. Everything is keyed by the
router's transfer id, never by an engine's request id.

Durations cross the wire, instants never do: two processes share no clock.
"""

from __future__ import annotations

import enum

import msgspec

from vllm_pd.errors import RemoteProtocolError

PROTOCOL_VERSION = 1
"""Bump on any change that an older peer would misread.

1: first version.
"""

MAX_FRAME_LEN = 1024 * 1024
"""Largest control frame in bytes; larger ones are dropped by the socket."""

MAX_ID_LEN = 256
"""Longest id that a peer may send, in characters."""


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
    """Geometry of one worker's KV cache.

    Attributes:
        region_names: name of each region, in transfer order.
        block_lens: bytes of one block in each region.
        num_blocks: blocks per region; may differ between peers.
    """

    region_names: tuple[str, ...]
    block_lens: tuple[int, ...]
    num_blocks: int


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
    """Anyone to an instance endpoint: this prefill will not be fetched."""

    transfer_id: str


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
    """Consumer to producer: send these blocks of one prefill.

    Blocks are named by position in the prefill's own list, so a consumer cannot
    name a block that was not leased to it.
    """

    fetch_id: int
    transfer_id: str
    transport: str
    block_offset: int
    num_blocks: int

    def __post_init__(self) -> None:
        if self.block_offset < 0 or self.num_blocks < 1:
            raise ValueError(f"{self.num_blocks} blocks from {self.block_offset}")
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


class Goodbye(Message, frozen=True, tag="goodbye"):
    """Consumer to producer: the session is over."""


AnyMessage = (
    Describe
    | InstanceInfo
    | Release
    | Hello
    | Refused
    | FetchBlocks
    | FetchReady
    | FetchFailed
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
    except (msgspec.DecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"malformed message: {exc}") from exc
