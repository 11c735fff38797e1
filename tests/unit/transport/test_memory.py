"""Raw memory: pages shared in place, mapped elsewhere, read by the kernel."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transport_conformance import Arena, noise
from vllm_pd.errors import TransportUnavailableError
from vllm_pd.transport import memory

PAGE = memory.PAGE_LEN


@pytest.fixture
def arena() -> Arena:
    """Return memory with content everywhere but in the third page of the interior."""
    arena = Arena(8 * PAGE)
    arena.write(arena.addr, noise(1, 8 * PAGE))
    addr, _ = memory.page_interior(arena.addr, 8 * PAGE)
    arena.write(addr + 2 * PAGE, bytes(PAGE))
    return arena


@pytest.fixture
def span(arena: Arena) -> Iterator[memory.SharedSpan]:
    span = memory.share_pages(*memory.page_interior(arena.addr, arena.num_bytes))
    yield span
    os.close(span.fd)


def read(addr: int, num_bytes: int) -> bytes:
    return bytes(memory.view(addr, num_bytes))


def is_mapped(addr: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= addr < last:
            return True
    return False


@pytest.mark.parametrize(
    ("spans", "joined"),
    [
        ([], []),
        ([(10, 5), (15, 5)], [(10, 10)]),
        ([(15, 5), (10, 5)], [(10, 10)]),
        ([(10, 20), (12, 3)], [(10, 20)]),
        ([(10, 5), (16, 5)], [(10, 5), (16, 5)]),
    ],
)
def test_spans_that_touch_or_overlap_are_joined(
    spans: list[tuple[int, int]], joined: list[tuple[int, int]]
) -> None:
    assert memory.join_spans(spans) == joined


@pytest.mark.parametrize(
    ("addr", "num_bytes", "interior"),
    [
        (PAGE, 2 * PAGE, (PAGE, 2 * PAGE)),
        (PAGE + 1, 2 * PAGE, (2 * PAGE, PAGE)),
        (PAGE - 1, 2, (PAGE, 0)),
        (PAGE + 1, PAGE - 2, (2 * PAGE, 0)),
    ],
)
def test_interior_is_the_whole_pages(addr: int, num_bytes: int, interior: tuple[int, int]) -> None:
    assert memory.page_interior(addr, num_bytes) == interior


def test_copy_and_view_reach_the_same_bytes() -> None:
    source, target = bytearray(b"abcdef"), bytearray(6)
    memory.copy_all([(memory.address_of(target), memory.address_of(source) + 2, 3)])
    assert target == b"cde\0\0\0"
    memory.view(memory.address_of(target), 6)[5] = 7
    assert target[5] == 7


def test_shared_pages_keep_their_content_and_address(arena: Arena) -> None:
    before = read(arena.addr, arena.num_bytes)
    span = memory.share_pages(*memory.page_interior(arena.addr, arena.num_bytes))
    assert read(arena.addr, arena.num_bytes) == before
    os.close(span.fd)
    assert read(arena.addr, arena.num_bytes) == before


def test_pages_are_there_before_they_are_used() -> None:
    """As in the memory that vLLM allocated: a block's first use must not wait for the kernel."""
    fresh = Arena(512 * PAGE)
    zero = memory.share_pages(*memory.page_interior(fresh.addr, fresh.num_bytes))
    assert os.fstat(zero.fd).st_blocks * 512 == zero.num_bytes
    os.close(zero.fd)


def test_what_is_written_later_is_seen_through_the_mapping(span: memory.SharedSpan) -> None:
    mapped = memory.map_span(span.addr, span.num_bytes, span.fd)
    memory.view(span.addr + PAGE, 4)[:] = b"news"
    assert read(mapped.addr + PAGE, 4) == b"news"
    assert mapped.remote_addr == span.addr
    memory.unmap_span(mapped)
    assert not is_mapped(mapped.addr)


def test_mapping_outlives_the_descriptor(arena: Arena) -> None:
    span = memory.share_pages(*memory.page_interior(arena.addr, arena.num_bytes))
    mapped = memory.map_span(span.addr, span.num_bytes, span.fd)
    os.close(span.fd)
    assert read(mapped.addr, span.num_bytes) == read(span.addr, span.num_bytes)
    memory.unmap_span(mapped)


