"""Streams, events and graph capture of the real torch_npu on the double.

What a program may not rely on must go wrong here: see sections 0 and 8 of the notes on Ascend.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch_npu import npu

NPU = "npu:0"
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Gate:
    """Work that keeps a stream of torch_npu waiting until it is opened."""

    def __init__(self, stream: npu.Stream) -> None:
        acl = ctypes.CDLL("libascendcl.so")
        acl.aclrtLaunchHostFunc.argtypes = [ctypes.c_void_p, HostFunction, ctypes.c_void_p]
        self._opened = threading.Event()
        self._function = HostFunction(lambda _: self._opened.wait(30) and None)
        assert acl.aclrtLaunchHostFunc(stream.npu_stream, self._function, None) == 0

    def open(self) -> None:
        self._opened.set()


@pytest.fixture(autouse=True)
def device() -> None:
    npu.set_device(0)


@pytest.fixture
def side() -> npu.Stream:
    return npu.Stream()


@pytest.fixture
def gate(side: npu.Stream) -> Iterator[Gate]:
    """The side stream waits; what a test leaves on it is done afterwards."""
    gate = Gate(side)
    yield gate
    gate.open()
    npu.synchronize()


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros and ones on the device, both there already."""
    zeros, ones = torch.zeros(8, device=NPU), torch.ones(8, device=NPU)
    npu.synchronize()
    return zeros, ones


def test_work_on_a_side_stream_is_not_seen_before_it_ran(side: npu.Stream, gate: Gate) -> None:
    zeros, ones = tensors_before(side)
    with npu.stream(side):
        zeros.copy_(ones)
    seen = zeros.cpu()
    gate.open()
    side.synchronize()
    assert (seen.sum().item(), zeros.cpu().sum().item()) == (0, 8)


def tensors_before(side: npu.Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros and ones that are ready while the side stream still waits."""
    zeros, ones = torch.zeros(8, device=NPU), torch.ones(8, device=NPU)
    npu.current_stream().synchronize()
    assert not side.query()
    return zeros, ones


def test_an_event_is_complete_when_the_work_before_it_is(side: npu.Stream, gate: Gate) -> None:
    event = npu.Event()
    event.record(side)
    assert side.npu_stream  # empties torch_npu's queue
    before = event.query()
    gate.open()
    event.synchronize()
    assert (before, event.query()) == (False, True)


def test_a_stream_that_waits_for_an_event_sees_the_work_before_it(
    side: npu.Stream, gate: Gate
) -> None:
    zeros, ones = tensors_before(side)
    with npu.stream(side):
        zeros.copy_(ones)
        event = side.record_event()
    npu.current_stream().wait_event(event)
    copy = torch.empty_like(zeros)
    copy.copy_(zeros)
    gate.open()
    assert copy.cpu().sum().item() == 8


def test_captured_work_runs_when_replayed() -> None:
    zeros, ones = tensors()
    graph = npu.NPUGraph()
    with npu.graph(graph):
        zeros.copy_(ones)
    before = zeros.cpu().sum().item()
    graph.replay()
    assert (before, zeros.cpu().sum().item()) == (0, 8)


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that it may ruin."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_failed_stream_tells_though_its_event_completes() -> None:
    code = """if True:
        import ctypes, torch
        torch.npu.set_device(0)
        x, y = torch.zeros(8, device="npu:0"), torch.ones(8, device="npu:0")
        side = torch.npu.Stream()
        torch.npu.synchronize()
        ctypes.CDLL("libascendcl.so").fakeSet(b"FAKE_CANN_FAIL", b"task:1:507048")
        with torch.npu.stream(side):
            x.copy_(y)
            event = side.record_event()
        while not event.query():
            pass
        print("the event is complete")
        side.synchronize()
        print("not reached")
    """
    done = run_apart(code)
    assert done.stdout.splitlines()[-1] == "the event is complete"
    assert "507048" in done.stderr


def test_another_thread_must_not_work_during_capture() -> None:
    code = """if True:
        import threading, torch
        torch.npu.set_device(0)
        x, y = torch.zeros(8, device="npu:0"), torch.ones(8, device="npu:0")
        torch.npu.synchronize()

        def work():
            torch.npu.set_device(0)
            x.cpu()

        with torch.npu.graph(torch.npu.NPUGraph()):
            x.copy_(y)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    """
    done = run_apart(code)
    assert "107030" in done.stderr
    assert "current capture mode does not support this operation" in done.stderr
