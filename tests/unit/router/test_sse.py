from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.router.sse import MAX_EVENT_LEN, SseReader, is_aborted, is_prelude

TOKEN = b'data: {"choices":[{"index":0,"text":"na\xc3\xafve","finish_reason":null}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens_details":{"cached_tokens":9}}}\n\n'
REPAIRED = USAGE.replace(b"9", b"4")
ABORT = b'data: {"choices":[{"index":0,"text":"","finish_reason":"abort"}]}\n\n'
DONE = b"data: [DONE]\n\n"
DETAILS = {"cached_tokens": 4}
LIMIT = 300


def read(chunks: Sequence[bytes], *, limit: int = LIMIT) -> tuple[bytes, bool, bool]:
    reader = SseReader(DETAILS, max_event_len=limit)
    out = b"".join(reader.feed(chunk) for chunk in chunks) + reader.finish()
    return out, reader.ended, reader.aborted


def cut(stream: bytes, places: set[int]) -> list[bytes]:
    edges = [0, *sorted(place for place in places if place < len(stream)), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def test_a_chunk_of_whole_events_is_passed_on_as_it_is() -> None:
    chunk = TOKEN + TOKEN

    assert SseReader(DETAILS).feed(chunk) is chunk


def test_part_of_an_event_waits_for_the_rest() -> None:
    reader = SseReader(DETAILS)

    assert reader.feed(TOKEN + TOKEN[:10]) == TOKEN
    assert reader.feed(TOKEN[10:-1]) == b""
    assert reader.feed(TOKEN[-1:]) == TOKEN


def test_usage_is_repaired_however_it_is_cut() -> None:
    for place in range(1, len(USAGE)):
        assert read([TOKEN + USAGE[:place], USAGE[place:] + DONE]) == (
            TOKEN + REPAIRED + DONE,
            True,
            False,
        )


def test_a_stream_that_lacks_its_end_is_noticed() -> None:
    assert read([TOKEN, TOKEN]) == (TOKEN + TOKEN, False, False)


def test_the_end_is_seen_without_its_blank_line() -> None:
    assert read([TOKEN + b"data: [DONE]"]) == (TOKEN + b"data: [DONE]", True, False)


def test_half_an_end_is_none() -> None:
    assert read([TOKEN + b"data: [DON"]) == (TOKEN + b"data: [DON", False, False)


def test_the_model_cannot_say_that_the_stream_has_ended() -> None:
    event = b'data: {"choices":[{"text":"\\ndata: [DONE]\\n\\n"}]}\n\n'

    assert read([event]) == (event, False, False)


def test_a_stream_of_responses_ends_with_its_last_event() -> None:
    event = b'event: response.completed\ndata: {"type":"response.completed"}\n\n'

    assert read([event]) == (event, True, False)


def _event(name: str, end: bytes = b"\n\n") -> bytes:
    return f'event: {name}\ndata: {{"type":"{name}"}}'.encode() + end


PRELUDE = _event("response.created") + _event("response.queued") + _event("response.in_progress")


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_what_comes_before_the_output_of_a_response_is_its_prelude(end: bytes) -> None:
    prelude = PRELUDE.replace(b"\n", b"\r\n") if b"\r" in end else PRELUDE
    output = _event("response.output_item.added")
    for length in range(len(prelude) + len(output)):
        assert is_prelude((prelude + output)[:length])
    assert not is_prelude(prelude + output)
    assert not is_prelude(prelude + output + PRELUDE)


@pytest.mark.parametrize("event", ["response.completed", "response.created.not", "error"])
def test_other_events_are_no_prelude(event: str) -> None:
    assert not is_prelude(_event(event))


def test_a_prelude_is_not_held_back_without_a_bound() -> None:
    assert is_prelude(b"x" * MAX_EVENT_LEN)
    assert not is_prelude(b"x" * (MAX_EVENT_LEN + 1))


def test_responses_in_progress_have_not_ended() -> None:
    event = b'event: response.in_progress\ndata: {"response":{"kv_transfer_params":null}}\n\n'

    assert read([event]) == (event, False, False)


def test_an_aborted_choice_and_what_follows_are_kept_from_the_client() -> None:
    assert read([TOKEN + ABORT + DONE, DONE]) == (TOKEN, False, True)


def test_abort_as_text_is_no_abort() -> None:
    event = b'data: {"choices":[{"text":"\\"finish_reason\\":\\"abort\\"","token":"abort"}]}\n\n'

    assert read([event + DONE]) == (event + DONE, True, False)


def test_comments_that_keep_the_connection_alive_pass() -> None:
    comment = b": keep-alive\n\n"

    assert read([comment, TOKEN, comment + DONE]) == (comment + TOKEN + comment + DONE, True, False)


def test_lines_may_end_with_crlf() -> None:
    stream = (USAGE + DONE).replace(b"\n", b"\r\n")

    assert read([stream]) == (stream.replace(b"9", b"4"), True, False)


def test_an_endless_event_is_passed_on_instead_of_held() -> None:
    reader = SseReader(DETAILS, max_event_len=LIMIT)
    num_passed = sum(len(reader.feed(b"x" * 100)) for _ in range(100))

    assert num_passed >= 10_000 - LIMIT


def test_an_overlong_event_passes_unread_and_the_next_one_is_read() -> None:
    overlong = USAGE[:-2] + b" " * LIMIT + b"\n\n"

    for size in (1, 7, len(overlong)):
        stream = overlong + USAGE + DONE
        chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert read(chunks) == (overlong + REPAIRED + DONE, True, False)


def test_the_last_event_of_a_response_is_seen_however_long_it_is() -> None:
    event = b"event: response.completed\ndata: " + b"x" * LIMIT + b"\n\n"

    for size in (1, 40, len(event)):
        chunks = [event[i : i + size] for i in range(0, len(event), size)]
        assert read(chunks) == (event, True, False)


def test_an_aborted_answer_that_is_not_streamed_is_told() -> None:
    assert is_aborted(b'{"choices": [{"finish_reason": "abort"}]}')
    assert not is_aborted(b'{"choices": [{"finish_reason": "stop", "text": "abort"}]}')


ordinary = st.sampled_from(
    [TOKEN, DONE, b": ping\n\n", b"\n", b"\r\n", b"x", b"data: ", b'"usage"']
)
notable = st.sampled_from([USAGE, ABORT, b"y" * LIMIT, b'"finish_reason":"abort"'])
places = st.sets(st.integers(1, 2000), max_size=30)


@given(st.lists(ordinary | st.binary(max_size=20), max_size=12).map(b"".join), places)
def test_any_split_of_an_ordinary_stream_gives_the_same_bytes(
    stream: bytes, places: set[int]
) -> None:
    assert read(cut(stream, places))[0] == stream


@given(st.lists(ordinary | notable, max_size=12).map(b"".join), places)
def test_no_result_depends_on_the_split(stream: bytes, places: set[int]) -> None:
    assert read(cut(stream, places)) == read([stream])
