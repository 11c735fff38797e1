"""A producer in a process of its own: prints its endpoint, takes the peer's, sends once."""

from __future__ import annotations

import resource
import sys

from tests.transport_conformance import SESSION, make_worker, outcomes_of
from vllm_pd.config import Digests
from vllm_pd.transport.base import TransportOptions
from vllm_pd.transport.shm import ShmTransport


def main() -> None:
    if sys.argv[1] == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    worker = make_worker("child", ShmTransport(TransportOptions()))
    endpoint = worker.transport.local_endpoint().hex()
    print(*worker.transport.mode, endpoint, sep="\t", flush=True)  # noqa: T201
    worker.transport.add_peer(SESSION, bytes.fromhex(sys.stdin.readline()))
    worker.transport.send_blocks(SESSION, 1, [6, 1, 7], digests=Digests.ALWAYS)
    (outcome,) = outcomes_of(worker)[worker.name]
    print(outcome.error, flush=True)  # noqa: T201
    sys.stdin.read()
    worker.transport.close()


if __name__ == "__main__":
    main()
