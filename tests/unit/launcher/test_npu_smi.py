"""``npu-smi info``, after the format in its documentation; none of these was recorded."""

from __future__ import annotations

from vllm_pd.launcher.npu_smi import Npu, NpuProcess, complaints, parse_info

HEAD = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
"""
PROCESSES = """\
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
"""


def card(number: int, *, health: str = "OK", used: int = 3409) -> str:
    return f"""\
| {number}     910B3               | {health:13} | 91.8        46                0 / 0        |
| 0                         | 0000:C1:00.0  | 0           0    / 0          {used} / 65536         |
+===========================+===============+====================================================+
"""


EIGHT = HEAD + "".join(card(number) for number in range(8))
IDLE = "| No running processes found in NPU 0                          |\n"
A3 = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 172.5       37                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3118 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2886 / 65536         |
+===========================+===============+====================================================+
"""


def test_eight_cards_are_eight_devices() -> None:
    npus = parse_info(EIGHT + PROCESSES + IDLE)
    assert [npu.index for npu in npus] == list(range(8))
    assert npus[3] == Npu(3, 3, 0, "910B3", "OK", 3409, 65536)


def test_two_chips_of_one_card_are_two_devices() -> None:
    assert [(npu.index, npu.card, npu.chip) for npu in parse_info(A3)] == [(0, 0, 0), (1, 0, 1)]


def test_processes_belong_to_their_chip() -> None:
    running = (
        "| 1       0                 | 4711          | python                   | 30720      |\n"
    )
    first, second, *_ = parse_info(EIGHT + PROCESSES + running)
    assert first.processes == ()
    assert second.processes == (NpuProcess(4711, "python", 30720),)


def test_error_message_is_no_table() -> None:
    assert parse_info("dcmi module initialize failed. ret is -8005") == ()


def test_idle_npus_are_fine() -> None:
    assert complaints(parse_info(EIGHT), "01234567") == []


def test_npu_that_is_missing_is_named() -> None:
    assert complaints(parse_info(A3), ["2"]) == ["there is no NPU 2: npu-smi info shows 2"]


def test_npu_that_is_ill_is_named() -> None:
    npus = parse_info(HEAD + card(0, health="Alarm"))
    assert "NPU 0 is not healthy: Alarm" in complaints(npus, ["0"])[0]


def test_npu_in_use_is_named_with_its_process() -> None:
    running = (
        "| 0       0                 | 4711          | python                   | 30720      |\n"
    )
    npus = parse_info(HEAD + card(0) + PROCESSES + running)
    assert "NPU 0 is in use by process 4711 (python, 30720 MB)" in complaints(npus, ["0"])[0]


def test_npu_whose_memory_is_in_use_is_named_though_no_process_shows() -> None:
    npus = parse_info(HEAD + card(0, used=60000))
    assert "60000 of 65536 MB in use" in complaints(npus, ["0"])[0]
