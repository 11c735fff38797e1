"""Streams of server-sent events: an instance's bytes in, the client's bytes out. No I/O.

One network chunk is not one event: it may be several, or a part of one. Whole events
are passed on, so that a stream that breaks off can still be ended well. Chunks that
are whole events without anything of interest, which is almost all of them, are only
searched, not parsed or copied.

Lines end with LF or CRLF, as in whatever serves the OpenAI API.
"""

from __future__ import annotations

import re

from vllm_pd.router import usage
from vllm_pd.router.usage import PromptDetails

MAX_EVENT_LEN = 2**20
"""Bytes of the longest event that is held back to be read; longer ones pass unread.

vLLM's are a few hundred bytes, unless the client wants very many logprobs.
"""

_ABORT_SIGN = b'"abort"'
_ABORT = re.compile(rb'"finish_reason"\s*:\s*"abort"')

# The model's text cannot pass for one of these: in JSON it has no line of its own.
# vLLM ends a stream of responses so in any case, also where max_output_tokens cut it.
_END = re.compile(rb"^(?:data: ?\[DONE\]|event: ?response\.completed)\r?$", re.MULTILINE)

_SIGNS = (b"[DONE]", b"response.completed", _ABORT_SIGN, *usage.SIGNS)
"""One of them is in every event that is of interest."""

# What vLLM sends of a response before its engine has done anything.
_PRELUDE = re.compile(rb"^event: ?response\.(?:created|queued|in_progress)\r?$", re.MULTILINE)

_BLANK_LINE = re.compile(rb"\n\r?\n")
_BLANK_LINES = (b"\n\n", b"\n\r\n")
_LINE_ENDS = re.compile(rb"[\r\n]*")


def is_aborted(data: bytes) -> bool:
    """Return whether an answer, or an event of it, ends a choice because vLLM aborted it.

    An instance that shuts down ends its requests so, with status 200. Nobody asked
    for it, so it is a failure of the instance and not the end of an answer.

    Not for responses: they repeat JSON of the client's, which may hold anything.
    """
    return _ABORT_SIGN in data and _ABORT.search(data) is not None


def is_prelude(data: bytes) -> bool:
    """Return whether a stream of a response has not got beyond the events before its output.

    It may have, if they are longer than ``MAX_EVENT_LEN``: they repeat the client's request, and
    no more of that is held back.
    """
    if len(data) > MAX_EVENT_LEN:
        return False
    start = 0
    for blank in _BLANK_LINE.finditer(data):
        if _PRELUDE.search(data, start, blank.end()) is None:
            return False
        start = blank.end()
    return True


class SseReader:
    """Reads one stream on its way from a decode instance to the client.

    What comes out does not depend on how the stream is cut into chunks, and is what
    went in, but for repaired events (``usage.repaired``) and those from an abort on.

    Attributes:
        ended: whether the stream said that it is complete. One that closes without
            has been cut off.
        aborted: whether the instance aborted the request. That event and all after
            it are kept from the client, who must be told of the failure.
    """

    __slots__ = (
        "_can_abort",
        "_details",
        "_held",
        "_max_event_len",
        "_overlong",
        "aborted",
        "ended",
    )

    def __init__(
        self,
        details: PromptDetails,
        *,
        can_abort: bool = True,
        max_event_len: int = MAX_EVENT_LEN,
    ) -> None:
        self.ended = False
        self.aborted = False
        self._details = details
        self._can_abort = can_abort
        self._max_event_len = max_event_len
        self._held = bytearray()  # the beginning of an event
        self._overlong = False  # part of the event has been passed on already

    def feed(self, chunk: bytes) -> bytes:
        """Take the stream's next bytes; return those that the client gets now."""
        if self.aborted:
            return b""
        if not self._held and chunk.endswith(_BLANK_LINES) and not _is_of_interest(chunk):
            return chunk
        return self._feed(chunk)

    def finish(self) -> bytes:
        """Return what is left when the instance has closed the stream.

        It is the beginning of an event: useless, unless ``ended`` is true now.
        """
        rest = b"" if self.aborted else self._event(bytes(self._held))
        self._held.clear()
        return rest

    def _feed(self, chunk: bytes) -> bytes:
        held, out = self._held, bytearray()
        searched = max(0, len(held) - 2)  # a blank line may be cut in two
        held += chunk
        while not self.aborted:
            if not self._overlong:
                searched -= _move(out, held, len(_leading_line_ends(held)))
            blank = _BLANK_LINE.search(held, max(0, searched))
            if blank is None:
                break
            out += self._event(bytes(held[: blank.end()]))
            del held[: blank.end()]
            self._overlong = False
            searched = 0
        if self.aborted:
            held.clear()
        elif self._overlong or len(held) > self._max_event_len:
            self._note_end(held)
            self._overlong = True
            _move(out, held, max(0, len(held) - 2))
        return bytes(out)

    def _event(self, event: bytes) -> bytes:
        """Take note of one event; return what the client gets of it."""
        if self._overlong:
            return event
        self._note_end(event)
        if len(event) > self._max_event_len:
            return event
        if self._can_abort and is_aborted(event):
            self.aborted = True
            return b""
        return usage.repaired(event, self._details)

    def _note_end(self, event: bytes | bytearray) -> None:
        if not self._overlong and _END.search(event, 0, self._max_event_len):
            self.ended = True


def _is_of_interest(chunk: bytes) -> bool:
    for sign in _SIGNS:  # noqa: SIM110  # any() takes half as long again, for every chunk
        if sign in chunk:
            return True
    return False


def _leading_line_ends(data: bytearray) -> bytes:
    found = _LINE_ENDS.match(data)
    return found[0] if found else b""


def _move(to: bytearray, source: bytearray, count: int) -> int:
    """Move the first ``count`` bytes and return how many that are."""
    to += source[:count]
    del source[:count]
    return count
