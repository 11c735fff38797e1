"""Responses that an instance has stored: who has one, and what is asked of it there.

With ``VLLM_ENABLE_RESPONSES_API_STORE=1`` vLLM 0.32 keeps the responses that it made in the
memory of its API server (``entrypoints/openai/responses/serving.py``), so that they can be
fetched, cancelled and continued there, and only there. The router asks the instances
which of them has one. It has nothing to remember for that, so it finds also what another
process of it, or a router that has been restarted, sent there; an id may even be of the
client's choice. What is remembered is only where one was found, for clients that poll.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from vllm_pd.errors import NoInstanceError
from vllm_pd.router.body import RESPONSES
from vllm_pd.router.call import Call
from vllm_pd.router.instance import Instance, State
from vllm_pd.router.instances import InstancePool
from vllm_pd.router.upstream import UPSTREAM_ERRORS, Upstream

_ID = r"[A-Za-z0-9_][A-Za-z0-9_.:~-]{0,255}"
"""Nothing that could lead to another endpoint of an instance; vLLM's own begin with ``resp_``."""

GET_ROUTE = f"{RESPONSES}/{{response_id:{_ID}}}"
CANCEL_ROUTE = f"{GET_ROUTE}/cancel"

ASK_TIMEOUT_S = 5.0
"""Longest wait for an instance to say whether it has a response."""

MAX_KNOWN = 4096
"""Responses of which is remembered where they were found."""

_is_id = re.compile(_ID).fullmatch


class StoredResponses:
    """Finds the instances of stored responses.

    Args:
        pool: the instances; all of them are asked, as any may have been a decode instance.
        upstream: HTTP to them.
    """

    def __init__(self, pool: InstancePool, upstream: Upstream) -> None:
        self._pool = pool
        self._upstream = upstream
        self._known: OrderedDict[str, str] = OrderedDict()  # base URLs, by id
        pool.subscribe(self._forget)

    async def speaker(self, call: Call) -> Instance:
        """Return the instance to answer a request for a stored response.

        It is the one that has it. If nobody has it, any one says so.

        Raises:
            NoInstanceError: there is nobody to ask, or somebody who may have it is silent.
        """
        owner, speaker = await self._find(call, call.request.match_info["response_id"])
        return owner or speaker

    async def owner_of_previous(self, call: Call, body: Mapping[str, Any]) -> Instance | None:
        """Return the instance that has to answer, because it has what is to be continued.

        None if any other may as well: the body continues nothing, or what nobody has.

        Raises:
            NoInstanceError: somebody who may have it is silent.
        """
        previous = body.get("previous_response_id")
        if call.path != RESPONSES or not isinstance(previous, str) or not _is_id(previous):
            return None
        owner, _ = await self._find(call, previous)
        return owner if owner is not None and self._pool.is_accepting(owner) else None

    async def _find(self, call: Call, response_id: str) -> tuple[Instance | None, Instance]:
        """Return who has a response, if anybody has, and who can speak for all."""
        candidates = [one for one in self._pool if one.healthy]
        if not candidates:
            raise NoInstanceError("No instance is available.")
        here = list(self._pool)
        if len(here) == 1:
            return here[0], here[0]
        if (known := self._known_owner(response_id)) is not None:
            return known, known
        found = await asyncio.gather(*(self._ask(call, one, response_id) for one in candidates))
        here = list(self._pool)  # without those that have been removed meanwhile
        answers = zip(candidates, found, strict=True)
        statuses = {one: status for one, status in answers if one in here}
        owner = next((one for one, status in statuses.items() if status == 200), None)
        if owner is not None:
            self._remember(response_id, owner)
            return owner, owner
        is_silent = any(not one.healthy and one.state is not State.STARTING for one in here)
        if not statuses or is_silent or None in statuses.values():
            raise NoInstanceError("An instance that may have the response does not answer.")
        # One that says anything but "not found" has more to tell.
        return None, max(statuses, key=lambda one: statuses[one] != 404)

    def _known_owner(self, response_id: str) -> Instance | None:
        known = self._known.get(response_id)
        owner = next((one for one in self._pool if one.base_url == known), None)
        if owner is None:
            return None
        if not owner.healthy:
            raise NoInstanceError("The instance that has the response does not answer.")
        self._known.move_to_end(response_id)
        return owner

    def _forget(self, instance: Instance) -> None:
        """Forget what was found at an instance, which has lost it or is gone."""
        for response_id in [key for key, url in self._known.items() if url == instance.base_url]:
            del self._known[response_id]

    async def _ask(self, call: Call, instance: Instance, response_id: str) -> int | None:
        """Return the status with which an instance answers for a response; None: it does not."""
        url = f"{instance.base_url}{RESPONSES}/{response_id}"
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                answer = await self._upstream.decode("GET", url, call.headers, None)
        except UPSTREAM_ERRORS:
            return None
        answer.close()
        return answer.status

    def _remember(self, response_id: str, instance: Instance) -> None:
        self._known[response_id] = instance.base_url
        self._known.move_to_end(response_id)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
