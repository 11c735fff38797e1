"""Device memory, streams, events and graph capture of the double.

The rules are those of sections 0 and 8 of the project's notes on Ascend.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_uint32, c_void_p
from pathlib import Path

import pytest

from tests.fake_cann.abi import HOST_TO_DEVICE, CannError, Gate, Libraries, check
from tests.fake_cann.build import environment

STREAM_FAILED, CAPTURE_REFUSED, OUT_OF_MEMORY = 507015, 107030, 207001
GLOBAL_CAPTURE = 0


@pytest.fixture(scope="module")
def libraries(fake_cann: Path) -> Libraries:
    return Libraries(fake_cann)


@pytest.fixture
def lib(libraries: Libraries) -> Iterator[Libraries]:
    """The libraries with a device set for this thread; hooks are unset afterwards."""
    check(libraries.acl.aclrtSetDevice(0))
    yield libraries
    for hook in ("FAKE_CANN_FAIL", "FAKE_CANN_FAILED_EVENT", "FAKE_CANN_MEMORY_MB"):
        libraries.set_hook(hook, None)


def in_thread(lib: Libraries, function: Callable[[], int]) -> int:
    """Return what a function returns in another thread of the device."""
    codes: list[int] = []

    def run() -> None:
        check(lib.acl.aclrtSetDevice(0))
        codes.append(function())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return codes[0]


def count_devices(fake_cann: Path, **hooks: str) -> tuple[int, int]:
    """Return the number of devices and the code of choosing device 1, in a new process."""
    code = f"""if True:
        import ctypes
        acl = ctypes.CDLL({str(fake_cann / "libascendcl.so")!r})
        count = ctypes.c_uint32()
        acl.aclrtGetDeviceCount(ctypes.byref(count))
        print(count.value, acl.aclrtSetDevice(1))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(fake_cann, **hooks),
        capture_output=True,
        text=True,
        check=True,
    )
    count, chosen = done.stdout.split()
    return int(count), int(chosen)


def test_the_number_of_devices_is_a_hook(fake_cann: Path) -> None:
    assert count_devices(fake_cann, FAKE_CANN_DEVICES="2") == (2, 0)


def test_visible_devices_are_those_of_the_variable(fake_cann: Path) -> None:
    assert count_devices(fake_cann, ASCEND_RT_VISIBLE_DEVICES="5") == (1, 107001)


def test_a_thread_without_a_device_allocates_nothing(lib: Libraries) -> None:
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(lib.acl.aclrtMalloc(byref(c_void_p()), 8, 0))
    )
    thread.start()
    thread.join()
    assert codes == [107002]


def test_soc_and_number_of_devices_have_defaults(lib: Libraries) -> None:
    count = c_uint32()
    check(lib.acl.aclrtGetDeviceCount(byref(count)))
    assert (lib.acl.aclrtGetSocName(), count.value) == (b"Ascend910B3", 8)


def test_fresh_device_memory_is_not_zero(lib: Libraries) -> None:
    address = c_void_p()
    check(lib.acl.aclrtMalloc(byref(address), 64, 0))
    assert lib.read(address.value or 0, 64) == b"\xa5" * 64


def test_device_memory_is_limited(lib: Libraries) -> None:
    lib.set_hook("FAKE_CANN_MEMORY_MB", "1")
    with pytest.raises(CannError, match=str(OUT_OF_MEMORY)):
        lib.device_memory(bytes(2 << 20))


def test_freed_memory_is_available_again(lib: Libraries) -> None:
    before = lib.free_memory()
    address = lib.device_memory(bytes(4096))
    assert lib.free_memory() == before - 4096
    check(lib.acl.aclrtFree(address))
    assert lib.free_memory() == before


def test_host_memory_is_no_target_of_a_copy_to_the_device(lib: Libraries) -> None:
    here = (c_int * 4)()
    assert lib.acl.aclrtMemcpy(here, 16, bytes(16), 16, HOST_TO_DEVICE) == 107000


def test_work_runs_after_the_call_that_submitted_it(lib: Libraries) -> None:
    stream, source, target = lib.stream(), lib.device_memory(b"new"), lib.device_memory(b"old")
    gate = Gate(lib, stream)
    check(lib.copy_async(target, source, 3, stream))
    before = lib.read(target, 3)
    gate.open()
    check(lib.acl.aclrtSynchronizeStream(stream))
    assert (before, lib.read(target, 3)) == (b"old", b"new")


