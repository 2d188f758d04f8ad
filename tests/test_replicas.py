"""Two processes behind a proxy that keeps a visitor with one of them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading

import httpx
import pytest
import warm
from talkers import talker


class Sticky:
    """A proxy that gives each connecting address and name (the ``X-Visitor`` header) a backend, and stays with it."""

    def __init__(self, backends: list[str]) -> None:
        self.backends, self.of, self.next = backends, dict[str, str](), itertools.cycle(backends)
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        head = client.recv(65536)
        lines = head.decode("latin-1").split("\r\n")
        visitor = next((line[10:].strip() for line in lines if line.lower().startswith("x-visitor:")), "nobody")
        backend = self.of.setdefault(visitor, next(self.next))
        port = int(backend.rpartition(":")[2])
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as server:
            server.sendall(head)
            threading.Thread(target=self._pipe, args=(client, server), daemon=True).start()
            self._pipe(server, client)

    @staticmethod
    def _pipe(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_visitors_stay_with_their_replica(tmp_path):
    """Six visitors over two replicas: all are answered alike, and each replica answers its own alone."""
    gradio_client = pytest.importorskip("gradio_client")
    folder = talker(tmp_path / "model", chat=True, context=512)
    flags = ("--model", str(folder), "--converted", str(tmp_path / "c"))
    with warm.app(*flags) as one, warm.app(*flags) as other:
        proxy = Sticky([one.rstrip("/"), other.rstrip("/")])
        found = []
        for visitor in range(6):
            client = gradio_client.Client(proxy.url, verbose=False, headers={"X-Visitor": f"v{visitor}"})
            answers = [client.predict("Hello", 0.5, "model", 8, api_name="/generate")["text"] for _ in range(3)]
            found += answers
        assert len(set(found)) == 1
        counts = []
        for backend in (one, other):
            text = httpx.get(f"{backend.rstrip('/')}/metrics").text
            line = next(line for line in text.splitlines() if line.startswith('mod_requests_total{kind="generate"'))
            counts.append(float(line.rpartition(" ")[2]))
        assert counts == [9.0, 9.0]
