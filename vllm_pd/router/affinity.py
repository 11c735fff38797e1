"""What a prompt looks like to the router, and which instances have seen its beginning.

A prompt is known by digests of its beginnings, at fixed lengths. Two prompts share
a digest if they begin alike for that length, so the longest one that an instance
has seen tells how much of its prefix cache is of use. The router does not
tokenise: text counts four bytes as a token, and tokens of a prompt given by ids
are four bytes each, so that both are cut at the same places.

A digest says nothing for sure. vLLM may have evicted the blocks, and two prompts
may collide; either costs time, never a wrong answer.
"""

from __future__ import annotations

import array
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

SESSION_HEADER = "X-Session-Id"

_TOKEN_LEN = 4
"""Bytes of text, or of an id, that count as one token."""

_FIRST_TOKENS = 256
_MAX_TOKENS = 65_536
"""Shortest and longest beginning that has a digest. A list of so many ids takes 3 ms."""

_MEDIA_TOKENS = 1024
"""What an image, a sound or a video counts: the order of magnitude of an image."""

_MAX_ITEMS = 20_000
"""JSON values of a prompt that are looked at, as these take some 10 ms; the rest does not count."""

_MAX_SEQUENCES = 2**20
"""Most sequences that a request counts, whatever ``n`` it asks for: it may be any integer."""

_END = object()

# In the order in which chat templates write them.
_PROMPT_FIELDS = ("tools", "documents", "instructions", "prompt", "messages", "input")
# Equal prompts have different KV caches if these differ.
_KV_FIELDS = ("model", "cache_salt", "chat_template")
# vLLM's own name for it first, then those of OpenAI's API.
_SESSION_FIELDS = ("session_id", "prompt_cache_key", "user")


