"""What one client's request has broken so far, and how much of the fleet it may break. Pure."""

from __future__ import annotations

from vllm_pd.config import Role
from vllm_pd.router.upstream import has_reached, is_idle_timeout

MAX_BROKEN = 3
"""Attempts of one request, on both of its legs, that may break at an instance.

Three, so that no request is lost to the death of a prefill and of a decode instance. Not four: what
has broken three instances is more likely to be a prompt that engines cannot stand than bad luck,
and every further attempt would cost one more engine.
"""

_BUSY = 503


class Attempts:
    """Counts the attempts of one client's request that broke at an instance.

    An instance that could not be connected to, or that said it had too much to do, has not
    suffered from the request: those may be as many as there are instances.

    Attributes:
        failure: status and message for the client, by the last attempt without an answer.
    """

    def __init__(self) -> None:
        self._num_broken = 0
        self.failure: tuple[int, str] | None = None

    @property
    def are_spent(self) -> bool:
        """Whether no further instance may be risked."""
        return self._num_broken >= MAX_BROKEN

    def note_error(self, exc: BaseException, role: Role) -> None:
        """Take note of an attempt that got no answer."""
        self.failure = failure_of(exc, role)
        if has_reached(exc):
            self._num_broken += 1

    def note_status(self, status: int) -> None:
        """Take note of an attempt that got an answer."""
        if status >= 500 and status != _BUSY:
            self._num_broken += 1


def failure_of(exc: BaseException, role: Role) -> tuple[int, str]:
    """Return status and message for a client whose instance failed."""
    if is_idle_timeout(exc):
        return 504, f"The {role.value} instance did not answer in time."
    return 502, f"The {role.value} instance failed."
