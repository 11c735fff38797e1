"""Options of the connector, the router and a whole deployment.

Frozen structs, parsed and checked once at the edge. Units are in the names.
Unknown keys are refused by name, because a misspelt option that is silently
ignored is found only under load.
"""

from __future__ import annotations

import enum
import ipaddress
import math
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from vllm_pd.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

DEFAULT_ROUTER_PORT = 8000
MAX_ROUTER_WORKERS = 64
DEFAULT_PREFILL_PORT = 8100
DEFAULT_DECODE_PORT = 8200


def is_loopback(host: str) -> bool:
    """Return whether an address is reached without leaving the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_positive(options: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not 0 < value < math.inf:  # false for nan, too
            raise ValueError(f"{name} must be positive, not {value}")


class Role(enum.StrEnum):
    """What an instance is used for. A label of router and launcher: engines run both."""

    PREFILL = "prefill"
    DECODE = "decode"


class RoleLabel(enum.StrEnum):
    """What an instance may be used for; can be changed while it serves."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    def serves(self, role: Role) -> bool:
        """Return whether requests in a role may go to an instance with this label."""
        name: str = self  # to read an enum's ``value`` takes longer than all the rest
        return self is RoleLabel.BOTH or name == role


class Digests(enum.Enum):
    """How much of a transfer is verified before vLLM is told of it."""

    OFF = "off"
    SAMPLED = "sampled"  # some windows of every transfer, chosen by chance
    ALWAYS = "always"  # every byte


class ConnectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``kv_connector_extra_config`` of one vLLM instance.

    Attributes:
        transport: ``"auto"`` (the best that both ends offer) or the names of the
            transports to offer, best first, e.g. ``"shm,tcp"``.
        side_channel_host: address that control and data sockets bind to, and
            that peers are told. A non-loopback address needs a cluster key.
        side_channel_port: port of the instance's control endpoint; 0 picks a free one.
        cluster_key_file: key made by ``vllm-pd keygen``, the same on all
            instances; without it the control channel is plaintext on loopback.
        tls: encrypt the data links of the tcp transport with the certificate in
            ``cluster_key_file``; the same on all instances.
        lease_s: how long a finished prefill's blocks wait for their consumer, from
            the grant or the last renewal.
        max_lease_s: longest time that renewals can keep blocks, from the grant.
        handshake_timeout_s: longest wait for a peer's handshake.
        transfer_timeout_s: longest wait for the blocks of one request, from the
            fetch to the last byte.
        prefill_wait_s: longest wait for a prefill that has not ended when the decode
            request comes; with ``transfer_timeout_s`` on top.
        min_load_tokens: prompts of which a transfer would save fewer tokens are
            computed locally. The last prompt token is always computed.
        digests: how much of a fetch is verified: ``off``, ``sampled`` or ``always``.
        num_copy_threads: threads that copy blocks in the shm transport.
        num_streams: connections per peer in the tcp transport.
        staging_len: pinned host memory for the KV cache of a device, in bytes.
    """

    transport: str = "auto"
    side_channel_host: str = "127.0.0.1"
    side_channel_port: int = 0
    cluster_key_file: str | None = None
    tls: bool = False
    lease_s: float = 30.0
    max_lease_s: float = 600.0
    handshake_timeout_s: float = 10.0
    transfer_timeout_s: float = 30.0
    prefill_wait_s: float = 600.0
    min_load_tokens: int = 1
    digests: Digests = Digests.SAMPLED
    num_copy_threads: int = 1
    num_streams: int = 2
    staging_len: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "lease_s",
            "max_lease_s",
            "handshake_timeout_s",
            "transfer_timeout_s",
            "prefill_wait_s",
            "min_load_tokens",
            "num_copy_threads",
            "num_streams",
            "staging_len",
        )
        if self.tls and self.cluster_key_file is None:
            raise ValueError("tls needs a cluster_key_file (vllm-pd keygen makes one)")
        if not 0 <= self.side_channel_port <= 65535:
            raise ValueError(f"side_channel_port {self.side_channel_port} is not a port")
        if self.side_channel_host in {"", "*", "0.0.0.0", "::"}:
            raise ValueError(
                f"side_channel_host {self.side_channel_host!r} is not an address that peers can "
                "connect to: name the one that other hosts reach this host by"
            )
        if not self.is_loopback and self.cluster_key_file is None:
            raise ValueError(
                f"side_channel_host {self.side_channel_host} is reachable from other hosts: "
                "set cluster_key_file (vllm-pd keygen makes one)"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach the control channel."""
        return is_loopback(self.side_channel_host)

    @property
    def transport_names(self) -> tuple[str, ...] | None:
        """Transports to offer, best first; None for ``auto``."""
        if self.transport == "auto":
            return None
        names = tuple(name.strip() for name in self.transport.split(",") if name.strip())
        if not names:
            raise ConfigError("transport is empty", hint='use "auto", "shm", "tcp" or "shm,tcp"')
        return names


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One instance, as the router is told of it.

    Attributes:
        url: base URL of its HTTP server.
        role: what it may be used for.
        control: ``host:port`` of its control endpoint; None: what it runs, and what it
            keeps for others, is not known.
    """

    url: str
    role: RoleLabel = RoleLabel.BOTH
    control: str | None = None


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The router's options.

    Attributes:
        host: address to listen on.
        port: port to listen on.
        prefill_urls: base URLs of the prefill instances.
        decode_urls: base URLs of the decode instances.
        instances: further instances, with roles and control endpoints.
        instances_file: YAML file of further instances, read again when it changes.
        cluster_key_file: key of the instances' control endpoints, made by ``vllm-pd
            keygen``; without it only those on this host are spoken to.
        admin_key_file: file with the key of ``/admin``; without it there is no ``/admin``.
        connect_timeout_s: longest wait for a TCP connection to an instance.
        prefill_timeout_s: longest wait for the prefill leg.
        decode_idle_timeout_s: longest silence of the decode leg.
        client_timeout_s: longest time for a client to send a body, and to take each part
            of a stream; a connection without a request is closed after once to twice that.
        max_body_len: largest request body, in bytes.
        max_held_len: most bytes of request bodies that are held at the same time, by all
            processes together.
        min_prefill_tokens: prompts with fewer tokens that the decode instance has not
            cached are prefilled there, if it has room; 0: none are. Lengths are estimates.
        max_local_prefill_tokens: largest number of uncached prompt tokens that a decode
            instance may have to prefill at one time for requests that could be
            disaggregated.
        local_prefill_cost: how many times as dear a prompt token is on a decode instance
            as on a prefill instance; a prompt is prefilled where it is decoded if that
            is cheaper than the queue of the prefill instance. None: never for that reason.
        early_decode_s: how long before the end of a prefill the decode leg is sent, so that
            it loses no time when the KV cache is there; a tenth of what the prefill is
            expected to take comes on top, as that can be wrong. 0: after the end.
        health_interval_s: pause between two health probes of an instance.
        health_failures: failed probes in a row that take an instance out of use.
        health_successes: good probes in a row that bring it back.
        breaker_failures: failed requests in a row that stop requests to an instance.
        breaker_backoff_s: first pause before it gets a request again; doubled for each
            further failure.
        breaker_max_backoff_s: longest such pause.
        prefill_max_concurrent: most prefills at the same time, per prefill instance.
        decode_max_concurrent: most requests at the same time, per decode instance.
        max_queue: most requests that wait for a prefill, and most that wait for a
            decode instance; 0: none waits.
        queue_timeout_s: longest wait in each of these queues.
        api_keys_file: names and keys of the clients; None: everybody is served.
        upstream_key_file: the key that the instances expect; None: see
            ``router.api_keys``.
        access_log: file that gets a line of JSON for each request; ``-`` is standard
            output. None: no access log.
        otlp_traces_endpoint: collector that gets traces of the requests; None: no traces.
        workers: processes that share the port.
        ssl_certfile: certificate to serve TLS with, and its chain, PEM; None: plain HTTP.
        ssl_keyfile: its private key, PEM.
        ssl_ca_certs: authorities that clients' certificates have to be of, PEM.
        ssl_cert_reqs: 0: clients are not asked for a certificate; 1: they may have one;
            2: they must. Named and numbered as in vLLM.
        upstream_ca_file: authorities that the certificates of ``https://`` instances have
            to be of, PEM; None: those that the system trusts.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_ROUTER_PORT
    prefill_urls: tuple[str, ...] = ()
    decode_urls: tuple[str, ...] = ()
    instances: tuple[InstanceSpec, ...] = ()
    instances_file: str | None = None
    cluster_key_file: str | None = None
    admin_key_file: str | None = None
    connect_timeout_s: float = 3.0
    prefill_timeout_s: float = 600.0
    decode_idle_timeout_s: float = 600.0
    client_timeout_s: float = 60.0
    max_body_len: int = 64 * 1024 * 1024
    max_held_len: int = 1024 * 1024 * 1024
    # The length from which a prefill leg pays depends on model and hardware, and decode
    # instances are sized for decoding: unless they are told to, they prefill nothing.
    min_prefill_tokens: int = 0
    max_local_prefill_tokens: int = 8192
    local_prefill_cost: float | None = None
    # What it saves, the way into the decode engine, is the same for any wait; what it
    # costs, blocks and polling at the decode instance, grows with it.
    early_decode_s: float = 0.03
    health_interval_s: float = 1.0
    health_failures: int = 3
    health_successes: int = 2
    breaker_failures: int = 5
    breaker_backoff_s: float = 1.0
    breaker_max_backoff_s: float = 30.0
    prefill_max_concurrent: int = 4096
    decode_max_concurrent: int = 4096
    max_queue: int = 1024
    queue_timeout_s: float = 60.0
    api_keys_file: str | None = None
    upstream_key_file: str | None = None
    access_log: str | None = None
    otlp_traces_endpoint: str | None = None
    workers: int = 1
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    upstream_ca_file: str | None = None

    def __post_init__(self) -> None:
        self._check_addresses()
        _check_positive(
            self,
            "connect_timeout_s",
            "prefill_timeout_s",
            "decode_idle_timeout_s",
            "client_timeout_s",
            "health_interval_s",
            "health_failures",
            "health_successes",
            "breaker_failures",
            "breaker_backoff_s",
            "breaker_max_backoff_s",
            "max_body_len",
            "prefill_max_concurrent",
            "decode_max_concurrent",
            "queue_timeout_s",
        )
        if self.max_queue < 0:
            raise ValueError(f"max_queue must not be negative, not {self.max_queue}")
        if self.max_held_len < self.max_body_len:
            raise ValueError(
                f"max_held_len {self.max_held_len} is less than max_body_len {self.max_body_len}: "
                "the largest body could never be read"
            )
        for name in ("min_prefill_tokens", "max_local_prefill_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.early_decode_s < math.inf:
            raise ValueError(
                f"early_decode_s must be finite and not negative, not {self.early_decode_s}"
            )
        if self.local_prefill_cost is not None:
            _check_positive(self, "local_prefill_cost")
        if not 1 <= self.workers <= MAX_ROUTER_WORKERS:
            raise ValueError(f"workers must be from 1 to {MAX_ROUTER_WORKERS}, not {self.workers}")
        self._check_tls()

    def _check_addresses(self) -> None:
        for url in (*self.prefill_urls, *self.decode_urls):
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"instance address {url!r} does not start with http://")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"{self.port} is not a port")
        for name in ("access_log", "otlp_traces_endpoint"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty: leave it out to have none")

    def _check_tls(self) -> None:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile need each other")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ValueError(f"ssl_cert_reqs must be 0, 1 or 2, not {self.ssl_cert_reqs}")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("ssl_ca_certs needs ssl_certfile and ssl_keyfile")
        if (self.ssl_ca_certs is None) != (self.ssl_cert_reqs == 0):
            raise ValueError(
                "ssl_ca_certs and ssl_cert_reqs need each other: 2 asks every client for a "
                "certificate of these authorities"
            )


class InstanceGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal instances of one role, as a topology file writes them.

    Attributes:
        count: number of instances.
        tp: tensor-parallel size of each.
        port: HTTP port of the first; the others follow. None: the topology's for the role.
        devices: device (or CPU core) indices for the whole group; None: assigned.
        args: further ``vllm serve`` arguments.
        env: further environment variables.
    """

    count: int = 1
    tp: int = 1
    port: int | None = None
    devices: tuple[int, ...] | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.count < 1 or self.tp < 1:
            raise ValueError(f"{self.count}x{self.tp}: instances and TP size must be at least 1")
        if self.devices is not None and len(set(self.devices)) != max(len(self.devices), 1):
            raise ValueError(f"devices {list(self.devices)}: name each once, and at least one")


