"""A TCP proxy that a test can freeze, cut and slow down: a partition, and a slow network."""

import socket
import threading
import time
from contextlib import suppress
from typing import Self


class Proxy:
    """Forwards connections to a server on loopback.

    Attributes
    ----------
    is_frozen : nothing is forwarded; connections stay open and are still accepted, as in a partition.
    bytes_per_s : most bytes forwarded to clients a second; None for no limit.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self.is_frozen = False
        self.bytes_per_s: float | None = None
        self._ended = False
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection; new ones are accepted."""
        for each in list(self._open):
            self._close(each)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._close(self._server)
        self.cut()

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._server.accept()
                server = socket.create_connection(self._target, 5.0)
            except OSError:
                if self._ended:
                    return
                client.close()
                continue
            server.settimeout(None)
            self._open |= {client, server}
            for source, target, is_slow in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(source, target, is_slow), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_slow: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                while self.is_frozen and not self._ended:
                    time.sleep(0.01)
                if is_slow and self.bytes_per_s is not None:
                    time.sleep(len(data) / self.bytes_per_s)
                target.sendall(data)
        except OSError:
            pass
        finally:
            self._close(source)
            self._close(target)

    def _close(self, each: socket.socket) -> None:
        self._open.discard(each)
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
