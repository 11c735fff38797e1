"""Which KV heads a tensor-parallel rank holds, and from whom another engine gets them. Pure.

vLLM gives every rank the same number of KV heads: an equal share where there are
at least as many heads as ranks, and one head where there are fewer, so that
several ranks hold a copy of it. A cache that all ranks hold whole, as that of
multi-head latent attention, is one head.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vllm_pd.errors import IncompatiblePeerError


@dataclass(frozen=True, slots=True)
class Part:
    """What one consumer rank does with one producer rank, for every block.

    Attributes:
        remote_rank: the producer's rank.
        remote_head: first head to read, counted on the producer's rank.
        local_head: where it goes, counted on the consumer's rank.
        num_heads: heads to read; 0 if this rank only tells the producer's rank
            that nobody reads from it.
        num_readers: ranks of the consumer's engine that read from the producer's rank.
    """

    remote_rank: int
    remote_head: int
    local_head: int
    num_heads: int
    num_readers: int


def heads_of_rank(tp_rank: int, tp_size: int, num_kv_heads: int) -> range:
    """Return the heads of the whole model that a rank holds.

    Raises:
        IncompatiblePeerError: no such rank, or the heads do not divide evenly.
    """
    if not 0 <= tp_rank < tp_size or num_kv_heads < 1:
        raise IncompatiblePeerError(f"rank {tp_rank} of {tp_size}, {num_kv_heads} KV heads")
    if max(tp_size, num_kv_heads) % min(tp_size, num_kv_heads):
        raise IncompatiblePeerError(
            f"{num_kv_heads} KV heads do not divide among {tp_size} tensor-parallel ranks"
        )
    if num_kv_heads < tp_size:
        head = tp_rank * num_kv_heads // tp_size
        return range(head, head + 1)
    share = num_kv_heads // tp_size
    return range(tp_rank * share, (tp_rank + 1) * share)


def plan_parts(
    tp_rank: int, *, tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> tuple[Part, ...]:
    """Return the producer ranks that a consumer rank talks to, in the order of ranks.

    Every head comes from exactly one producer rank; where several hold it, the
    consumer's ranks spread over them. Every producer rank is spoken to by at least
    one consumer rank, because it frees the blocks only when it has been told.

    Args:
        tp_rank: the consumer's rank.
        tp_size: the consumer's tensor-parallel size.
        remote_tp_size: the producer's.
        num_kv_heads: KV heads of the whole model.

    Raises:
        IncompatiblePeerError: the heads do not divide evenly on one side, or it has no
            ranks.
    """
    heads_of_rank(0, remote_tp_size, num_kv_heads)
    reads = {
        rank: _reads_of(rank, tp_size, remote_tp_size, num_kv_heads) for rank in range(tp_size)
    }
    num_readers = Counter(remote for remotes in reads.values() for remote in remotes)
    parts = [
        Part(remote, remote_head, local_head, num_heads, num_readers[remote])
        for remote, (remote_head, local_head, num_heads) in reads[tp_rank].items()
    ]
    parts += [
        Part(remote, 0, 0, 0, 1)
        for remote in range(remote_tp_size)
        if not num_readers[remote] and remote % tp_size == tp_rank
    ]
    return tuple(sorted(parts, key=lambda part: part.remote_rank))


def _reads_of(
    tp_rank: int, tp_size: int, remote_tp_size: int, num_kv_heads: int
) -> dict[int, tuple[int, int, int]]:
    """Return ``(remote_head, local_head, num_heads)`` by remote rank."""
    wanted = heads_of_rank(tp_rank, tp_size, num_kv_heads)
    num_copies = max(remote_tp_size // num_kv_heads, 1)
    reads = {}
    for remote in range(remote_tp_size):
        held = heads_of_rank(remote, remote_tp_size, num_kv_heads)
        first, last = max(wanted.start, held.start), min(wanted.stop, held.stop)
        is_chosen = remote % num_copies == tp_rank % num_copies
        if first < last and is_chosen:
            reads[remote] = (first - held.start, first - wanted.start, last - first)
    return reads
