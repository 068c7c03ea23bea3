"""A small Hugging Face hub on this machine, with the faults a real one shows."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".gguf", ".safetensors", ".model")  # kept as git-lfs does, with a SHA-256


@dataclass
class Hub:
    """What the server holds and how it errs; tests change it between requests."""

    repos: dict[str, Mapping[str, bytes]]
    url: str = ""
    cut_after: int = 0  # bytes of the next download, after which the connection is closed
    status: int = 0  # answered to everything
    gated: bool = False
    wrong: dict[str, bytes] = field(default_factory=dict)  # sent instead of what is listed
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET"
                and "/resolve/" in path]  # fmt: skip


@contextmanager
def serving(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(dict(repos))

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: object) -> None:
        """Nothing on the terminal."""

    def _answer(self, *, body: bool) -> None:
        hub = self.served
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        resolve = re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:main|{REVISION})/(.+)", path)
        found = listing or resolve
        repo = found[1] if found else ""
        if hub.status:
            self._send(hub.status, b"{}", {}, body=body)
        elif repo not in hub.repos:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
        elif hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        elif listing:
            self._send(200, self._listing(repo), {}, body=body)
        else:
            assert resolve is not None
            self._send_file(resolve[2], hub.repos[repo], body=body)

    def _listing(self, repo: str) -> bytes:
        siblings = []
        for name, data in self.served.repos[repo].items():
            entry = {"rfilename": name, "size": len(data), "blobId": _git_sha1(data)}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return json.dumps({"id": repo, "sha": REVISION, "siblings": siblings}).encode()

    def _send_file(self, name: str, files: Mapping[str, bytes], *, body: bool) -> None:
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        listed = files[name]
        data = self.served.wrong.get(name, listed)
        digest = hashlib.sha256(listed).hexdigest() if name.endswith(LARGE) else _git_sha1(listed)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and body:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], headers, body=True)
        else:
            self._send(200, data, headers, body=body)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        cut = self.served.cut_after
        if cut and "ETag" in headers:
            self.served.cut_after = 0
            self.wfile.write(data[:cut])
            self.close_connection = True
        else:
            self.wfile.write(data)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