def test_work_that_has_not_begun_is_dropped_with_its_stream(lib: Libraries) -> None:
    stream, source, target = lib.stream(), lib.device_memory(b"new"), lib.device_memory(b"old")
    gate = Gate(lib, stream)
    check(lib.copy_async(target, source, 3, stream))
    check(lib.acl.aclrtStreamAbort(stream))
    gate.open()
    check(lib.acl.aclrtSynchronizeStream(stream))
    assert lib.read(target, 3) == b"old"


def test_an_event_is_complete_after_the_work_before_it(lib: Libraries) -> None:
    stream, event = lib.stream(), lib.event()
    gate = Gate(lib, stream)
    check(lib.acl.aclrtRecordEvent(event, stream))
    before = lib.is_complete(event)
    gate.open()
    check(lib.acl.aclrtSynchronizeEvent(event))
    assert (before, lib.is_complete(event)) == (False, True)


def test_an_event_recorded_again_is_incomplete_again(lib: Libraries) -> None:
    stream, event = lib.stream(), lib.event()
    check(lib.acl.aclrtRecordEvent(event, stream))
    check(lib.acl.aclrtSynchronizeEvent(event))
    gate = Gate(lib, stream)
    check(lib.acl.aclrtRecordEvent(event, stream))
    assert not lib.is_complete(event)
    gate.open()
    check(lib.acl.aclrtSynchronizeStream(stream))  # or the next test meets what is left


def test_streams_do_not_wait_for_each_other(lib: Libraries) -> None:
    first, second = lib.stream(), lib.stream()
    gate = Gate(lib, first)
    check(lib.acl.aclrtSynchronizeStream(second))
    gate.open()
    check(lib.acl.aclrtSynchronizeStream(first))  # or the next test meets what is left


def test_a_stream_waits_for_the_event_of_another(lib: Libraries) -> None:
    first, second, event = lib.stream(), lib.stream(), lib.event()
    source, target = lib.device_memory(b"old"), lib.device_memory(b"...")
    new = lib.device_memory(b"new")
    gate = Gate(lib, first)
    check(lib.copy_async(source, new, 3, first))
    check(lib.acl.aclrtRecordEvent(event, first))
    check(lib.acl.aclrtStreamWaitEvent(second, event))
    check(lib.copy_async(target, source, 3, second))
    gate.open()
    check(lib.acl.aclrtSynchronizeStream(second))
    assert lib.read(target, 3) == b"new"


def test_without_waiting_a_stream_reads_what_is_there(lib: Libraries) -> None:
    first, second = lib.stream(), lib.stream()
    source, target = lib.device_memory(b"old"), lib.device_memory(b"...")
    gate = Gate(lib, first)
    check(lib.copy_async(source, lib.device_memory(b"new"), 3, first))
    check(lib.copy_async(target, source, 3, second))
    check(lib.acl.aclrtSynchronizeStream(second))
    assert lib.read(target, 3) == b"old"
    gate.open()
    check(lib.acl.aclrtSynchronizeStream(first))  # or the next test meets what is left


def failed_stream(lib: Libraries) -> c_void_p:
    """Return a stream whose only work has failed."""
    stream, memory = lib.stream(), lib.device_memory(b"x")
    lib.set_hook("FAKE_CANN_FAIL", f"task:1:{STREAM_FAILED}")
    check(lib.copy_async(memory, memory, 1, stream))
    assert lib.acl.aclrtSynchronizeStream(stream) == STREAM_FAILED
    return stream


def test_a_failed_stream_stays_failed(lib: Libraries) -> None:
    stream = failed_stream(lib)
    assert lib.acl.aclrtSynchronizeStream(stream) == STREAM_FAILED
    assert lib.acl.aclrtStreamQuery(stream, byref(c_int())) == STREAM_FAILED


def test_an_event_behind_a_failure_just_completes(lib: Libraries) -> None:
    stream, event, status = failed_stream(lib), lib.event(), c_int()
    check(lib.acl.aclrtRecordEvent(event, stream))
    assert lib.acl.aclrtSynchronizeEvent(event) == STREAM_FAILED
    assert lib.acl.aclrtQueryEventStatus(event, byref(status)) == 0
    assert status.value == 1


