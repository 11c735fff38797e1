from __future__ import annotations

import pytest

from vllm_pd.errors import ConfigError
from vllm_pd.transport.fault_spec import FaultSpec, explain, faults_from, parse_faults

KNOWN = ("shm", "tcp")


def test_a_spec_names_faults_with_their_probabilities() -> None:
    text = "corrupt=0.1, delay=0.05:200ms, drop=.01, cut=0.01, reorder=0.2:1.5s, seed=7"
    assert parse_faults(text, KNOWN) == FaultSpec(
        corrupt=0.1,
        delay=0.05,
        delay_s=0.2,
        drop=0.01,
        cut=0.01,
        reorder=0.2,
        reorder_s=1.5,
        seed=7,
    )


def test_several_things_can_be_refused() -> None:
    spec = parse_faults("refuse=memfd,refuse=tcp,seed=1", KNOWN)
    assert spec.refuse == {"memfd", "tcp"}


def test_what_a_spec_prints_is_the_same_spec() -> None:
    text = "drop=0.5,delay=1:5ms,reorder=0.25,cut=1,corrupt=1e-03,refuse=shm,seed=3"
    spec = parse_faults(text.replace("1e-03", "0.001"), KNOWN)
    assert parse_faults(str(spec), KNOWN) == spec


def test_a_seed_is_chosen_where_none_is_given() -> None:
    assert len({parse_faults("drop=1", KNOWN).seed for _ in range(8)}) > 1


@pytest.mark.parametrize(
    ("text", "part", "reason"),
    [
        ("corrupts=0.1", "corrupts=0.1", "no such fault"),
        ("drop=0.1,,cut=1", "''", "no such fault"),
        ("drop", "'drop'", "not a probability"),
        ("drop=1.5", "drop=1.5", "not a probability"),
        ("drop=-1", "drop=-1", "not a probability"),
        ("drop=nan", "drop=nan", "not a probability"),
        ("drop=0.1:5ms", "drop=0.1:5ms", "not a probability"),
        ("delay=0.1:5", "delay=0.1:5", "not a duration"),
        ("delay=0.1:", "delay=0.1:", "not a duration"),
        ("delay=0.1:0ms", "delay=0.1:0ms", "not between"),
        ("delay=0.1:99999s", "delay=0.1:99999s", "not between"),
        ("drop=0.1,drop=0.2", "drop=0.2", "given twice"),
        ("refuse=ftp", "refuse=ftp", "known: memfd, shm, tcp"),
        ("seed=x", "seed=x", "not a whole number"),
    ],
)
def test_a_bad_part_is_named(text: str, part: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_faults(text, KNOWN)
    assert part in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("environ", [{}, {"VLLM_PD_FAULTS": ""}, {"VLLM_PD_FAULTS": " "}])
def test_an_empty_variable_means_no_faults(environ: dict[str, str]) -> None:
    assert faults_from(environ, KNOWN) is None


def test_every_fault_is_explained() -> None:
    spec = parse_faults(
        "drop=0.1,delay=0.2:5ms,reorder=0.3,cut=0.4,corrupt=0.5,refuse=memfd,refuse=tcp,seed=9",
        KNOWN,
    )
    names = [line.partition(":")[0] for line in explain(spec)]
    assert names == ["drop", "delay", "reorder", "cut", "corrupt", "refuse", "refuse", "seed"]


def test_a_fault_of_probability_0_is_not_explained() -> None:
    assert [line.partition(":")[0] for line in explain(parse_faults("drop=0", KNOWN))] == ["seed"]
