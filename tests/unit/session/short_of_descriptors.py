"""A program that runs out of descriptors and gets them back; see ``test_bad_conditions``.

python -m tests.unit.session.short_of_descriptors shm|tcp
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from tests.unit.session.intruders import Counts, check_service
from tests.unit.session.test_manager import Engine, fetch_request, make_engine
from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PDError
from vllm_pd.session.producer import Grant
from vllm_pd.transport.base import Transport
from vllm_pd.transport.shm import ShmTransport
from vllm_pd.transport.tcp import TcpTransport

CONFIG = ConnectorConfig(lease_s=0.5, handshake_timeout_s=1.0, transfer_timeout_s=1.0)
KINDS: dict[str, type[Transport]] = {"shm": ShmTransport, "tcp": TcpTransport}


def main() -> None:
    kind = KINDS[sys.argv[1]]
    consumer = make_engine(CONFIG, kind=kind)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_failed = 0
    for num_spare in range(13):
        producer = make_engine(CONFIG, kind=kind)  # a new one, so that sockets are needed
        counts = Counts(producer)
        last = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + num_spare, hard))
        fillers = fill_gaps(num_spare)
        num_failed += fetch_once(producer, consumer, f"short-{num_spare}") is not None
        for descriptor in fillers:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wait_for_service(producer, consumer)
        check_service(producer, consumer)
        counts.check_accounts()
        producer.close()
    assert num_failed > 2, num_failed
    consumer.close()


def wait_for_service(producer: Engine, consumer: Engine) -> None:
    """Fetch until it works: an instance that did not answer is left alone for a while."""
    for number in range(30):
        if fetch_once(producer, consumer, f"again-{number}") is None:
            return
    raise AssertionError("fetches still fail")


def fill_gaps(num_spare: int) -> list[int]:
    """Take all descriptors below the limit, but for as many as are to be spared."""
    fillers: list[int] = []
    while True:
        try:
            fillers.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            break
    for _ in range(min(num_spare, len(fillers))):
        os.close(fillers.pop())
    return fillers


def fetch_once(producer: Engine, consumer: Engine, transfer_id: str) -> PDError | None:
    """A fetch ends once, whatever becomes of it, and its blocks are freed once."""
    producer.manager.grant(Grant(transfer_id, f"prefill-{transfer_id}", (6, 2)))
    consumer.manager.fetch(fetch_request(producer, transfer_id))
    error = consumer.wait_fetched().error
    freed = producer.wait(lambda results: bool(results.freed)).freed
    assert freed == [f"prefill-{transfer_id}"], freed
    return error


if __name__ == "__main__":
    main()
