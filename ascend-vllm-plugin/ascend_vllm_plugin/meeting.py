"""The threads of two engines meet, so that both create a communicator at the same time.

Creating one blocks until the peer does it, too, and an engine's thread has others
that wait for it: its ranks compute together. If rank 0 waited for a peer whose own
rank 1 waits for this engine's rank 1, nobody would go on. So nobody waits long: an
engine's thread waits a moment in each step, and creates the communicator only when it
is certain that the other one is there and will do the same.

The follower says Present and waits; the leader says Begin if both are there. A
follower that cannot wait any longer asks for leave first, as Begin may be on its way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ascend_vllm_plugin.backend import HcclError
from ascend_vllm_plugin.wire import Begin, Coming, Present, Retract, Retracted, SetUpFrame
from vllm_pd.errors import RemoteProtocolError

ANSWER_TIMEOUT_S = 5.0
"""Longest wait for the peer's answer where a step cannot go on without: to Retract, which its
session thread gives, so within a round trip; or to Begin, which its engine's thread waits for.
Whoever does not get one fails the set-up, and with it the fetch that waited for it.
"""


class Meeting:
    """One side of a meeting. The engine's thread attends, the session's thread tells it news.

    Args:
        is_leader: which side.
        post: sends a frame to the peer; called by either thread.
    """

    def __init__(self, *, is_leader: bool, post: Callable[[SetUpFrame], None]) -> None:
        self.is_leader = is_leader
        self._post = post
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_other_here = False  # leader: the follower's Present holds
        self._has_begun = False
        self._has_leave = False  # follower: Retracted has come
        self._is_coming = False  # leader: Coming has come
        self.root = b""

    @property
    def is_settled(self) -> bool:
        """Whether both sides ask HCCL for the communicator, or have done so."""
        return self._is_coming if self.is_leader else self._has_begun

    # The engine's thread

    def attend(self, window_s: float) -> bool:
        """Wait for the other side; return whether both are here and must go on.

        Args:
            window_s: how long.

        Raises:
            HcclError: the peer is gone, or does not answer.
        """
        return self._lead(window_s) if self.is_leader else self._follow(window_s)

    def begin(self, root: bytes) -> None:
        """Leader: send the follower on, and wait until it says that it comes.

        If the peer is lost before, nothing has begun here. If this worker is lost after
        Begin, the follower is held by HCCL until HCCL_CONNECT_TIMEOUT: one of the two
        must go first.

        Raises:
            HcclError: the peer is gone, or does not answer.
        """
        self._post(Begin(root=root))
        with self._changed:
            if not self._wait(lambda: self._is_coming, ANSWER_TIMEOUT_S):
                raise HcclError("the peer does not answer")

    def _lead(self, window_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_other_here or self._is_closed, window_s)
            self._check()
            self._has_begun = self._is_other_here
            return self._has_begun

    def _follow(self, window_s: float) -> bool:
        with self._changed:
            self._has_leave = False
            self._check()
        self._post(Present())
        with self._changed:
            if not self._wait(lambda: self._has_begun, window_s):
                self._post(Retract())
                if not self._wait(lambda: self._has_begun or self._has_leave, ANSWER_TIMEOUT_S):
                    raise HcclError("the peer does not answer")
            has_begun = self._has_begun
        if has_begun:
            self._post(Coming())
        return has_begun

    def _wait(self, happened: Callable[[], bool], timeout_s: float) -> bool:
        self._changed.wait_for(lambda: happened() or self._is_closed, timeout_s)
        self._check()
        return happened()

    def _check(self) -> None:
        if self._is_closed:
            raise HcclError("the peer is gone")

    # The session's thread

    def handle(self, frame: SetUpFrame) -> None:
        """Take a frame of the peer.

        Raises:
            RemoteProtocolError: it is not for this side.
        """
        with self._changed:
            match frame:
                case Present() if self.is_leader:
                    self._is_other_here = True
                case Retract() if self.is_leader:
                    if not self._has_begun:
                        self._is_other_here = False
                        self._post(Retracted())
                case Coming() if self.is_leader and self._has_begun:
                    self._is_coming = True
                case Retracted() if not self.is_leader:
                    self._has_leave = True
                case Begin() if not self.is_leader:
                    self.root, self._has_begun = frame.root, True
                case _:
                    raise RemoteProtocolError(f"{type(frame).__name__} from the wrong side")
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any more: the peer is gone."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
