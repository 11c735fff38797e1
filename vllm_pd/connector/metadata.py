"""What the scheduler half tells the worker half, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from vllm_pd.session.fetches import FetchRequest
from vllm_pd.session.producer import Grant


@dataclass
class PDConnectorMetadata(KVConnectorMetadata):
    """One step's news; picklable, as vLLM sends it between processes.

    Attributes:
        loads: remote prefills to fetch.
        grants: prefills that finished here and wait for a consumer.
        releases: transfer ids that nobody will fetch.
        renewals: transfer ids that will be fetched later.
        aborted_loads: requests that were aborted and whose fetch may not have ended.
        failed_loads: request ids whose load could not even be planned, and their blocks.
        num_blocks_saved: blocks of prompts of which nothing is fetched, because the
            prefix cache has them.
        computes: whether the model runs in this step.
    """

    loads: list[FetchRequest] = field(default_factory=list)
    grants: list[Grant] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    renewals: list[str] = field(default_factory=list)
    aborted_loads: list[str] = field(default_factory=list)
    failed_loads: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    num_blocks_saved: int = 0
    computes: bool = True


@dataclass
class PDHandshakeMetadata(KVConnectorHandshakeMetadata):
    """Where a worker's control endpoint is; goes to the scheduler half once.

    Attributes:
        tp_rank: the worker's tensor-parallel rank.
        host: host of its control endpoint.
        port: port of it.
        fingerprint: encoded ``protocol.messages.Fingerprint``.
    """

    tp_rank: int
    host: str
    port: int
    fingerprint: bytes
