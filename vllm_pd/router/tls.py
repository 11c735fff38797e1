"""TLS towards clients and towards instances: contexts, and what is wrong with a file.

The router's own certificate is read again when its files change, so that it can be
renewed without a restart: connections that are open keep the old one, new ones get the
new one. A pair of files that does not work is logged, and the certificate of before
stays in use.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import logging
import ssl
from pathlib import Path

from cryptography import x509

from vllm_pd.config import RouterConfig
from vllm_pd.errors import ConfigError
from vllm_pd.router.files import read_secret, stamp_of

logger = logging.getLogger(__name__)

RELOAD_INTERVAL_S = 1.0
"""Pause between two looks at the certificate."""


class ServerTls:
    """The router's certificate.

    Attributes:
        context: what to serve with; it stays the same object.
    """

    def __init__(self, certfile: Path, keyfile: Path) -> None:
        """Read the files.

        Raises:
            ConfigError: one cannot be read, or they do not belong together.
        """
        self._certfile = certfile
        self._keyfile = keyfile
        self._stamps = self._look()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load()

    def reload_if_changed(self) -> None:
        """Read the files again if they are not those of before."""
        stamps = self._look()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            self._load()
        except ConfigError as exc:
            logger.error("the TLS certificate stays as it was: %s", exc)  # noqa: TRY400 - one line
        else:
            logger.info("read the TLS certificate %s again", self._certfile)

    async def watch(self) -> None:
        """Follow changes of the files until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_INTERVAL_S)
            self.reload_if_changed()

    def _look(self) -> tuple[object, object]:
        return stamp_of(self._certfile), stamp_of(self._keyfile)

    def _load(self) -> None:
        certificate = _read_certificate("ssl_certfile", self._certfile)
        read_secret(self._keyfile)  # says so if it cannot be read, or others can
        # On a context of its own first: one that failed halfway would serve nobody.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            _load_pair(context, self._certfile, self._keyfile)
        _warn_of_dates(certificate, self._certfile)


def server_tls(config: RouterConfig) -> ServerTls | None:
    """Return what to serve clients with; None: plain HTTP.

    Raises:
        ConfigError: a file cannot be used.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return None
    tls = ServerTls(Path(config.ssl_certfile), Path(config.ssl_keyfile))
    if config.ssl_ca_certs is not None:
        _trust("ssl_ca_certs", Path(config.ssl_ca_certs), tls.context)
        tls.context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    return tls


def client_tls(config: RouterConfig) -> ssl.SSLContext:
    """Return what to connect to ``https://`` instances with.

    Raises:
        ConfigError: the file with the authorities cannot be used.
    """
    if config.upstream_ca_file is None:
        return _system_tls()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _trust("upstream_ca_file", Path(config.upstream_ca_file), context)  # and no others
    return context


def trouble_of(exc: BaseException) -> str | None:
    """Return what is wrong between the two ends of a TLS handshake, in words; None: nothing.

    Args:
        exc: what connecting to an instance raised.
    """
    # aiohttp wraps both, in classes that look like them but have nothing in them.
    cause = getattr(exc, "certificate_error", None) or getattr(exc, "os_error", exc)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its TLS certificate is refused: {cause.verify_message} (see upstream_ca_file)"
    if isinstance(cause, ssl.SSLError):
        reason = (cause.reason or str(cause)).lower().replace("_", " ")
        return f"no TLS connection: {reason}"
    return None


@functools.cache
def _system_tls() -> ssl.SSLContext:
    """Return what trusts whom the system trusts; reading all of these takes 30 ms."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load_pair(context: ssl.SSLContext, certfile: Path, keyfile: Path) -> None:
    try:
        # Without a pass phrase OpenSSL would ask at the terminal for one.
        context.load_cert_chain(certfile, keyfile, password="")
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"ssl_keyfile {keyfile} is not the key of the certificate in {certfile}"
            ) from exc
        raise ConfigError(
            f"ssl_keyfile {keyfile} cannot be used: {exc.reason or exc}",
            hint="it has to be a PEM file without pass phrase",
        ) from exc
    except OSError as exc:  # it was there a moment ago
        raise ConfigError(f"cannot read {certfile} or {keyfile}: {exc.strerror}") from exc


def _read_certificate(option: str, path: Path) -> x509.Certificate:
    """Return the first certificate of a file.

    Raises:
        ConfigError: there is none.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except OSError as exc:
        raise ConfigError(f"cannot read {option} {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError(f"{option} {path} holds no certificate in PEM") from exc


def _trust(option: str, path: Path, context: ssl.SSLContext) -> None:
    _warn_of_dates(_read_certificate(option, path), path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as exc:
        raise ConfigError(f"{option} {path} cannot be used: {exc.reason or exc}") from exc


def _warn_of_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        logger.warning(
            "the certificate in %s has expired on %s", path, certificate.not_valid_after_utc
        )
    elif now < certificate.not_valid_before_utc:
        logger.warning(
            "the certificate in %s is not valid before %s", path, certificate.not_valid_before_utc
        )
