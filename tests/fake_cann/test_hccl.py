from __future__ import annotations

from pathlib import Path

from tests.fake_cann.ranks import Pair


def test_bytes_arrive_in_chunks_of_the_buffer(fake_cann: Path) -> None:
    with Pair(fake_cann, "send_and_receive") as pair:
        first, second = pair.outcomes()
    assert first.result == {"issue": 0, "end": 0, "chunks": 3}, first
    assert second.result == {"issue": 0, "end": 0, "equal": True}
