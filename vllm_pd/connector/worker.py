"""Worker half of the connector: drives the sessions and reports to vLLM.

It runs on the engine's worker thread. Everything slow happens on the session
thread; the hooks here hand work over and collect results.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_pd.config import ConnectorConfig
from vllm_pd.connector.geometry import check_kv_caches
from vllm_pd.connector.kv_cache import KVCaches, memory_order, to_layout, to_regions
from vllm_pd.errors import ConfigError
from vllm_pd.protocol.heads import heads_of_rank
from vllm_pd.protocol.messages import Fingerprint
from vllm_pd.session.fetches import FetchRequest
from vllm_pd.session.keys import load_cluster_key
from vllm_pd.session.manager import LocalWorker, SessionManager
from vllm_pd.session.producer import Grant
from vllm_pd.session.stats import SessionStats
from vllm_pd.transport.base import Transport, TransportOptions
from vllm_pd.transport.registry import open_transports

logger = logging.getLogger(__name__)

FETCH_WAIT_S = 0.01
"""Longest time that a step without computation waits; requests that arrive wait as long."""


PUMP_INTERVAL_S = 0.001
"""Pause between two looks of such a step at what a transport has for this thread to do."""

LANDING_WAIT_S = 0.002
"""Longest wait for the session thread to say what became of what a transport has ended.

