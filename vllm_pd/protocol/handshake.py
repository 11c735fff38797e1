"""Decides whether two workers can exchange KV cache, and how. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_pd.errors import IncompatiblePeerError
from vllm_pd.protocol.heads import heads_of_rank

if TYPE_CHECKING:
    from vllm_pd.protocol.messages import Hello


def check_compatible(local: Hello, remote: Hello) -> None:
    """Compare what both sides announced; every difference is reported at once.

    Tensor-parallel sizes may differ; the share of the heads that each side holds
    must be the one that its rank has.

    Raises:
        IncompatiblePeerError: blocks must not be exchanged with this peer. The
            message names each differing field with both values, ours first.
    """
    ours, theirs = local.fingerprint, remote.fingerprint
    facts = [
        ("protocol_version", local.protocol_version, remote.protocol_version),
        *((name, getattr(ours, name), getattr(theirs, name)) for name in ours.__struct_fields__),
        ("region_names", local.layout.region_names, remote.layout.region_names),
        ("num_rows", local.layout.num_rows, remote.layout.num_rows),
        ("head_lens", local.layout.head_lens, remote.layout.head_lens),
    ]
    for name, hello in (("num_heads here", local), ("num_heads there", remote)):
        held = heads_of_rank(hello.tp_rank, hello.tp_size, ours.num_kv_heads)
        facts.append((name, len(held), hello.layout.num_heads))
    differences = [f"{name}: {mine!r} != {its!r}" for name, mine, its in facts if mine != its]
    if differences:
        raise IncompatiblePeerError(
            f"engine {remote.engine_id} rank {remote.tp_rank}: {'; '.join(differences)}",
            hint="start both roles with the same model, dtype and --block-size",
        )


def choose_transport(local_names: Sequence[str], remote_names: Sequence[str]) -> str:
    """Return the first of our transports, best first, that the peer offers too.

    Raises:
        IncompatiblePeerError: there is none.
    """
    for name in local_names:
        if name in remote_names:
            return name
    raise IncompatiblePeerError(
        f"no common transport: ours are {list(local_names)}, the peer's {list(remote_names)}",
        hint='set the same "transport" on both sides',
    )
