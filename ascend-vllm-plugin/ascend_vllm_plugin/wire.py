"""Frames that two workers exchange over a TCP link beside HCCL, and endpoints.

One link per pair of workers and direction of transfers; the consumer connects. ::

    producer                      consumer
    Ready / Declined  ->                            you are linked, and I have room for you

    leader                        follower          (the worker with the lower id leads)
    Request       ->                                give me your turn, I have mine
                  <-  Grant                         it is yours
                  <-  Present                       my engine's thread waits here
                  <-  Retract                       it could not wait any longer
    Retracted     ->                                understood: nothing has begun
    Begin         ->                                both are here: create the communicator
                  <-  Coming                        I do, and so must you

    producer                      consumer
                  <-  Want                          I have a buffer: send this transfer
    Go            ->                                it is issued: receive it
    Vouch         ->                                a digest of what is in my KV cache
                  <-  Received / Abandoned
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from vllm_pd.config import Digests
from vllm_pd.errors import RemoteProtocolError
from vllm_pd.transport.chunks import Piece


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, as its peers need to know it; part of its endpoint.

    Attributes:
        worker: id of the worker, unique and comparable.
        host: address of its link listener.
        port: port of it.
        boot_id: of its host.
        container: of its process; see ``container_id``.
        device: its NPU, numbered in the container.
        soc: name of the chip.
        backend: name of the backend.
        settings: of the communicators; both sides must have equal ones.
        chunk_len: bytes of one Send.
    """

    worker: str
    host: str
    port: int
    boot_id: str
    device: str
    soc: str
    backend: str
    settings: str
    chunk_len: int
    container: str = ""

    @property
    def place(self) -> str:
        """The container it is in, unique over hosts."""
        return f"{self.boot_id}/{self.container}"


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


class Ready(_Frame, frozen=True, tag="ready"):
    """Producer: first frame; it has taken the link, so who waits for it waits for a live one."""


class Declined(_Frame, frozen=True, tag="declined"):
    """Producer: first and only frame; the consumer closes the link."""

    reason: str


class Request(_Frame, frozen=True, tag="request"):
    """Leader: I have my turn, give me yours."""


class Grant(_Frame, frozen=True, tag="grant"):
    """Follower: my turn is yours."""


class Present(_Frame, frozen=True, tag="present"):
    """Follower: my engine's thread waits for Begin."""


class Retract(_Frame, frozen=True, tag="retract"):
    """Follower: it must go on; is that all right?"""


class Retracted(_Frame, frozen=True, tag="retracted"):
    """Leader: yes. No answer to a Retract that crossed with Begin."""


class Begin(_Frame, frozen=True, tag="begin"):
    """Leader: create the communicator now."""

    root: bytes


class Coming(_Frame, frozen=True, tag="coming"):
    """Follower: Begin has come, and my engine's thread creates the communicator."""


class Want(_Frame, frozen=True, tag="want"):
    """Consumer: its half is posted and it has a buffer."""

    transfer_id: int
    num_blocks: int
    num_bytes: int


class Go(_Frame, frozen=True, tag="go"):
    """Producer: the sending is issued."""

    transfer_id: int
    digests: Digests
    pieces: tuple[Piece, ...] = ()  # blocks that are vouched for, of a sample


class Vouch(_Frame, frozen=True, tag="vouch"):
    """Producer: a digest of one portion of the transfer."""

    transfer_id: int
    portion: int
    digest: bytes


class Received(_Frame, frozen=True, tag="received"):
    """Consumer: everything is in place."""

    transfer_id: int


class Abandoned(_Frame, frozen=True, tag="abandoned"):
    """Consumer: what arrived is not what was sent."""

    transfer_id: int
    reason: str


SetUpFrame: TypeAlias = Present | Retract | Retracted | Begin | Coming
TurnFrame: TypeAlias = Ready | Request | Grant
TransferFrame: TypeAlias = Want | Go | Vouch | Received | Abandoned
AnyFrame: TypeAlias = SetUpFrame | TurnFrame | TransferFrame | Declined

_decoder: msgspec.msgpack.Decoder[AnyFrame] = msgspec.msgpack.Decoder(AnyFrame)
_address_decoder: msgspec.json.Decoder[Address] = msgspec.json.Decoder(Address)


def encode(frame: AnyFrame) -> bytes:
    """Return the payload of a frame."""
    return msgspec.msgpack.encode(frame)


def decode(payload: bytes) -> AnyFrame:
    """Parse a frame.

    Raises:
        msgspec.DecodeError: it is none.
        UnicodeDecodeError: likewise.
    """
    return _decoder.decode(payload)


def parse_address(text: str) -> Address:
    """Parse the address in an endpoint.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        return _address_decoder.decode(text)
    except msgspec.DecodeError as exc:
        raise RemoteProtocolError(f"endpoint of the hccl transport: {exc}") from exc


def why_not(ours: Address, theirs: Address) -> str:
    """Say in one line why two workers cannot have a communicator; ``""`` if they can. Pure."""
    if (ours.boot_id, ours.container, ours.device) == (
        theirs.boot_id,
        theirs.container,
        theirs.device,
    ):
        return (
            f"both workers use NPU {ours.device} of {ours.host}: give the instances different "
            "ASCEND_RT_VISIBLE_DEVICES"
        )
    if ours.soc != theirs.soc:
        return f"different chips: {ours.soc} here, {theirs.soc} there; HCCL links equal ones only"
    if (ours.backend, ours.settings) != (theirs.backend, theirs.settings):
        return (
            f"different HCCL settings: {ours.backend} ({ours.settings}) here, {theirs.backend} "
            f"({theirs.settings}) there; set VLLM_PD_HCCL_BACKEND, VLLM_PD_HCCL_BUFFER_MB and "
            "transfer_timeout_s alike on both sides"
        )
    if ours.chunk_len != theirs.chunk_len:
        return "different versions of ascend-vllm-plugin: install the same on both sides"
    return ""
