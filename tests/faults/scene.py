"""What a test needs: a survivor here, victims and new peers in processes of their own."""

from __future__ import annotations

from typing import Any

from tests.faults.engine import Engine, make_engine
from tests.faults.leaks import check_nothing_is_left, holdings
from tests.faults.nursery import EngineProcess, Nursery, Setup
from vllm_pd.config import ConnectorConfig
from vllm_pd.session.stats import SessionStats

PATIENT = ConnectorConfig(lease_s=60.0, handshake_timeout_s=15.0, transfer_timeout_s=15.0)


class Scene:
    """One survivor and its peers.

    Args:
        nursery: where the peers come from.
        kind: of transport.
    """

    def __init__(self, nursery: Nursery, kind: str) -> None:
        self._nursery = nursery
        self._kind = kind
        self._before = holdings()
        self._alone = self._before
        self._engine: Engine | None = None
        self._peers: list[EngineProcess] = []

    def survivor(self, owner: str, config: ConnectorConfig) -> Engine:
        """Start the survivor."""
        self._engine = make_engine(self._kind, owner, config)
        self._alone = holdings()
        return self._engine

    def peer(self, role: str, **setup: Any) -> EngineProcess:
        """Start a peer, which ends with the test at the latest."""
        setup = {"kind": self._kind, "role": role, "config": PATIENT, **setup}
        self._peers.append(self._nursery.start(Setup(**setup)))
        return self._peers[-1]

    def stats(self) -> SessionStats:
        """Return what the survivor has counted since the last call."""
        assert self._engine is not None
        stats = self._engine.manager.take_stats()
        assert stats is not None
        return stats

    def check_survival(self) -> None:
        """The survivor serves, reports nothing twice, and holds nothing of dead peers."""
        assert self._engine is not None
        peer = self._serve_a_new_peer(self._engine)
        peer.kill()
        results = self._engine.manager.take_results()
        assert (results.freed, results.fetched) == ([], [])
        stats = self.stats()
        assert (stats.num_leases, stats.num_blocks_held) == (0, 0)

    def check_that_it_holds_nothing_of_its_peers(self) -> None:
        """Kill all peers; their descriptors, mappings and threads must go."""
        for peer in self._peers:
            peer.kill()
        check_nothing_is_left(self._alone, allowed=("thread ",))  # that copies

    def close(self) -> None:
        """End everything; nothing at all may be left of it."""
        for peer in self._peers:
            peer.kill()
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        check_nothing_is_left(self._before)

    def _serve_a_new_peer(self, engine: Engine) -> EngineProcess:
        if engine.owner == "consumer":
            peer = self.peer("producer")
            peer.ask(grant="new")
            engine.fetch(peer.address, "new")
            assert engine.wait_fetched().error is None
            assert engine.wrong_blocks("producer") == []
            return peer
        peer = self.peer("consumer")
        peer.tell(fetch="new", producer=engine.address, wait=True)
        engine.grant("new")
        answer = peer.receive()
        assert (answer.error, answer.is_right) == (None, True)
        assert engine.wait(lambda results: bool(results.freed)).freed == ["prefill-new"]
        return peer
