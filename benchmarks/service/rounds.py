"""What is measured of a service: one request at a time, everybody in every round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.service import client
from benchmarks.service.figures import Quartiles, Stages, Step, Ttft, Usage, quartiles_ms
from benchmarks.service.prompts import Prompts, rounds_of
from benchmarks.service.servers import Instance, Service
from benchmarks.service.usage import Idle, memory_of, watch_idle
from benchmarks.transfer.pair import BenchError

THROUGH, ALONE, DECODE, PLAIN = "through", "prefill", "decode", "plain"
STEP_PROMPT_LEN = 64
BLOCK_SIZE = 128
"""vLLM's on the CPU, in tokens."""

STAGES = ("handshake", "queued", "transfer", "verify", "total")

_WARM_UP_STEPS = 16
_FILL_BLOCKS = 8  # longer prompts take longer per block
_SETTLE_S = 2.0

Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure.

    Attributes:
        rounds: of time to first token, by prompt length.
        step_rounds: of the decode step.
        num_steps: tokens after the first in each of them.
        stage_rounds: requests by hand at each prompt length.
        idle_s: seconds during which idle processes are watched.
        fill: first use every block once. Memory that is shared with a peer has no
            pages before, and a service has been past that after a minute.
        gap_s: seconds before every request that is measured. A worker of vLLM spins for
            one second after its last step: the core would not be free for another
            instance, nor both cores for API servers and router.
    """

    rounds: Mapping[int, int]
    step_rounds: int
    num_steps: int
    stage_rounds: int
    idle_s: float
    fill: bool = True
    gap_s: float = 1.15


@dataclass(frozen=True, slots=True)
class Baseline:
    """An instance without a connector.

    Attributes:
        step: time per token after the first, in milliseconds.
        idle: what its processes use when idle, by kind.
        memory: their resident bytes beside the KV cache, by kind.
    """

    step: Quartiles
    idle: Mapping[str, Idle]
    memory: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything about one service.

    Attributes:
        baseline: what it was compared with.
        handshake_ms: of the first fetch from a peer never met; None: it does not tell.
        samples: the seconds behind the figures, by measurement and target.
    """

    ttft: Sequence[Ttft]
    steps: Sequence[Step]
    stages: Sequence[Stages]
    usage: Sequence[Usage]
    baseline: Baseline
    handshake_ms: float | None
    samples: Mapping[str, Samples]


