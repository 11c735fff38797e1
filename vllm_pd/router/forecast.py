"""How long a prefill will take, from those that have ended. Pure."""

from __future__ import annotations

_WEIGHT = 0.25
"""Of the newest prefill in the mean: one that a busy host delayed counts little."""

_EARLIER = 0.1
"""Part of a forecast by which it may be too long."""


class PrefillForecast:
    """What the prefills of one instance took, by how much it had to compute.

    Seconds per token are about constant only among prefills of about one size: short ones
    are mostly fixed cost, and attention makes long ones dearer. So there is one mean for
    every power of two.
    """

    def __init__(self) -> None:
        self._pace: dict[int, float] = {}  # seconds per token, by bit length of the tokens

    def note(self, num_tokens: int, seconds: float) -> None:
        """Learn from a prefill that has ended.

        Args:
            num_tokens: what the instance had to compute when it was sent, itself included.
            seconds: from then to its end.
        """
        size, pace = num_tokens.bit_length(), seconds / max(1, num_tokens)
        before = self._pace.get(size, pace)
        self._pace[size] = before + _WEIGHT * (pace - before)

    def expected_s(self, num_tokens: int) -> float | None:
        """Return how long a prefill will take that is sent now; None: none has ended yet."""
        if not self._pace:
            return None
        size = num_tokens.bit_length()
        nearest = min(self._pace, key=lambda known: (abs(known - size), known))
        return self._pace[nearest] * num_tokens

    def pause_s(self, num_tokens: int, lead_s: float) -> float | None:
        """Return how long to wait until such a prefill has only ``lead_s`` left, about.

        Rather too short than too long. None: nobody can tell.
        """
        expected_s = self.expected_s(num_tokens)
        if expected_s is None:
            return None
        return max(0.0, expected_s * (1 - _EARLIER) - lead_s)