class Topology(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole deployment: ``vllm-pd up --config FILE.yaml``.

    Attributes:
        model: checkpoint folder or Hugging Face name; None: the demo model.
        served_model_name: name at the API; None: the value of ``model``.
        device: ``cpu``, ``cuda``, ``npu`` or None to detect.
        prefill: the prefill instances; None: chosen by the device.
        decode: the decode instances; None: chosen by the device.
        prefill_port: HTTP port of the first prefill instance, unless its group names one.
        decode_port: HTTP port of the first decode instance, unless its group names one.
        router: the router's host, port and limits. The instances' URLs are filled in.
        connector: ``kv_connector_extra_config`` of every instance.
        host: address that the instances' HTTP servers bind to.
        args: ``vllm serve`` arguments of every instance.
        env: environment variables of every instance.
        kv_cache_space_gib: CPU only, KV cache per instance in GiB; None: by the machine.
        start_timeout_s: longest wait for an instance to answer.
        max_restarts: restarts of one instance in a row before the supervisor gives it
            up; a minute of service starts a new row.
        drain_timeout_s: longest time for a prefill instance that is told to stop to keep
            what decode instances have not fetched yet. Leases that are renewed may last
            for up to ``max_lease_s``; what is kept beyond this time is lost.
    """

    model: str | None = None
    served_model_name: str | None = None
    device: str | None = None
    prefill: InstanceGroup | None = None
    decode: InstanceGroup | None = None
    prefill_port: int = DEFAULT_PREFILL_PORT
    decode_port: int = DEFAULT_DECODE_PORT
    router: RouterConfig = RouterConfig()
    connector: ConnectorConfig = ConnectorConfig()
    host: str = "127.0.0.1"
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    kv_cache_space_gib: int | None = None
    start_timeout_s: float = 600.0
    max_restarts: int = 5
    drain_timeout_s: float = 40.0  # longer than a lease that nobody renews

    def __post_init__(self) -> None:
        _check_positive(self, "start_timeout_s", "drain_timeout_s")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must not be negative, not {self.max_restarts}")
        if self.kv_cache_space_gib is not None:
            _check_positive(self, "kv_cache_space_gib")
        if not self.host:
            raise ValueError("host is empty")


def from_mapping(kind: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Check and convert plain data into one of the structs above.

    Args:
        kind: the struct to make.
        values: plain data, e.g. from JSON or YAML.
        source: where the data came from, for the error message.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as exc:
        hint = None
        if "unknown field" in str(exc):
            hint = f"known keys: {', '.join(_struct_at(kind, str(exc)).__struct_fields__)}"
        raise ConfigError(f"{source}: {exc}", hint=hint) from exc


def _struct_at(kind: type[msgspec.Struct], message: str) -> type[msgspec.Struct]:
    """Return the struct that an error message of msgspec speaks of, e.g. "at `$.router`"."""
    if not (found := re.search(r"at `\$\.(\w+)", message)):
        return kind
    hint = typing.get_type_hints(kind).get(found[1])
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, msgspec.Struct):
            return part
    return kind


def load_topology(path: Path) -> Topology:
    """Read a topology file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a wrong value.
    """
    return from_mapping(Topology, load_mapping(path), source=str(path))


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # ValueError: an odd date
        raise ConfigError(f"{path} is not YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level")
    return values
