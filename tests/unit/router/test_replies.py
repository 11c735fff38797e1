from __future__ import annotations

import json

from vllm_pd.router import replies


def test_an_error_has_the_shape_of_vllms() -> None:
    assert json.loads(replies.error_body(404, "no such thing")) == {
        "error": {"message": "no such thing", "type": "Not Found", "param": None, "code": 404}
    }


def test_an_error_event_ends_the_event_that_the_stream_broke_in() -> None:
    stream = b'data: {"half": ' + replies.error_event(502, "gone")

    events = [event for event in stream.split(b"\n\n") if event]

    assert events[0] == b'data: {"half": '
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == 502
