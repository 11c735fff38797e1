"""The queues that a request waits in, and what is noted of its waits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from vllm_pd.config import Role
from vllm_pd.router.admission import Stage
from vllm_pd.router.call import Call
from vllm_pd.router.metrics import Metrics
from vllm_pd.router.record import Record


class Queues:
    """The stages, for requests whose waits are to be known.

    Args:
        stages: who may use the instances, by role.
        metrics: take note of the waits.
    """

    def __init__(self, stages: Mapping[Role, Stage], metrics: Metrics) -> None:
        self._stages = stages
        self._metrics = metrics

    def slot(
        self, role: Role, call: Call, priority: int, num_tokens: int = 1
    ) -> AbstractAsyncContextManager[bool]:
        """Wait for a slot, hold it for the time of the context, and tell there if it took time.

        Args:
            role: of the stage.
            call: the client's request.
            priority: the lower, the earlier.
            num_tokens: what it takes of the client's share.

        Raises:
            OverloadedError: on entry; see ``Stage.slot``.
        """
        held = self._stages[role].slot(call.client.name, priority=priority, cost=num_tokens)
        return _Slot(role, call.record, self._metrics, held)


class _Slot(AbstractAsyncContextManager[bool]):
    __slots__ = ("_held", "_metrics", "_record", "_role")

    def __init__(
        self, role: Role, record: Record, metrics: Metrics, held: AbstractAsyncContextManager[float]
    ) -> None:
        self._role = role
        self._record = record
        self._metrics = metrics
        self._held = held

    async def __aenter__(self) -> bool:
        with self._record.queue(self._role):
            waited_s = await self._held.__aenter__()
        self._record.waited(waited_s)
        self._metrics.note_queue(self._role, waited_s)
        return waited_s > 0

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._held.__aexit__(kind, exc, traceback)