def test_an_event_behind_a_failure_tells_if_asked_for(lib: Libraries) -> None:
    stream, event = failed_stream(lib), lib.event()
    check(lib.acl.aclrtRecordEvent(event, stream))
    lib.acl.aclrtSynchronizeEvent(event)
    lib.set_hook("FAKE_CANN_FAILED_EVENT", "error")
    assert lib.acl.aclrtQueryEventStatus(event, byref(c_int())) == STREAM_FAILED


@pytest.mark.parametrize(("mode", "expected"), [(0, b"new"), (1, b"old")])
def test_failure_mode_decides_about_later_work(lib: Libraries, mode: int, expected: bytes) -> None:
    stream, target = failed_stream(lib), lib.device_memory(b"old")
    check(lib.acl.aclrtSetStreamFailureMode(stream, mode))
    check(lib.copy_async(target, lib.device_memory(b"new"), 3, stream))
    lib.acl.aclrtSynchronizeStream(stream)
    assert lib.read(target, 3) == expected


def test_a_forced_failure_comes_at_its_call_only(lib: Libraries) -> None:
    lib.set_hook("FAKE_CANN_FAIL", f"aclrtMalloc:2:{OUT_OF_MEMORY}")
    lib.device_memory(b"1")
    with pytest.raises(CannError, match=str(OUT_OF_MEMORY)):
        lib.device_memory(b"2")
    lib.device_memory(b"3")


def test_the_last_error_is_told_once(lib: Libraries) -> None:
    assert lib.acl.aclrtSetDevice(99) == 107001
    assert b"no device 99" in lib.acl.aclGetRecentErrMsg()
    assert lib.acl.aclGetRecentErrMsg() == b""


@contextmanager
def capture(lib: Libraries) -> Iterator[None]:
    """Capture a stream as torch_npu does it by default."""
    stream, graph = lib.stream(), c_void_p()
    check(lib.acl.aclmdlRICaptureBegin(stream, GLOBAL_CAPTURE))
    try:
        yield
    finally:
        check(lib.acl.aclmdlRICaptureEnd(stream, byref(graph)))
        check(lib.acl.aclmdlRIDestroy(graph))


def test_capture_refuses_allocations_of_other_threads(lib: Libraries) -> None:
    with capture(lib):
        code = in_thread(lib, lambda: lib.acl.aclrtMalloc(byref(c_void_p()), 8, 0))
    assert code == CAPTURE_REFUSED


def test_capture_refuses_synchronous_copies_of_other_threads(lib: Libraries) -> None:
    memory, copy = lib.device_memory(b"old"), lib.acl.aclrtMemcpy
    with capture(lib):
        code = in_thread(lib, lambda: copy(memory, 3, b"new", 3, HOST_TO_DEVICE))
    assert code == CAPTURE_REFUSED


def test_capture_refuses_work_on_other_streams(lib: Libraries) -> None:
    memory, stream = lib.device_memory(b"old"), lib.stream()
    with capture(lib):
        code = in_thread(lib, lambda: lib.copy_async(memory, memory, 1, stream))
    assert code == CAPTURE_REFUSED


def test_captured_work_runs_at_each_replay(lib: Libraries) -> None:
    memory = lib.device_memory(b"old")
    new, stream, graph = lib.device_memory(b"new"), lib.stream(), c_void_p()
    check(lib.acl.aclmdlRICaptureBegin(stream, GLOBAL_CAPTURE))
    check(lib.copy_async(memory, new, 3, stream))
    check(lib.acl.aclmdlRICaptureEnd(stream, byref(graph)))
    check(lib.acl.aclrtSynchronizeStream(stream))
    contents = [lib.read(memory, 3)]
    for _ in range(2):
        check(lib.acl.aclmdlRIExecuteAsync(graph, stream))
        check(lib.acl.aclrtSynchronizeStream(stream))
        contents.append(lib.read(memory, 3))
        check(lib.acl.aclrtMemcpy(memory, 3, b"old", 3, HOST_TO_DEVICE))
    check(lib.acl.aclmdlRIDestroy(graph))
    assert contents == [b"old", b"new", b"new"]