class Bench:
    """Measures one service beside an instance without a connector.

    Args:
        service: what is measured.
        plain: an instance without a connector, measured in the same rounds; or what it
            was measured to be, where the service would disturb it: instances that spin
            leave nothing of their core to another.
        effort: how much.
        prompts: where prompts come from.
        seed: of the order in which targets are asked.
        tell: told what is being measured.
    """

    def __init__(
        self,
        service: Service,
        plain: Instance | Baseline,
        effort: Effort,
        prompts: Prompts,
        *,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self._service = service
        self._plain = plain if isinstance(plain, Instance) else None
        self._baseline = plain if isinstance(plain, Baseline) else None
        self._urls = {
            THROUGH: service.url,
            ALONE: service.prefill.url,
            DECODE: service.decode.url,
        }
        if self._plain:
            self._urls[PLAIN] = self._plain.url
        self._effort = effort
        self._prompts = prompts
        self._seed = seed
        self._tell = tell
        self._num_through = 0  # prompt tokens that the decode instance must have fetched
        self._samples: dict[str, Samples] = {}

    def run(self, kv_len: int, *, timelines: bool) -> Measured:
        """Measure everything.

        Args:
            kv_len: bytes of the KV cache of each instance.
            timelines: the service tells where the time of a fetch went.

        Raises:
            BenchError: a request failed, or was not served as it should be.
        """
        self._tell("warming up")
        before = client.fetched_tokens(self._service.decode.url)
        handshake_ms = self._first_handshake_ms() if timelines else None
        self._warm_up()
        if self._effort.fill:
            self._fill()
        ttft = [self._ttft(length) for length in self._effort.rounds]
        step = self._steps()
        stages = [self._stages(length) for length in self._effort.rounds] if timelines else []
        self._check_fetched(before)
        idle, memory = self._watch(kv_len)
        baseline = self._baseline or Baseline(step[PLAIN], idle[PLAIN], memory[PLAIN])
        name = self._service.name
        return Measured(
            ttft=ttft,
            steps=[Step(name, way, step[way], baseline.step) for way in (DECODE, THROUGH)],
            stages=stages,
            usage=[
                Usage(
                    service=name,
                    instance=instance,
                    idle=used,
                    plain_idle=baseline.idle[kind],
                    memory_len=memory[instance][kind],
                    plain_memory_len=baseline.memory[kind],
                )
                for instance in (ALONE, DECODE)
                for kind, used in idle[instance].items()
            ],
            baseline=baseline,
            handshake_ms=handshake_ms,
            samples=self._samples,
        )

    def _first_handshake_ms(self) -> float:
        legs = self._by_hand(STEP_PROMPT_LEN)
        return 1e3 * float(legs.timeline["handshake_s"])

    def _warm_up(self) -> None:
        """Have everybody do everything once: memory is mapped and code is loaded on first use."""
        for target in self._urls:
            for length in self._effort.rounds:
                self._ask(target, length, 1)
            self._ask(target, STEP_PROMPT_LEN, _WARM_UP_STEPS)

    def _fill(self) -> None:
        """Use every block of both instances, and every mapping between them."""
        self._tell("using every block of the KV cache once")
        instances = (self._service.prefill, self._service.decode)
        num_blocks = max(client.num_blocks(one.url) for one in instances)
        for _ in range(-(-num_blocks // _FILL_BLOCKS)):
            self._ask(THROUGH, _FILL_BLOCKS * BLOCK_SIZE, 1)

    def _ttft(self, length: int) -> Ttft:
        self._tell(f"time to first token, prompts of {length} tokens")
        names = [name for name in self._urls if name != DECODE]
        samples: Samples = {name: [] for name in names}
        for names_now in rounds_of(names, self._effort.rounds[length], self._seed + length):
            for name in names_now:
                self._rest()
                samples[name].append(self._ask(name, length, 1).first_s)
        self._samples[f"ttft-{length}"] = samples
        found = {name: quartiles_ms(seconds) for name, seconds in samples.items()}
        return Ttft(self._service.name, length, found[THROUGH], found[ALONE], found.get(PLAIN))

    def _steps(self) -> dict[str, Quartiles]:
        self._tell("decode step")
        names = [name for name in self._urls if name != ALONE]
        samples: Samples = {name: [] for name in names}
        for names_now in rounds_of(names, self._effort.step_rounds, self._seed):
            for name in names_now:
                self._rest()
                streamed = self._ask(name, STEP_PROMPT_LEN, self._effort.num_steps + 1)
                samples[name].append(streamed.step_s)
        self._samples["step"] = samples
        return {name: quartiles_ms(seconds) for name, seconds in samples.items()}

    def _stages(self, length: int) -> Stages:
        self._tell(f"stages of the fetch, prompts of {length} tokens")
        all_legs = []
        for _ in range(self._effort.stage_rounds):
            self._rest()
            all_legs.append(self._by_hand(length))
        samples: Samples = {
            name: [float(legs.timeline[f"{name}_s"]) for legs in all_legs] for name in STAGES
        }
        samples["prefill_leg"] = [legs.prefill_s for legs in all_legs]
        samples["decode_leg"] = [legs.decode_s for legs in all_legs]
        self._samples[f"stages-{length}"] = samples
        medians = {name: 1e3 * statistics.median(seconds) for name, seconds in samples.items()}
        last = all_legs[-1].timeline
        return Stages(
            prompt_len=length,
            num_bytes=int(last["num_bytes"]),
            transport=str(last["transport"]),
            stages={name: medians[name] for name in STAGES},
            prefill_leg=medians["prefill_leg"],
            decode_leg=medians["decode_leg"],
        )

    def _watch(self, kv_len: int) -> tuple[dict[str, dict[str, Idle]], dict[str, dict[str, int]]]:
        """Return idle CPU and memory of every instance's processes."""
        self._tell("idle CPU and memory")
        instances = {ALONE: self._service.prefill, DECODE: self._service.decode}
        if self._plain:
            instances[PLAIN] = self._plain
        time.sleep(_SETTLE_S)
        idle = watch_idle(instances, self._effort.idle_s)
        return idle, {name: memory_of(one, kv_len) for name, one in instances.items()}

    def _rest(self) -> None:
        """Wait until what was asked before leaves the cores to others."""
        time.sleep(self._effort.gap_s)

    def _ask(self, target: str, prompt_len: int, num_tokens: int) -> client.Streamed:
        path = None
        if target == THROUGH:
            path = client.PATH_DISAGGREGATED
            self._num_through += prompt_len
        prompt = self._prompts.fresh(prompt_len)
        streamed = client.stream(self._urls[target], prompt, num_tokens, path=path)
        if streamed.num_tokens != num_tokens:
            raise BenchError(f"{target} made {streamed.num_tokens} tokens, not {num_tokens}")
        return streamed

    def _by_hand(self, prompt_len: int) -> client.Legs:
        prompt = self._prompts.fresh(prompt_len)
        legs = client.two_legs(self._service.prefill.url, self._service.decode.url, prompt)
        self._num_through += prompt_len
        return legs

    def _check_fetched(self, before: int) -> None:
        """Check that no request was quietly prefilled where it was decoded."""
        fetched = client.fetched_tokens(self._service.decode.url) - before
        # The last token of a prompt may be counted as computed, as it always is.
        if fetched < self._num_through * 0.98:
            raise BenchError(
                f"only {fetched} of {self._num_through} prompt tokens came from the prefill "
                f"instance of {self._service.name}"
            )
