"""The cluster key file."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from vllm_pd.errors import ConfigError
from vllm_pd.session.keys import load_cluster_key, write_cluster_key


def test_key_is_for_its_owner_only_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    key = load_cluster_key(path)
    assert len(key.public) == len(key.secret) == 40
    assert key.secret.decode() not in repr(key)


def load_certificate(path: Path) -> x509.Certificate:
    certificate = load_cluster_key(path).certificate
    assert certificate is not None
    return x509.load_pem_x509_certificate(certificate)


def test_key_comes_with_a_certificate_that_signs_itself(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    certificate = load_certificate(path)
    certificate.verify_directly_issued_by(certificate)
    assert certificate.subject.rfc4514_string() == "CN=vllm-pd cluster"
    public_key = certificate.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert isinstance(public_key.curve, ec.SECP256R1)


def test_certificate_bears_with_clocks_that_are_off(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    certificate = load_certificate(path)
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=23)
    assert certificate.not_valid_after_utc > now + datetime.timedelta(days=36_500)


def test_certificate_is_for_both_ends_of_a_connection(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    extensions = load_certificate(path).extensions
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    assert set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }


def test_two_keys_have_different_certificates(tmp_path: Path) -> None:
    write_cluster_key(tmp_path / "one")
    write_cluster_key(tmp_path / "two")
    one, two = load_certificate(tmp_path / "one"), load_certificate(tmp_path / "two")
    assert one.public_key() != two.public_key()
    assert one.serial_number != two.serial_number


def test_private_key_is_not_in_the_representation(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    key = load_cluster_key(path)
    assert key.private_key is not None
    assert b"PRIVATE KEY" in key.private_key
    assert "PRIVATE" not in repr(key)
    assert "PRIVATE" not in f"{key!s}"


def test_key_without_a_certificate_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    rewrite(path, without={"certificate", "private_key"})
    key = load_cluster_key(path)
    assert len(key.secret) == 40
    assert key.certificate is None
    assert key.private_key is None


@pytest.mark.parametrize("name", ["certificate", "private_key"])
def test_half_a_certificate_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    rewrite(path, without={name})
    with pytest.raises(ConfigError, match=r"not a cluster key.*come together"):
        load_cluster_key(path)


def rewrite(path: Path, without: set[str]) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in without}))


def test_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        write_cluster_key(path)
    assert path.read_bytes() == before


def test_key_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_cluster_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_cluster_key(path)


@pytest.mark.parametrize("data", [b"", b"{}", b"garbage", b'{"public": "x", "secret": "y"}'])
def test_damaged_key_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not a cluster key"):
        load_cluster_key(path)


def test_missing_key_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vllm-pd keygen"):
        load_cluster_key(tmp_path / "nowhere")


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        write_cluster_key(tmp_path / "nowhere" / "key")