A result that is not there yet costs its request a whole step. The wait is in vain where what
ended was not the last part of a fetch.
"""


class PDConnectorWorker:
    """One worker's part in transfers.

    Args:
        config: of the connector.
        engine_id: this engine.
        tp_rank: this worker's tensor-parallel rank.
        tp_size: number of ranks.
        fingerprint: of this worker's KV cache.
        additional_config: vLLM's, for the checks of a device plugin.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        engine_id: str,
        tp_rank: int,
        tp_size: int,
        fingerprint: Fingerprint,
        additional_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._config = config
        self._engine_id = engine_id
        self.tp_rank = tp_rank
        self._tp_size = tp_size
        self.fingerprint = fingerprint
        self._additional_config = additional_config or {}
        self._manager: SessionManager | None = None
        self._block_len = 0
        self._num_bytes_saved = 0
        self._num_fetching = 0
        self._invalid_block_ids: set[int] = set()
        self._not_started: list[tuple[str, tuple[int, ...]]] = []
        self._transports: dict[str, Transport] = {}
        self._refused: dict[str, str] = {}
        self._pumped: list[Transport] = []

    def register_kv_caches(self, kv_caches: KVCaches) -> None:
        """Open the transports on the KV cache and start the session thread.

        On a device, the order of a block's contents in memory joins the fingerprint.

        Raises:
            ConfigError: the KV cache, a transport or the key cannot be used.
        """
        ours = self.fingerprint
        check_kv_caches(kv_caches, ours.block_size, self._additional_config)
        num_heads = len(heads_of_rank(self.tp_rank, self._tp_size, ours.num_kv_heads))
        regions = to_regions(kv_caches, num_heads=num_heads, block_size=ours.block_size)
        layout = to_layout(regions)
        self._block_len = layout.block_len
        if any(region.device != "cpu" for region in regions):
            order = memory_order(kv_caches, num_heads=num_heads, block_size=ours.block_size)
            kv_layout = f"{ours.kv_layout}:{order}"
            self.fingerprint = msgspec.structs.replace(ours, kv_layout=kv_layout)
        transports, self._refused = open_transports(
            self._config.transport_names, regions, self._transport_options()
        )
        self._transports = transports
        self._pumped = [transport for transport in transports.values() if transport.needs_pump]
        local = LocalWorker(self._engine_id, self.tp_rank, self._tp_size, self.fingerprint, layout)
        self._manager = SessionManager(self._config, local, transports)
        logger.info(
            "engine %s rank %d: %d KV regions of %d blocks, transports %s, control port %d",
            self._engine_id,
            self.tp_rank,
            len(regions),
            layout.num_blocks,
            ", ".join(f"{name} ({t.mode[0]})" for name, t in transports.items()),
            self._manager.port,
        )

    def _transport_options(self) -> TransportOptions:
        config = self._config
        certificate = private_key = None
        if config.tls:
            assert config.cluster_key_file is not None
            key = load_cluster_key(Path(config.cluster_key_file))
            certificate, private_key = key.certificate, key.private_key
            if certificate is None:
                raise ConfigError(
                    f"{config.cluster_key_file} has no certificate for TLS",
                    hint="it is of an older version: make a new one with vllm-pd keygen",
                )
        return TransportOptions(
            host=config.side_channel_host,
            num_copy_threads=config.num_copy_threads,
            num_streams=config.num_streams,
            staging_len=config.staging_len,
            transfer_timeout_s=config.transfer_timeout_s,
            certificate=certificate,
            private_key=private_key,
        )

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of the control endpoint; None before registration."""
        return (self._manager.host, self._manager.port) if self._manager else None

    def start(
        self,
        loads: Iterable[FetchRequest],
        grants: Iterable[Grant],
        releases: Iterable[str],
        renewals: Iterable[str] = (),
        aborted_loads: Iterable[str] = (),
    ) -> None:
        """Hand one step's news to the session thread."""
        for request in loads:
            if self._manager is None:
                self._not_started.append((request.request_id, request.block_ids))
            else:
                self._manager.fetch(request)
                self._num_fetching += 1
        if self._manager is not None:
            for grant in grants:
                self._manager.grant(grant)
            for transfer_id in releases:
                self._manager.release(transfer_id)
            for transfer_id in renewals:
                self._manager.renew(transfer_id)
            for request_id in aborted_loads:
                self._manager.give_up(request_id)

    def fail(self, loads: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Report loads as failed, with their blocks, at the next ``get_finished``."""
        self._not_started += loads

    def pump(self) -> bool:
        """Let transports issue what only the thread that computes may issue.

        Returns:
            Whether something of it has ended.
        """
        has_ended = False
        for transport in self._pumped:
            has_ended |= transport.pump()
        return has_ended

    def wait_for_fetch(self) -> None:
        """Let a fetch that is under way have this core, for a moment or until it ends.

        For steps in which the engine has nothing to compute: vLLM makes one after the
        other until the blocks are there, which takes interpreter and core from the threads
        that copy, and the last of them ends long after the fetch. Transports that need this
        thread get it every now and then.
        """
        if self._manager is None or not self._num_fetching:
            return
        deadline = time.monotonic() + FETCH_WAIT_S
        while (left_s := deadline - time.monotonic()) > 0:
            if self._manager.wait_results(min(left_s, PUMP_INTERVAL_S) if self._pumped else left_s):
                return
            self.pump()

    def get_finished(self) -> tuple[set[str], set[str]]:
        """Return ``(finished_sending, finished_recving)`` since the last call.

        A failed fetch is among the received, with its blocks in
        ``take_invalid_block_ids``: vLLM 0.32 frees or recomputes only requests
        that are reported as received.
        """
        finished_recving: set[str] = set()
        for request_id, block_ids in self._not_started:
            finished_recving.add(request_id)
            self._invalid_block_ids.update(block_ids)
        self._not_started = []
        if self._manager is None:
            return set(), finished_recving
        self._pump_for_results(self._manager)
        results = self._manager.take_results()
        self._num_fetching -= len(results.fetched)
        for fetched in results.fetched:
            finished_recving.add(fetched.request_id)
            if fetched.error is None:
                logger.debug(
                    "%s: %d bytes in %.1f ms",
                    fetched.request_id,
                    fetched.record.num_bytes,
                    fetched.record.timeline.total_s * 1e3,
                )
                continue
            logger.warning(
                "%s: KV not received, vLLM recomputes it: %s", fetched.request_id, fetched.error
            )
            self._invalid_block_ids.update(fetched.block_ids)
        return set(results.freed), finished_recving

    def _pump_for_results(self, manager: SessionManager) -> None:
        """Pump once more, so that what ended meanwhile is not reported a step late.

        Never raises: an error of a plugin must not cost the reports that are there.
        """
        try:
            has_ended = self.pump()
        except Exception:
            logger.exception("a transport failed where the engine's thread looks after it")
            return
        if has_ended and self._num_fetching:
            manager.wait_results(LANDING_WAIT_S)

    def add_saved_blocks(self, num_blocks: int) -> None:
        """Count blocks of prompts that the prefix cache has whole, so that none is fetched."""
        self._num_bytes_saved += num_blocks * self._block_len

    def take_num_bytes_saved(self) -> int:
        """Return the bytes of those blocks since the last call."""
        taken, self._num_bytes_saved = self._num_bytes_saved, 0
        return taken

    def take_stats(self) -> SessionStats | None:
        """Return what happened since the last call; None for nothing."""
        return self._manager.take_stats() if self._manager is not None else None

    def transport_info(self) -> dict[str, tuple[str, str]]:
        """Return ``(mode, reason)`` of every transport that was wanted, as they are now."""
        info = {name: transport.mode for name, transport in self._transports.items()}
        return info | {name: ("unavailable", why) for name, why in self._refused.items()}

    def take_invalid_block_ids(self) -> set[int]:
        """Return the blocks of failed fetches that ``get_finished`` has reported."""
        invalid, self._invalid_block_ids = self._invalid_block_ids, set()
        return invalid

    def close(self) -> None:
        """Stop the session thread and close the transports; idempotent."""
        if self._manager is not None:
            self._manager.close()
