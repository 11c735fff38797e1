"""What ``npu-smi info`` tells about the NPUs of this machine. Pure.

The table as its documentation shows it: two lines per chip, the first with the number of
the NPU, its name and health, the second with the chip's number (on A3 followed by the
physical one), bus and memory; then the processes. Nobody here has run it: the parser
takes cells as they come and passes over lines that are something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_BUSY_SHARE = 0.2
"""Part of the memory above which somebody else computes: an idle 910B shows some 5 %."""


@dataclass(frozen=True, slots=True)
class NpuProcess:
    """A process on an NPU. Those of other containers may not be shown."""

    pid: int
    name: str
    memory_mb: int


@dataclass(frozen=True, slots=True)
class Npu:
    """One chip, which is what torch_npu calls a device.

    Attributes:
        index: its number among all chips: what ASCEND_RT_VISIBLE_DEVICES takes.
        card: number of the NPU in the table.
        chip: number of the chip on it.
        name: e.g. ``910B3``.
        health: ``OK``, ``Warning``, ``Alarm`` or another word.
        used_mb: device memory in use.
        total_mb: device memory; 0 if it is not shown.
        processes: what runs on it.
    """

    index: int
    card: int
    chip: int
    name: str
    health: str
    used_mb: int = 0
    total_mb: int = 0
    processes: tuple[NpuProcess, ...] = field(default=())

    @property
    def is_busy(self) -> bool:
        """Whether somebody uses it."""
        return bool(self.processes) or self.used_mb > _BUSY_SHARE * self.total_mb > 0


def parse_info(table: str) -> tuple[Npu, ...]:
    """Read ``npu-smi info``; nothing for what is no such table."""
    rows = [_cells(line) for line in table.splitlines()]
    chips: list[tuple[int, int, str, str, int, int]] = []
    processes: dict[tuple[int, int], list[NpuProcess]] = {}
    card: tuple[int, str, str] | None = None
    for row in rows:
        if len(row) == 4 and (found := _process(row)):
            place, process = found
            processes.setdefault(place, []).append(process)
        elif len(row) != 3:
            card = None
        elif card is None:
            if found_card := re.fullmatch(r"(\d+)\s+(\S+)", row[0]):
                card = int(found_card[1]), found_card[2], row[1]
        else:
            if numbers := re.findall(r"\d+", row[0]):
                used, total = _memory(row[2])
                chips.append((card[0], int(numbers[0]), card[1], card[2], used, total))
            card = None
    return tuple(
        Npu(
            index, number, chip, name, health, used, total, tuple(processes.get((number, chip), ()))
        )
        for index, (number, chip, name, health, used, total) in enumerate(chips)
    )


def _cells(line: str) -> list[str]:
    """Return what is between the bars of a line of the table."""
    line = line.strip()
    if not line.startswith("|"):
        return []
    return [cell.strip() for cell in line.strip("|").split("|")]


def _memory(cell: str) -> tuple[int, int]:
    """Return the last ``USED / TOTAL`` of a cell: on the 910B that of HBM, after DDR's."""
    found = re.findall(r"(\d+)\s*/\s*(\d+)", cell)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def _process(row: Sequence[str]) -> tuple[tuple[int, int], NpuProcess] | None:
    place = re.fullmatch(r"(\d+)\s+(\d+)", row[0])
    if not (place and row[1].isdecimal() and row[3].isdecimal()):
        return None
    return (int(place[1]), int(place[2])), NpuProcess(int(row[1]), row[2], int(row[3]))


def complaints(npus: Sequence[Npu], wanted: Iterable[str]) -> list[str]:
    """Say what is wrong with NPUs that instances are to use, one line each.

    Args:
        npus: of the machine.
        wanted: their numbers, as instances are given them.
    """
    by_index = {str(npu.index): npu for npu in npus}
    found = []
    for index in wanted:
        npu = by_index.get(index)
        if npu is None:
            found.append(f"there is no NPU {index}: npu-smi info shows {len(npus)}")
        elif npu.health not in {"OK", "Warning"}:
            found.append(
                f"NPU {index} is not healthy: {npu.health}; npu-smi info -t health tells more"
            )
        elif npu.processes:
            process = npu.processes[0]
            found.append(
                f"NPU {index} is in use by process {process.pid} ({process.name}, "
                f"{process.memory_mb} MB): stop it, or use other NPUs"
            )
        elif npu.is_busy:
            found.append(
                f"NPU {index} has {npu.used_mb} of {npu.total_mb} MB in use, by a process of "
                "another container: stop it, or use other NPUs"
            )
    return found
