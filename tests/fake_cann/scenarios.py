"""What ranks do in the tests of the double; see ``ranks``. Each returns what it saw."""

from __future__ import annotations

import ctypes
import threading
import time
from ctypes import byref, c_int, c_void_p
from typing import Any

from tests.fake_cann.abi import FP16, INT8, CannError, Gate, SendRecvItem, check, comm_config
from tests.fake_cann.ranks import Rank, hear, say

MIB = 1 << 20


def send_and_receive(rank: Rank) -> dict[str, Any]:
    """Rank 0 sends 3 MiB through a buffer of 1 MB."""
    content = bytes(range(256)) * (3 << 12)
    comm = rank.communicator(comm_config(buffer_mb=1))
    stream = rank.lib.stream()
    if rank.rank == 0:
        code = rank.send(rank.lib.device_memory(content), len(content), comm, stream)
        end = rank.synchronize(stream)
        return {"issue": code, "end": end, "chunks": rank.lib.hccl.fakeHcclNumChunks()}
    memory = rank.lib.device_memory(bytes(len(content)))
    code = rank.recv(memory, len(content), comm, stream)
    end = rank.synchronize(stream)
    return {"issue": code, "end": end, "equal": rank.lib.read(memory, len(content)) == content}


def first_operation(rank: Rank) -> dict[str, Any]:
    """Rank 1 comes to the first operation when rank 0 is in it already."""
    comm, stream, memory = rank.communicator(), rank.lib.stream(), rank.lib.device_memory(b"x")
    if rank.rank == 0:
        say("issuing")
        check(rank.send(memory, 1, comm, stream))
        moment = time.monotonic()
    else:
        hear()
        moment = time.monotonic()
        check(rank.recv(memory, 1, comm, stream))
    return {"end": rank.synchronize(stream), "moment": moment}


def later_operation(rank: Rank) -> dict[str, Any]:
    """Rank 1 comes to the second operation after rank 0 was told that its own is issued."""
    comm, stream, memory = rank.communicator(), rank.lib.stream(), rank.lib.device_memory(b"x")
    rank.warm_up(comm, stream)
    event = rank.lib.event()
    if rank.rank == 1:
        hear()
        check(rank.recv(memory, 1, comm, stream))
        return {"end": rank.synchronize(stream)}
    check(rank.send(memory, 1, comm, stream))
    check(rank.lib.acl.aclrtRecordEvent(event, stream))
    before = rank.lib.is_complete(event)
    say("issued")
    end = rank.synchronize(stream)
    return {"end": end, "before": before, "after": rank.lib.is_complete(event)}


def both_send(rank: Rank) -> dict[str, Any]:
    """Both ranks send first: no operation meets its match."""
    comm = rank.communicator(comm_config(exec_timeout_s=10))
    stream, memory = rank.lib.stream(), rank.lib.device_memory(b"x")
    rank.warm_up(comm, stream)
    check(rank.send(memory, 1, comm, stream))
    check(rank.recv(memory, 1, comm, stream))
    return {"end": rank.synchronize(stream)}


def lose_peer(rank: Rank) -> dict[str, Any]:
    """Rank 1 is killed after the warm-up; rank 0 receives from it."""
    comm = rank.communicator(comm_config(exec_timeout_s=10))
    stream, memory = rank.lib.stream(), rank.lib.device_memory(b"x")
    rank.warm_up(comm, stream)
    say("warm")
    hear()
    started = time.monotonic()
    issue = rank.recv(memory, 1, comm, stream)
    end = rank.synchronize(stream)
    elapsed_s = time.monotonic() - started
    error = c_int()
    check(rank.lib.hccl.HcclGetCommAsyncError(comm, byref(error)))
    destroyed = rank.lib.hccl.HcclCommDestroy(comm)
    return {
        "issue": issue,
        "end": end,
        "elapsed_s": elapsed_s,
        "async_error": error.value,
        "destroyed": destroyed,
        "content": rank.lib.read(memory, 1).decode(),
    }


