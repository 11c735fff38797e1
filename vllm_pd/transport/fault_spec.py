"""Which faults to inject, as ``VLLM_PD_FAULTS`` says it. Pure.

The grammar, with probabilities from 0 to 1 and durations in ``ms`` or ``s``::

    SPEC  = PART ("," PART)*
    PART  = "drop=" P | "cut=" P | "corrupt=" P
          | "delay=" P [":" DURATION] | "reorder=" P [":" DURATION]
          | "refuse=" ("memfd" | TRANSPORT)
          | "seed=" NUMBER
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from vllm_pd.errors import ConfigError

VARIABLE = "VLLM_PD_FAULTS"
"""Environment variable that holds a spec."""

MEMFD = "memfd"
"""What can be refused besides transports: pages that another process can map."""

_MAX_DURATION_S = 3600.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
_PROBABILITY = re.compile(r"\d*\.?\d+")
_EXAMPLE = "corrupt=0.1,delay=0.05:200ms,drop=0.01,seed=7"


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """Faults, each with the probability that it hits one half of a transfer.

    Attributes:
        drop: the half is never handed to the transport.
        delay: it is handed over late, and those behind it, too.
        delay_s: by so much.
        reorder: it is handed over after the next one.
        reorder_s: or after so long, if there is no next one.
        cut: the links to the peer are cut while it runs.
        corrupt: a byte that arrived is changed before it is verified.
        refuse: transports that do not work here; ``MEMFD`` for shared pages.
        seed: of all decisions.
    """

    drop: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.1
    reorder: float = 0.0
    reorder_s: float = 0.05
    cut: float = 0.0
    corrupt: float = 0.0
    refuse: frozenset[str] = frozenset()
    seed: int = 0

    def __str__(self) -> str:
        """Return the spec in full, so that a run can be repeated."""
        parts = [
            f"drop={self.drop:g}" if self.drop else "",
            f"delay={self.delay:g}:{self.delay_s * 1e3:g}ms" if self.delay else "",
            f"reorder={self.reorder:g}:{self.reorder_s * 1e3:g}ms" if self.reorder else "",
            f"cut={self.cut:g}" if self.cut else "",
            f"corrupt={self.corrupt:g}" if self.corrupt else "",
            *(f"refuse={name}" for name in sorted(self.refuse)),
            f"seed={self.seed}",
        ]
        return ",".join(part for part in parts if part)


@dataclass(slots=True)
class _Draft:
    """A spec that is being read."""

    values: dict[str, float | int] = field(default_factory=dict)
    refuse: set[str] = field(default_factory=set)


def faults_from(environ: Mapping[str, str], transports: Collection[str]) -> FaultSpec | None:
    """Return the faults that an environment asks for; None for none.

    Args:
        environ: the environment.
        transports: names that may be refused.

    Raises:
        ConfigError: see ``parse_faults``.
    """
    text = environ.get(VARIABLE, "")
    return parse_faults(text, transports) if text.strip() else None


def parse_faults(text: str, transports: Collection[str]) -> FaultSpec:
    """Parse a spec. Without a seed it gets one by chance.

    Raises:
        ConfigError: it names the part that is wrong.
    """
    draft = _Draft()
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            _read_part(draft, name, value, transports)
        except ValueError as exc:
            raise ConfigError(
                f"{VARIABLE}: {part.strip()!r}: {exc}", hint=f"for example {_EXAMPLE}"
            ) from exc
    draft.values.setdefault("seed", secrets.randbelow(1_000_000))
    return FaultSpec(**draft.values, refuse=frozenset(draft.refuse))  # type: ignore[arg-type]


def _read_part(draft: _Draft, name: str, value: str, transports: Collection[str]) -> None:
    """Add one part to a draft.

    Raises:
        ValueError: it is wrong.
    """
    if name not in _READERS:
        raise ValueError(f"no such fault (known: {', '.join(_READERS)})")
    if name in draft.values:
        raise ValueError("given twice")
    _READERS[name](draft, name, value, transports)


def explain(spec: FaultSpec) -> list[str]:
    """Return what a spec does, in one sentence for each fault."""
    lines = []
    if spec.drop:
        lines.append(f"drop: {_share(spec.drop)} is never posted; the other side times out")
    if spec.delay:
        lines.append(
            f"delay: {_share(spec.delay)} is posted {spec.delay_s * 1e3:g} ms late, "
            "and so are those behind it"
        )
    if spec.reorder:
        lines.append(
            f"reorder: {_share(spec.reorder)} is posted after the next one, "
            f"or after {spec.reorder_s * 1e3:g} ms"
        )
    if spec.cut:
        lines.append(f"cut: the links to the peer are cut while {_share(spec.cut)} runs")
    if spec.corrupt:
        lines.append(
            f"corrupt: one byte of {spec.corrupt * 100:g} % of the transfers changes on arrival; "
            "digests=always finds every one, digests=sampled does not"
        )
    if MEMFD in spec.refuse:
        lines.append("refuse: KV pages are not shared; shm reads by process_vm_readv")
    lines += [
        f"refuse: the {name} transport does not work"
        for name in sorted(spec.refuse)
        if name != MEMFD
    ]
    return [*lines, f"seed: {spec.seed}; the same seed makes the same decisions"]


def _share(probability: float) -> str:
    return f"{probability * 100:g} % of the halves of transfers"


def _read_probability(draft: _Draft, name: str, value: str, _: Collection[str]) -> None:
    draft.values[name] = _probability(value)


def _read_timed(draft: _Draft, name: str, value: str, _: Collection[str]) -> None:
    probability, colon, duration = value.partition(":")
    draft.values[name] = _probability(probability)
    if colon:
        draft.values[f"{name}_s"] = _duration_s(duration)


def _read_refusal(draft: _Draft, _: str, value: str, transports: Collection[str]) -> None:
    if value != MEMFD and value not in transports:
        known = ", ".join([MEMFD, *sorted(transports)])
        raise ValueError(f"{value!r} cannot be refused (known: {known})")
    draft.refuse.add(value)


def _read_seed(draft: _Draft, name: str, value: str, _: Collection[str]) -> None:
    if not (value.isascii() and value.isdigit()) or len(value) > 18:
        raise ValueError(f"{value!r} is not a whole number")
    draft.values[name] = int(value)


def _probability(text: str) -> float:
    if not _PROBABILITY.fullmatch(text) or not 0 <= float(text) <= 1:
        raise ValueError(f"{text!r} is not a probability from 0 to 1")
    return float(text)


def _duration_s(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration like 200ms or 1.5s")
    duration_s = float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)
    if not 0 < duration_s <= _MAX_DURATION_S:
        raise ValueError(f"{text} is not between 0 and {_MAX_DURATION_S:g} s")
    return duration_s


_READERS: dict[str, Callable[[_Draft, str, str, Collection[str]], None]] = {
    "drop": _read_probability,
    "delay": _read_timed,
    "reorder": _read_timed,
    "cut": _read_probability,
    "corrupt": _read_probability,
    "refuse": _read_refusal,
    "seed": _read_seed,
}
