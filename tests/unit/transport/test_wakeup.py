"""Waking a thread that polls, and not writing where one should not."""

from __future__ import annotations

import os
import select

from vllm_pd.transport.wakeup import Wakeup


def is_readable(wakeup: Wakeup) -> bool:
    return bool(select.select([wakeup.fileno()], [], [], 0)[0])


def test_it_is_readable_from_set_to_clear() -> None:
    wakeup = Wakeup()
    assert not is_readable(wakeup)
    wakeup.set()
    wakeup.set()
    assert is_readable(wakeup)
    wakeup.clear()
    wakeup.clear()
    assert not is_readable(wakeup)
    wakeup.close()


def test_after_close_nothing_is_written_to_whoever_has_the_descriptor_now() -> None:
    wakeup = Wakeup()
    number = wakeup.fileno()
    wakeup.close()
    read_end, write_end = os.pipe()
    assert number in (read_end, write_end)
    wakeup.set()
    wakeup.clear()
    wakeup.close()
    assert select.select([read_end], [], [], 0)[0] == []
    os.close(read_end)
    os.close(write_end)