def _digest_tokens() -> Iterator[int]:
    tokens = _FIRST_TOKENS
    while tokens <= _MAX_TOKENS:
        yield tokens
        # By an eighth at least: a few dozen digests cover any length, and what
        # two prompts share is at most underrated by so much.
        tokens += max(_FIRST_TOKENS, tokens // 8)


DIGEST_TOKENS = tuple(_digest_tokens())
"""Lengths, in tokens, of the beginnings that have a digest."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt, or the prompts, of a request.

    Attributes:
        num_tokens: length, estimated unless it is given as token ids; at least 1.
        num_sequences: sequences that vLLM makes of the request; at least 1, and 2**20 at most.
        prefix: digests of its beginnings of ``DIGEST_TOKENS``, as far as it reaches;
            empty if there are several prompts.
        session: digest of the session's name, or None.
    """

    num_tokens: int
    num_sequences: int
    prefix: tuple[int, ...]
    session: int | None


@dataclass(frozen=True, slots=True)
class Matches:
    """How much of a prompt instances have seen, in tokens; those with nothing are left out.

    Attributes:
        cached: by the prompt itself: what a prefix cache probably has.
        credit: by the prompt or the session: a guess that is good enough to choose
            between instances.
    """

    cached: Mapping[str, int]
    credit: Mapping[str, int]


NO_MATCHES = Matches({}, {})


class Gossip(Protocol):
    """What the processes of one router tell each other of what instances have seen."""

    def tell_seen(self, base_url: str, digest: int, tokens: int) -> None:
        """Tell the others of a beginning, or of a session."""

    def seen(self) -> Iterable[tuple[str, int, int]]:
        """Return what the others have told since the last time: address, digest, tokens."""


class AffinityIndex:
    """Which beginnings of prompts and which sessions went to which instance.

    Each instance has its own memory of bounded size that forgets what was not used
    for longest, as its prefix cache does.
    """

    def __init__(self, *, max_entries: int = 8192, gossip: Gossip | None = None) -> None:
        """Make an empty index.

        Args:
            gossip: to and from the other processes of the router; None: there are none.
            max_entries: digests remembered per instance. The default is good for
                about 600 prompts of 4,000 tokens, more than most caches hold.
        """
        self._max_entries = max_entries
        self._gossip = gossip
        self._seen: dict[str, OrderedDict[int, int]] = {}  # digest -> tokens

    def matches(self, prompt: Prompt) -> Matches:
        """Return what the instances have seen of a prompt."""
        if not prompt.prefix and prompt.session is None:
            return NO_MATCHES
        self._listen()
        cached: dict[str, int] = {}
        credit: dict[str, int] = {}
        for base_url, seen in self._seen.items():
            if tokens := _longest(prompt.prefix, seen):
                cached[base_url] = tokens
            if prompt.session is not None:
                tokens = max(tokens, min(seen.get(prompt.session, 0), prompt.num_tokens))
            if tokens:
                credit[base_url] = tokens
        return Matches(cached, credit)

    def note(self, prompt: Prompt, base_url: str) -> None:
        """Remember that a prompt was sent to an instance."""
        if not prompt.prefix and prompt.session is None:
            return
        entries = []
        if prompt.session is not None:
            entries.append((prompt.session, prompt.num_tokens))
        # Longest first: whatever is in there, its beginnings are younger, so they
        # are there as well.
        lengths = DIGEST_TOKENS[: len(prompt.prefix)]
        entries += zip(reversed(prompt.prefix), reversed(lengths), strict=True)
        self._remember(base_url, entries)
        if self._gossip is not None:
            for digest, tokens in entries:
                self._gossip.tell_seen(base_url, digest, tokens)

    def forget(self, base_url: str) -> None:
        """Drop what an instance has seen: it was removed, or restarted with an empty cache."""
        self._listen()  # to what was said before that
        self._seen.pop(base_url, None)

    def _listen(self) -> None:
        if self._gossip is not None:
            for base_url, digest, tokens in self._gossip.seen():
                self._remember(base_url, [(digest, tokens)])

    def _remember(self, base_url: str, entries: Iterable[tuple[int, int]]) -> None:
        seen = self._seen.setdefault(base_url, OrderedDict())
        for digest, tokens in entries:
            seen[digest] = tokens
            seen.move_to_end(digest)
        while len(seen) > self._max_entries:
            seen.popitem(last=False)


def read_prompt(body: Mapping[str, Any], *, session: str | None = None) -> Prompt:
    """Look at the prompt of any JSON body.

    Args:
        body: body of a completion, chat completion or response.
        session: the session's name; see ``session_of``.
    """
    reader = _Reader()
    for name in _PROMPT_FIELDS:
        if name in body:
            reader.read(body[name])
    num_prompts = _num_prompts(body.get("prompt"))
    n = body.get("n")
    num_choices = n if isinstance(n, int) and n > 0 else 1
    return Prompt(
        num_tokens=max(1, reader.num_bytes // _TOKEN_LEN),
        num_sequences=min(num_prompts * num_choices, _MAX_SEQUENCES),
        prefix=_prefix(body, reader.pieces) if num_prompts == 1 else (),
        session=None if session is None else _hash(b"session\0", _encode(session)).intdigest(),
    )


def session_of(headers: Mapping[str, str], body: Mapping[str, Any]) -> str | None:
    """Return the name of the session that a request belongs to, if it tells.

    Args:
        headers: the client's headers; names are looked up as they are, so this
            should be a case-insensitive mapping.
        body: the client's body.
    """
    for name in (headers.get(SESSION_HEADER), *(body.get(field) for field in _SESSION_FIELDS)):
        if isinstance(name, str) and name:
            return name
    return None


class _Reader:
    """Walks through prompts.

    Attributes:
        num_bytes: length so far, where ``_TOKEN_LEN`` make a token.
        pieces: the beginning, as far as digests need it.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.pieces: list[bytes] = []
        self._room = _MAX_TOKENS * _TOKEN_LEN
        self._num_items = 0

    def read(self, value: object) -> None:
        """Take a value in, to whatever depth: clients decide on that."""
        if isinstance(value, str):
            self._num_items += 1
            self._read_text(value, counts=True)
            return
        stack = [(iter([value]), True)]
        while stack and self._num_items < _MAX_ITEMS:
            items, counts = stack[-1]
            item = next(items, _END)
            self._num_items += 1
            if item is _END:
                stack.pop()
            elif isinstance(item, str):
                self._read_text(item, counts=counts)
            elif isinstance(item, dict):
                if counts and _is_media(item):
                    self.num_bytes += _MEDIA_TOKENS * _TOKEN_LEN
                    counts = False
                stack.append((itertools.chain.from_iterable(item.items()), counts))
            elif isinstance(item, list) and item:
                if isinstance(item[0], int):
                    self._read_ids(item)
                else:
                    stack.append((iter(item), counts))

    def _read_text(self, text: str, *, counts: bool) -> None:
        if counts:
            self.num_bytes += _utf8_len(text)
        if self._room > 0:
            self._add(_encode(text[: self._room]) + b"\0")

    def _read_ids(self, ids: list[Any]) -> None:
        self.num_bytes += len(ids) * _TOKEN_LEN
        if self._room > 0:
            try:
                self._add(array.array("i", ids[: self._room // _TOKEN_LEN]).tobytes())
            except (TypeError, OverflowError):
                self._room = 0  # vLLM will refuse them

    def _add(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self._room -= len(piece)


def _prefix(body: Mapping[str, Any], pieces: list[bytes]) -> tuple[int, ...]:
    data = memoryview(b"".join(pieces))
    if len(data) < _FIRST_TOKENS * _TOKEN_LEN:
        return ()
    state = _hash(b"prefix\0")
    for name in _KV_FIELDS:
        value = body.get(name)
        state.update((_encode(value) if isinstance(value, str) else b"") + b"\0")
    digests = []
    start = 0
    for tokens in DIGEST_TOKENS:
        end = tokens * _TOKEN_LEN
        if end > len(data):
            break
        state.update(data[start:end])
        digests.append(state.intdigest())
        start = end
    return tuple(digests)


def _longest(prefix: tuple[int, ...], seen: Mapping[int, int]) -> int:
    longest = 0
    for digest in prefix:
        if digest not in seen:
            break
        longest = seen[digest]
    return longest


def _hash(*parts: bytes) -> xxhash.xxh3_64:
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state


def _num_prompts(prompt: object) -> int:
    # A list of integers is one prompt, given as token ids.
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _is_media(item: Mapping[str, Any]) -> bool:
    kind = item.get("type")
    return isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video"))


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # JSON can carry lone surrogates


def _utf8_len(text: str) -> int:
    """Return the length in bytes; of a text that is long and not ASCII, an estimate."""
    if text.isascii():
        return len(text)
    sample = text[:_MAX_TOKENS]
    return len(_encode(sample)) * len(text) // len(sample)
