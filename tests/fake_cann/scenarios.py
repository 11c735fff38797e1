"""What ranks do in the tests of the double; see ``ranks``."""

from __future__ import annotations

from typing import Any

from tests.fake_cann.abi import comm_config
from tests.fake_cann.ranks import Rank


def send_and_receive(rank: Rank) -> dict[str, Any]:
    """Rank 0 sends 3 MiB through a buffer of 1 MB."""
    content = bytes(range(256)) * (3 << 12)
    comm = rank.communicator(comm_config(buffer_mb=1))
    stream = rank.lib.stream()
    if rank.rank == 0:
        code = rank.send(rank.lib.device_memory(content), len(content), comm, stream)
        return {
            "issue": code,
            "end": rank.synchronize(stream),
            "chunks": rank.lib.hccl.fakeHcclNumChunks(),
        }
    memory = rank.lib.device_memory(bytes(len(content)))
    code = rank.recv(memory, len(content), comm, stream)
    end = rank.synchronize(stream)
    return {"issue": code, "end": end, "equal": rank.lib.read(memory, len(content)) == content}
