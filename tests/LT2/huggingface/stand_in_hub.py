"""A local server with the few endpoints of the Hub that an upload uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandInHub:
    def __init__(self) -> None:
        self.private: dict[str, bool] = {}  # repositories
        self.objects: dict[str, bytes] = {}  # uploaded large files by sha256
        self.files: dict[str, bytes] = {}  # of the last commit
        self.tokens: set[str] = set()
        self.messages: list[str] = []
        self.fail: dict[str, tuple[int, str]] = {}  # part of a path -> status and message
        self.cut_uploads = 0  # uploads whose connection ends early

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        for part, (status, message) in self.fail.items():
            if part in path:
                return status, {"error": message}
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            if repo in self.private:
                return 409, {"error": "You already created it", "url": f"{self.url}/{repo}"}
            self.private[repo] = given.get("visibility") == "private" or bool(given.get("private"))
            return 200, {"url": f"{self.url}/{repo}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.endswith("/preupload/main"):
            return 200, {"files": [self._mode(file) for file in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._upload(o) for o in json.loads(body)["objects"]],
            }
        if method == "PUT":
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return 200, {}
        repo = "/".join(path.split("/")[3:5])  # of /api/models/USER/NAME/...
        if path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            return 200, {
                "commitUrl": f"{self.url}/{repo}/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        if path.startswith("/api/models/") and repo in self.private:
            return 200, {"id": repo, "private": self.private[repo], "sha": "0" * 40}
        return 404, {"error": "not found"}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            else:
                self.files[value["path"]] = base64.b64decode(value["content"])

    url = ""


@contextmanager
def run_stand_in_hub() -> Iterator[StandInHub]:
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            length = int(self.headers.get("Content-Length") or 0)
            if self.command == "PUT" and hub.cut_uploads:
                hub.cut_uploads -= 1
                self.rfile.read(length // 2)
                self.connection.close()
                return
            body = (
                self._read_chunks()
                if "Transfer-Encoding" in self.headers
                else self.rfile.read(length)
            )
            status, content = hub.answer(self.command, self.path.partition("?")[0], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _read_chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = handle_any

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
