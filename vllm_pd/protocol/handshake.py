"""Decides whether two workers can exchange KV cache, and how. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_pd.errors import IncompatiblePeerError

if TYPE_CHECKING:
    from vllm_pd.protocol.messages import Hello


def check_compatible(local: Hello, remote: Hello) -> None:
    """Compare what both sides announced; every difference is reported at once.

    Raises:
        IncompatiblePeerError: blocks must not be exchanged with this peer. The
            message names each differing field with both values, ours first.
    """
    ours, theirs = local.fingerprint, remote.fingerprint
    facts = [
        ("protocol_version", local.protocol_version, remote.protocol_version),
        *((name, getattr(ours, name), getattr(theirs, name)) for name in ours.__struct_fields__),
        ("tp_size", local.tp_size, remote.tp_size),
        ("tp_rank", local.tp_rank, remote.tp_rank),
        ("region_names", local.layout.region_names, remote.layout.region_names),
        ("block_lens", local.layout.block_lens, remote.layout.block_lens),
    ]
    differences = [f"{name}: {mine!r} != {its!r}" for name, mine, its in facts if mine != its]
    if differences:
        raise IncompatiblePeerError(
            f"engine {remote.engine_id} rank {remote.tp_rank}: {'; '.join(differences)}",
            hint="start both roles with the same model, dtype, --block-size and "
            "tensor-parallel size",
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