def test_shared_file_cannot_change_its_length(span: memory.SharedSpan) -> None:
    for length in (0, span.num_bytes + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(span.fd, length)


def test_descriptor_is_not_inherited(span: memory.SharedSpan) -> None:
    assert fcntl.fcntl(span.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


@pytest.fixture
def memfd() -> Iterator[int]:
    """Return a file of one page that its owner can still shrink."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    yield fd
    os.close(fd)


def test_file_that_can_shrink_is_not_mapped(memfd: int) -> None:
    with pytest.raises(OSError, match="could shrink"):
        memory.map_span(PAGE, PAGE, memfd)


def test_file_that_is_shorter_than_announced_is_not_mapped(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(OSError, match="shorter"):
        memory.map_span(PAGE, 2 * PAGE, memfd)


@pytest.mark.parametrize("num_bytes", [0, -1, -PAGE])
def test_file_of_no_length_is_not_mapped(memfd: int, num_bytes: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(OSError):  # noqa: PT011 - which one is the kernel's choice
        memory.map_span(PAGE, num_bytes, memfd)


def test_what_is_no_memory_file_is_not_mapped(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(PAGE)
        with pytest.raises(OSError):  # noqa: PT011 - likewise
            memory.map_span(PAGE, PAGE, file.fileno())


def test_refused_memfd_leaves_the_memory_as_it_was(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", refuse)
    before = read(arena.addr, arena.num_bytes)
    with pytest.raises(TransportUnavailableError, match="memfd_create: Operation not permitted"):
        memory.share_pages(*memory.page_interior(arena.addr, arena.num_bytes))
    assert read(arena.addr, arena.num_bytes) == before


def test_refused_mapping_leaves_no_descriptor_behind(arena: Arena) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportUnavailableError, match="cannot remap"):
        memory.share_pages(arena.addr, PAGE)  # no page begins there
    assert len(os.listdir("/proc/self/fd")) == before


def locked_len() -> int:
    """Return how many bytes this process has locked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmLck:")[1].split()[0]) * 1024


def test_pages_are_locked(span: memory.SharedSpan) -> None:
    before = locked_len()
    try:
        memory.lock_pages(span.addr, span.num_bytes)
    except OSError as exc:
        pytest.skip(f"the limit of locked memory: {exc.strerror}")
    assert locked_len() - before == span.num_bytes


def test_what_cannot_be_locked_is_an_error() -> None:
    with pytest.raises(OSError, match=r"Cannot allocate memory|Operation not permitted"):
        memory.lock_pages(PAGE, PAGE)  # nothing is mapped there


def test_process_reads_another_by_its_addresses() -> None:
    source, target = bytearray(noise(2, 5000)), bytearray(5000)
    to, come = memory.address_of(target), memory.address_of(source)
    memory.read_process(os.getpid(), [(to, come + 10, 20), (to + 100, come, 10)])
    assert target[:20] == source[10:30]
    assert target[100:110] == source[:10]
    assert target[20:100] == bytes(80)


def test_any_number_of_moves_is_read() -> None:
    source, target = bytearray(noise(3, 5000)), bytearray(5000)
    to, come = memory.address_of(target), memory.address_of(source)
    memory.read_process(os.getpid(), [(to + i, come + i, 1) for i in range(5000)])
    assert target == source


def test_reading_nothing_is_nothing() -> None:
    memory.read_process(os.getpid(), [])


def test_address_that_is_not_mapped_is_an_error() -> None:
    target = bytearray(PAGE)
    with pytest.raises(OSError, match="Bad address"):
        memory.read_process(os.getpid(), [(memory.address_of(target), 8, 16)])


def test_short_read_is_an_error() -> None:
    source, target = bytearray(b"x" * 10), bytearray(20)
    to = memory.address_of(target)
    with pytest.raises(OSError, match="10 bytes of 20"):
        memory.read_process(os.getpid(), [(to, memory.address_of(source), 10), (to + 10, 8, 10)])


def test_process_that_is_gone_is_an_error() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    to = memory.address_of(target := bytearray(8))
    with pytest.raises(OSError, match="No such process"):
        memory.read_process(process.pid, [(to, to, 8)])
    assert target == bytes(8)
