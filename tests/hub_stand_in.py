"""A local stand-in for the Hub: serves one repository from a folder, as badly as a test asks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@functools.cache
def _named(path: Path) -> str:
    """The hash of a file that stays as it is."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class StandIn:
    """Serves ``folder`` as ``who/model`` on loopback; ``mode`` says how.

    Attributes:
        mode: "well"; "error" (500); "nonsense" (HTML with status 200); "hang" (no answer); "trickle" (a byte at times);
            "gone" (404); "cut" (weights break off in the middle); "slow" (weights come in small pieces); "portal" (GET
            answers HTML, as a hotel's network does); "wrong" (weights of the right length, damaged, the first time).
        seen: method, path and range of every request.
    """

    def __init__(self, folder: Path, name: str = "who/model") -> None:
        self.folder, self.name, self.mode = folder, name, "well"
        self.seen: list[tuple[str, str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                if self.path.startswith("/_mode/"):
                    hub.mode = self.path.removeprefix("/_mode/")
                    return self.give(200, b"ok", {})
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub.seen.append((self.command, self.path, self.headers.get("Range", "")))
                if hub.mode == "hang":
                    time.sleep(30)
                if hub.mode == "error":
                    return self.give(500, b"broken", {}, body)
                if hub.mode == "nonsense" or (hub.mode == "portal" and body and ".safetensors" in self.path):
                    return self.give(200, b"<html>Welcome to the hotel's network</html>", {}, body)
                if hub.mode == "trickle":
                    self.start(200, 10_000, {"Content-Type": "application/json"})
                    with contextlib.suppress(OSError):
                        for _ in range(200):
                            self.wfile.write(b" ")
                            self.wfile.flush()
                            time.sleep(0.2)
                    return None
                if self.path.startswith(f"/api/models/{hub.name}") and hub.mode != "gone":
                    return self.give(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"}, body)
                found = hub.folder / self.path.rpartition("/")[2]
                if hub.mode == "gone" or f"/{hub.name}/resolve/" not in self.path or not found.is_file():
                    return self.give(404, b"", {"X-Error-Code": "RepoNotFound", "X-Repo-Commit": COMMIT}, body)
                self.file(found, body)

            def file(self, path: Path, body: bool) -> None:
                data, start = path.read_bytes(), 0
                headers = {
                    "ETag": f'"{_named(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
                }
                if (asked := self.headers.get("Range", "")).startswith("bytes="):
                    start = int(asked[6:].split("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                part = data[start:]
                weights = path.suffix == ".safetensors"
                if body and weights and hub.mode == "wrong":
                    part, hub.mode = part[::-1], "well"
                if body and weights and hub.mode == "cut" and not start and data:
                    self.start(200, len(part), headers)
                    self.wfile.write(part[: len(part) // 2])
                    self.wfile.flush()
                    hub.mode = "well"
                    self.close_connection = True
                    return self.connection.close()
                if body and weights and hub.mode == "slow":
                    self.start(206 if start else 200, len(part), headers)
                    for at in range(0, len(part), max(1, len(part) // 40)):
                        try:
                            self.wfile.write(part[at : at + max(1, len(part) // 40)])
                            self.wfile.flush()
                        except OSError:
                            return None
                        time.sleep(0.05)
                    return None
                self.give(206 if start else 200, part, headers, body)

            def start(self, code: int, length: int, headers: dict[str, str]) -> None:
                self.send_response(code)
                for name, value in {"Content-Length": str(length), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def give(self, code: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
                self.start(code, len(data), headers)
                if body:
                    self.wfile.write(data)

        return Handler

    def info(self) -> dict[str, object]:
        """What the Hub tells of a repository."""
        files = [
            {"rfilename": path.name, "size": path.stat().st_size} for path in sorted(self.folder.iterdir())
            if path.is_file()
        ]
        return {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": files, "private": False, "tags": []}