def lose_peer_by_default(rank: Rank) -> dict[str, Any]:
    """The same with the version of the configuration that knows no execution timeout."""
    comm = rank.communicator(comm_config(version=1, exec_timeout_s=10))
    stream, memory = rank.lib.stream(), rank.lib.device_memory(b"x")
    rank.warm_up(comm, stream)
    say("warm")
    hear()
    started = time.monotonic()
    check(rank.recv(memory, 1, comm, stream))
    return {"end": rank.synchronize(stream), "elapsed_s": time.monotonic() - started}


def come_too_late(rank: Rank) -> dict[str, Any]:
    """Rank 1 receives when the send of rank 0 has timed out."""
    comm = rank.communicator(comm_config(exec_timeout_s=10))
    stream, memory = rank.lib.stream(), rank.lib.device_memory(str(rank.rank).encode())
    rank.warm_up(comm, stream)
    if rank.rank == 0:
        check(rank.send(memory, 1, comm, stream))
        end = rank.synchronize(stream)
        say("failed")
        return {"end": end}
    hear()
    check(rank.recv(memory, 1, comm, stream))
    return {"end": rank.synchronize(stream), "content": rank.lib.read(memory, 1).decode()}


def sizes_differ(rank: Rank) -> dict[str, Any]:
    """Rank 0 sends two bytes, rank 1 receives three; then both agree."""
    comm, stream = rank.communicator(), rank.lib.stream()
    memory = rank.lib.device_memory(b"...")
    rank.warm_up(comm, stream)
    if rank.rank == 0:
        check(rank.send(memory, 2, comm, stream))
    else:
        check(rank.recv(memory, 3, comm, stream))
    return {"end": rank.synchronize(stream)}


def send_receive_batch(rank: Rank) -> dict[str, Any]:
    """Both ranks send two pieces and receive two in one batch."""
    comm, stream = rank.communicator(), rank.lib.stream()
    mine = [bytes([rank.rank, number]) * MIB for number in (1, 2)]
    theirs = [rank.lib.device_memory(bytes(2 * MIB)) for _ in mine]
    items = (SendRecvItem * 4)()
    for number, (content, target) in enumerate(zip(mine, theirs, strict=True)):
        source = rank.lib.device_memory(content)
        items[2 * number] = SendRecvItem(0, source, 2 * MIB, INT8, rank.peer)
        items[2 * number + 1] = SendRecvItem(1, target, 2 * MIB, INT8, rank.peer)
    check(rank.lib.hccl.HcclBatchSendRecv(items, 4, comm, stream))
    end = rank.synchronize(stream)
    got = [rank.lib.read(target, 2 * MIB) for target in theirs]
    return {"end": end, "equal": got == [bytes([rank.peer, n]) * MIB for n in (1, 2)]}


def barrier(rank: Rank) -> dict[str, Any]:
    """Rank 1 comes later."""
    comm, stream = rank.communicator(), rank.lib.stream()
    rank.warm_up(comm, stream)
    if rank.rank == 1:
        hear()
    moment = time.monotonic()
    check(rank.lib.hccl.HcclBarrier(comm, stream))
    if rank.rank == 0:
        say("issued")
    end = rank.synchronize(stream)
    return {"end": end, "started": moment, "ended": time.monotonic()}


def ring(rank: Rank) -> dict[str, Any]:
    """Each rank sends its number to the next and receives from the one before; then all meet."""
    comm, stream = rank.communicator(), rank.lib.stream()
    source, target = rank.lib.device_memory(str(rank.rank).encode()), rank.lib.device_memory(b".")
    items = (SendRecvItem * 2)(
        SendRecvItem(0, source, 1, INT8, (rank.rank + 1) % rank.size),
        SendRecvItem(1, target, 1, INT8, (rank.rank - 1) % rank.size),
    )
    check(rank.lib.hccl.HcclBatchSendRecv(items, 2, comm, stream))
    check(rank.lib.hccl.HcclBarrier(comm, stream))
    end = rank.synchronize(stream)
    return {"end": end, "content": rank.lib.read(target, 1).decode()}


