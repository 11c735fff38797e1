"""The cluster key that all instances of a deployment share.

A CURVE key pair for the control channel and a certificate for TLS on data links.
Whoever can read the file may fetch KV cache, so only its owner may.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from vllm_pd.errors import ConfigError

_CLOCK_TOLERANCE = datetime.timedelta(days=1)  # the clocks of some hosts may be behind
_VALIDITY = datetime.timedelta(days=36525)  # a deployment ends with its key, not by a date


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public: str
    secret: str
    certificate: str | None = None
    private_key: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class ClusterKey:
    """What the instances of a deployment know each other by.

    Attributes:
        public: of the CURVE key pair, Z85-encoded.
        secret: of the CURVE key pair, Z85-encoded.
        certificate: for TLS, PEM; None in a file made before there was one.
        private_key: of the certificate, PEM; None where that is None.
    """

    public: bytes
    secret: bytes
    certificate: bytes | None = None
    private_key: bytes | None = None


def write_cluster_key(path: Path) -> None:
    """Make a new cluster key, readable by its owner only.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    public, secret = zmq.curve_keypair()
    data = msgspec.json.encode(_KeyFile(public.decode(), secret.decode(), *_make_certificate()))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data + b"\n")
    except FileExistsError:
        raise ConfigError(
            f"{path} exists", hint="a new key locks out running instances; delete it first"
        ) from None
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def load_cluster_key(path: Path) -> ClusterKey:
    """Read a cluster key.

    Raises:
        ConfigError: it cannot be read, is damaged, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"cannot read the cluster key {path}: {exc.strerror}", hint="make one: vllm-pd keygen"
        ) from exc
    if mode & 0o077:
        raise ConfigError(
            f"the cluster key {path} is open to other users", hint=f"chmod 600 {path}"
        )
    try:
        keys = msgspec.json.decode(data, type=_KeyFile)
        derived = zmq.curve_public(keys.secret.encode())
    except (msgspec.DecodeError, zmq.ZMQError, ValueError) as exc:
        raise ConfigError(f"{path} is not a cluster key: {exc}") from exc
    if derived != keys.public.encode():
        raise ConfigError(f"{path} is not a cluster key: public and secret do not match")
    if (keys.certificate is None) != (keys.private_key is None):
        raise ConfigError(
            f"{path} is not a cluster key: certificate and private_key come together or not at all"
        )
    return ClusterKey(
        derived, keys.secret.encode(), _encoded(keys.certificate), _encoded(keys.private_key)
    )


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def _make_certificate() -> tuple[str, str]:
    """Return a new self-signed certificate and its private key, PEM."""
    # Imported here: only this command needs it, and engine workers load this module.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    private_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vllm-pd cluster")])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    identifier = x509.SubjectKeyIdentifier.from_public_key(private_key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_TOLERANCE)
        .not_valid_after(now + _VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(identifier, critical=False)
        .sign(private_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private_pem = private_key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(pem).decode(), private_pem.decode()
