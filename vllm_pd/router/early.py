"""A decode leg that is sent before its prefill has ended, to wait at the decode instance."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from vllm_pd.router.decode import Opened
from vllm_pd.router.prefill import Prefilled, is_as_expected
from vllm_pd.router.upstream import UPSTREAM_ERRORS, is_idle_timeout


class Early:
    """A decode leg that is sent before its prefill has ended.

    Attributes:
        broke_at: base URL of the instance where it broke, once it was to be taken; None: nowhere.
    """

    def __init__(self) -> None:
        self.broke_at: str | None = None
        self._base_url = ""
        self._params: Mapping[str, object] = {}
        self._task: asyncio.Task[Opened | None] | None = None
        self._is_sent = False

    def start(
        self,
        base_url: str,
        params: Mapping[str, object],
        pause_s: float,
        send: Callable[[], Awaitable[Opened] | None],
    ) -> None:
        """Send it after that pause, if nobody has asked for it until then.

        Args:
            base_url: of the instance that gets it.
            params: what it waits for.
            pause_s: how long it is not sent.
            send: sends it, if it still may be sent then.
        """
        self._base_url = base_url
        self._params = params
        self._task = asyncio.create_task(self._run(pause_s, send))

    async def _run(
        self, pause_s: float, send: Callable[[], Awaitable[Opened] | None]
    ) -> Opened | None:
        if pause_s > 0:
            await asyncio.sleep(pause_s)
        opening = send()
        if opening is None:
            return None
        self._is_sent = True
        return await opening

    async def take(self, prefilled: Prefilled) -> Opened | None:
        """Return its answer, if it waited for this prefill and none of the two failed."""
        if self._task is None:
            return None
        if not self._is_sent or not is_as_expected(prefilled, self._params):
            self.cancel()
            return None
        task = self._task
        try:
            opened = await asyncio.shield(task)
        except UPSTREAM_ERRORS as exc:
            if not is_idle_timeout(exc):  # it waited for the prefill: silence is not its fault
                self.broke_at = self._base_url
            self._task = None
            del task  # with its error, which keeps this frame and the body that was sent
            return None
        self._task = None
        return opened

    def cancel(self) -> None:
        """Give it up, if nobody has taken it; never waits."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            task.add_done_callback(_close_unwanted)


def _close_unwanted(task: asyncio.Task[Opened | None]) -> None:
    """End an answer that came although its leg was given up."""
    if not task.cancelled() and task.exception() is None and (opened := task.result()):
        opened.close()