def two_streams(rank: Rank) -> dict[str, Any]:
    """Rank 0 issues on two streams, of which the first is held up."""
    comm, first, second = rank.communicator(), rank.lib.stream(), rank.lib.stream()
    rank.warm_up(comm, first)
    if rank.rank == 0:
        gate = Gate(rank.lib, first)
        check(rank.send(rank.lib.device_memory(b"1"), 1, comm, first))
        check(rank.send(rank.lib.device_memory(b"2"), 1, comm, second))
        gate.open()
        return {"end": [rank.synchronize(first), rank.synchronize(second)]}
    memory = rank.lib.device_memory(b"..")
    check(rank.recv(memory, 1, comm, first))
    check(rank.recv(memory + 1, 1, comm, first))
    return {"end": rank.synchronize(first), "content": rank.lib.read(memory, 2).decode()}


def different_configs(rank: Rank) -> dict[str, Any]:
    """The ranks ask for different buffers."""
    rank.communicator(comm_config(buffer_mb=20 + rank.rank))
    return {}


def longer_config(rank: Rank) -> dict[str, Any]:
    """Rank 1 has a newer header, with the same settings."""
    rank.communicator(comm_config(version=8 if rank.rank == 0 else 10, buffer_mb=20))
    return {}


def default_config(rank: Rank) -> dict[str, Any]:
    """A communicator without a configuration."""
    comm = rank.communicator()
    name = ctypes.create_string_buffer(128)
    check(rank.lib.hccl.HcclGetCommName(comm, name))
    return {"name": name.value.decode()}


def missing_peer(rank: Rank) -> dict[str, Any]:
    """Rank 1 has a communicator, but takes part in no operation."""
    comm, stream = rank.communicator(), rank.lib.stream()
    if rank.rank == 1:
        hear()
        return {}
    return {"issue": rank.send(rank.lib.device_memory(b"x"), 1, comm, stream)}


def bad_arguments(rank: Rank) -> dict[str, Any]:
    """Calls that are refused before they reach the peer."""
    comm, stream, memory = rank.communicator(), rank.lib.stream(), rank.lib.device_memory(b"x")
    send, here = rank.lib.hccl.HcclSend, ctypes.create_string_buffer(1)
    from_elsewhere: list[int] = []
    arguments = (memory, 1, INT8, rank.peer, comm, stream)
    thread = threading.Thread(target=lambda: from_elsewhere.append(send(*arguments)))
    thread.start()
    thread.join()
    return {
        "thread without device": from_elsewhere[0],
        "fp16": send(memory, 1, FP16, rank.peer, comm, stream),
        "host memory": send(ctypes.addressof(here), 1, INT8, rank.peer, comm, stream),
        "no memory": send(None, 1, INT8, rank.peer, comm, stream),
        "beyond memory": send(memory, 2, INT8, rank.peer, comm, stream),
        "itself": send(memory, 1, INT8, rank.rank, comm, stream),
        "rank 7": send(memory, 1, INT8, 7, comm, stream),
        "no communicator": send(memory, 1, INT8, rank.peer, None, stream),
    }


