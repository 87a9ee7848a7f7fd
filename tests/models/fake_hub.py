"""A model hub on this machine: enough of the hub's HTTP interface to fetch a model from."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `models` (id -> file name -> bytes) and remembers which files were fetched."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.models.get(name)
        if name in self.gated:
            self.send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif api and rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
                for file, data in files.items()
            ]
            self.send(request, 200, json.dumps(tree).encode(), {})
        elif api:
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": []}
            self.send(request, 200, json.dumps(info).encode(), {})
        else:  # /<name>/resolve/<commit>/<file>
            file = "/".join(rest[2:])
            if body:
                self.fetched.append(file)
            headers = {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": COMMIT}
            self.send(request, 200, files[file], headers, body)

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str],
        body: bool = True,
    ) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
