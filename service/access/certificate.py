"""The certificate that the service shows, which may be replaced while it runs."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

_LOG = logging.getLogger("kvloom.service")


class Certificate:
    """A certificate chain and its key (PEM). Not for several threads at a time.

    Raises
    ------
    ValueError : a file cannot be read, or the key is not that of the certificate.
    """

    def __init__(self, chain: Path, key: Path, password: str | None = None) -> None:
        self._chain, self._key, self._password = chain, key, password
        self._stamps = self._seen()
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        except (OSError, ValueError) as exc:
            missing = [path for path in (chain, key) if not path.is_file()]
            told = f"{missing[0]} is not there" if missing else str(exc)
            raise ValueError(
                f"tls_certificate is {chain} and tls_key is {key}: expected a certificate and its key in PEM; {told}"
            ) from exc

    def renew(self, context: ssl.SSLContext) -> bool:
        """Gives connections to come the files' new content, if they have changed; whether it did.

        Files that do not belong together, because one of them is still to be replaced, change nothing.
        """
        stamps = self._seen()
        if stamps == self._stamps:
            return False
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a context that fails keeps half of what it was given
        except (OSError, ValueError) as exc:
            _LOG.warning("the certificate has changed and cannot be used; the old one stays: %s", exc)
            return False
        self._load(context)
        self._stamps = stamps
        _LOG.info("the certificate has changed; new connections are shown it")
        return True

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self._chain, self._key, (self._password or "").encode)  # never asks on the terminal

    def _seen(self) -> tuple[object, ...]:
        stamps: list[object] = []
        for path in (self._chain, self._key):
            try:
                stat = path.stat()
                stamps += [stat.st_mtime_ns, stat.st_size, stat.st_ino]
            except OSError:
                stamps.append(None)
        return tuple(stamps)