def buffers(rank: Rank) -> dict[str, Any]:
    """How much device memory a communicator takes, and when."""
    free = [rank.lib.free_memory()]
    comm, stream = rank.communicator(comm_config(buffer_mb=32)), rank.lib.stream()
    memory = rank.lib.device_memory(b"x" * MIB)
    free.append(rank.lib.free_memory() + MIB)
    move = rank.send if rank.rank == 0 else rank.recv
    issue = move(memory, MIB, comm, stream)
    rank.synchronize(stream)
    free.append(rank.lib.free_memory() + MIB)
    rank.lib.hccl.HcclCommDestroy(comm)
    free.append(rank.lib.free_memory() + MIB)
    return {"issue": issue, "taken_mib": [(free[0] - now) // MIB for now in free]}


def destroy_busy(rank: Rank) -> dict[str, Any]:
    """Rank 0 destroys a communicator with an operation under way, then again after it."""
    comm, stream = rank.communicator(), rank.lib.stream()
    memory, destroy = rank.lib.device_memory(b"x"), rank.lib.hccl.HcclCommDestroy
    rank.warm_up(comm, stream)
    if rank.rank == 1:
        hear()
        check(rank.recv(memory, 1, comm, stream))
        return {"end": rank.synchronize(stream)}
    check(rank.send(memory, 1, comm, stream))
    busy = destroy(comm)
    say("refused")
    check(rank.synchronize(stream))
    return {"busy": busy, "idle": destroy(comm), "again": destroy(comm)}


def destroy_during_setup(rank: Rank) -> dict[str, Any]:
    """Rank 0 waits for its peer in link set-up until another thread destroys it."""
    comm, stream = rank.communicator(), rank.lib.stream()
    memory = rank.lib.device_memory(b"x")
    if rank.rank == 1:
        hear()
        return {}
    issued: list[int] = []

    def issue() -> None:
        check(rank.lib.acl.aclrtSetDevice(0))
        issued.append(rank.send(memory, 1, comm, stream))

    thread = threading.Thread(target=issue)
    thread.start()
    while rank.lib.hccl.fakeHcclNumInSetup(comm) == 0:
        pass
    destroyed = rank.lib.hccl.HcclCommDestroy(comm)
    thread.join()
    return {"issue": issued[0], "destroyed": destroyed}


def issue_from_two_threads(rank: Rank) -> dict[str, Any]:
    """Rank 0 is in an operation in one thread when another issues one: it does not survive."""
    comm, stream = rank.communicator(), rank.lib.stream()
    memory = rank.lib.device_memory(b"x")
    if rank.rank == 1:
        hear()
        return {}

    def issue() -> None:
        check(rank.lib.acl.aclrtSetDevice(0))
        rank.send(memory, 1, comm, stream)

    threading.Thread(target=issue, daemon=True).start()
    while rank.lib.hccl.fakeHcclNumInSetup(comm) == 0:
        pass
    rank.recv(memory, 1, comm, stream)
    return {}


def create_in_two_threads(rank: Rank) -> dict[str, Any]:
    """Rank 0 creates two communicators at once: it does not survive."""
    if rank.rank == 1:
        hear()
        return {}
    roots = [rank.lib.root_info() for _ in range(2)]
    say(roots[0].hex())

    def create(root_info: bytes) -> None:
        check(rank.lib.acl.aclrtSetDevice(0))
        rank.lib.hccl.HcclCommInitRootInfo(2, root_info, 0, byref(c_void_p()))

    threads = [threading.Thread(target=create, args=(root,)) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {}


def issue_during_capture(rank: Rank) -> dict[str, Any]:
    """An operation and a new communicator while a graph is being captured."""
    comm, stream, side = rank.communicator(), rank.lib.stream(), rank.lib.stream()
    memory, graph = rank.lib.device_memory(b"x"), c_void_p()
    rank.warm_up(comm, side)
    check(rank.lib.acl.aclmdlRICaptureBegin(stream, 0))
    move = rank.send if rank.rank == 0 else rank.recv
    codes: list[int] = []

    def issue() -> None:
        check(rank.lib.acl.aclrtSetDevice(0))
        codes.append(move(memory, 1, comm, side))

    thread = threading.Thread(target=issue)
    thread.start()
    thread.join()
    message = rank.lib.acl.aclGetRecentErrMsg()
    check(rank.lib.acl.aclmdlRICaptureEnd(stream, byref(graph)))
    check(move(memory, 1, comm, side))
    return {"during": codes[0], "after": rank.synchronize(side), "message": message.decode()}


def root_only(rank: Rank) -> dict[str, Any]:
    """Only a root info; ranks of a communicator that never comes to be wait for it."""
    if rank.rank == 1:
        hear()
        return {}
    root_info = rank.lib.root_info()
    say("made")
    created = rank.lib.hccl.HcclCommInitRootInfo(2, root_info, 0, byref(c_void_p()))
    return {"created": created}


def root_is_gone(rank: Rank) -> dict[str, Any]:
    """Rank 1 joins after rank 0, which made the root info, was killed."""
    if rank.rank == 0:
        say(rank.lib.root_info().hex())
        hear()
        return {}
    root_info = bytes.fromhex(hear())
    created = rank.lib.hccl.HcclCommInitRootInfo(2, root_info, 1, byref(c_void_p()))
    return {"created": created}


def make_root(rank: Rank) -> dict[str, Any]:
    """Make two root infos; a port is held for each."""
    if rank.rank == 1:
        hear()
        return {}
    say("rank 1 is not needed")
    codes = []
    for _ in range(2):
        try:
            rank.lib.root_info()
            codes.append(0)
        except CannError as error:
            codes.append(error.code)
    return {"codes": codes}
