"""The instance endpoint: one per engine, in the process of its scheduler half.

It tells peers and the router who this instance is and where its workers are,
and takes releases of prefills that nobody will fetch. It sleeps in poll when
nothing happens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import zmq

from vllm_pd.config import ConnectorConfig
from vllm_pd.errors import PDError
from vllm_pd.protocol.messages import (
    PROTOCOL_VERSION,
    Describe,
    Fingerprint,
    InstanceInfo,
    Release,
    WorkerAddress,
)
from vllm_pd.session.channel import ControlContext, ControlServer
from vllm_pd.transport.threads import name_this_thread
from vllm_pd.transport.wakeup import Wakeup

logger = logging.getLogger(__name__)

_RELEASE_LINGER_S = 2.0
_MAX_PENDING_RELEASES = 10_000


def send_release(context: ControlContext, host: str, port: int, transfer_id: str) -> None:
    """Tell an instance that a prefill will not be fetched; best effort, never raises."""
    if not context.may_connect(host):
        return
    try:
        client = context.client(host, port)
    except PDError as exc:
        logger.info("release of %s not sent: %s", transfer_id, exc)
        return
    try:
        client.send(Release(transfer_id=transfer_id))
    except PDError as exc:
        logger.info("release of %s not sent: %s", transfer_id, exc)
    finally:
        client.close(linger_s=_RELEASE_LINGER_S)


class InstanceEndpoint:
    """Serves Describe and Release on a thread of its own.

    All public methods may be called from any thread.

    Raises:
        ConfigError: the key or the address cannot be used.
    """

    def __init__(self, config: ConnectorConfig, *, engine_id: str, tp_size: int) -> None:
        self._config = config
        self._engine_id = engine_id
        self._tp_size = tp_size
        self._lock = threading.Lock()
        self._workers: tuple[WorkerAddress, ...] = ()
        self._fingerprint: Fingerprint | None = None
        self._num_leases = 0
        self._releases: list[str] = []
        self._outgoing: list[tuple[str, int, str]] = []
        self._closing = False
        self._wake = Wakeup()
        self._context = ControlContext(config)
        try:
            self._server = self._context.server(config.side_channel_host, config.side_channel_port)
        except PDError:
            self._context.close()
            self._wake.close()
            raise
        self.host, self.port = self._server.host, self._server.port
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def set_workers(
        self, workers: Sequence[WorkerAddress], fingerprint: Fingerprint | None
    ) -> None:
        """Tell what Describe answers, once the workers have registered their KV cache."""
        with self._lock:
            self._workers, self._fingerprint = tuple(workers), fingerprint

    def set_num_leases(self, num_leases: int) -> None:
        """Tell how many prefills wait for a consumer."""
        with self._lock:
            self._num_leases = num_leases

    def take_releases(self) -> list[str]:
        """Return the transfer ids that were released since the last call."""
        if not self._releases:
            return []
        with self._lock:
            releases, self._releases = self._releases, []
        return releases

    def send_release(self, host: str, port: int, transfer_id: str) -> None:
        """Tell another instance that a prefill will not be fetched; best effort."""
        with self._lock:
            self._outgoing.append((host, port, transfer_id))
        self._wake.set()

    def close(self) -> None:
        """Stop the thread; idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake.set()
        self._thread.join(timeout=5.0)
        self._wake.close()

    def _run(self) -> None:
        name_this_thread("inst")
        poller = zmq.Poller()
        poller.register(self._server.socket, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        while not self._closing:
            try:
                poller.poll()
                self._wake.clear()
                self._serve(self._server)
                self._send_releases()
            except Exception:
                logger.exception("instance endpoint: going on after an error")
        self._server.close()
        self._context.close()

    def _serve(self, server: ControlServer) -> None:
        while received := server.receive():
            identity, message = received
            match message:
                case Describe():
                    server.send(identity, self._describe())
                case Release():
                    with self._lock:
                        if len(self._releases) < _MAX_PENDING_RELEASES:
                            self._releases.append(message.transfer_id)
                case _:
                    server.num_dropped["unexpected"] += 1

    def _describe(self) -> InstanceInfo:
        with self._lock:
            return InstanceInfo(
                protocol_version=PROTOCOL_VERSION,
                engine_id=self._engine_id,
                tp_size=self._tp_size,
                workers=self._workers,
                fingerprint=self._fingerprint,
                num_leases=self._num_leases,
                lease_s=self._config.lease_s,
            )

    def _send_releases(self) -> None:
        with self._lock:
            outgoing, self._outgoing = self._outgoing, []
        for host, port, transfer_id in outgoing:
            send_release(self._context, host, port, transfer_id)
