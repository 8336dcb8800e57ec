"""A model hub on loopback: the few calls of `huggingface_hub` that create, fill and download a repository."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FakeHub(BaseHTTPRequestHandler):
    """Repositories live in `repositories`: id to file name to content; every call is noted in `calls`."""

    repositories: dict[str, dict[str, bytes]]
    calls: list[tuple[str, str]]

    def do_POST(self):
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            if repo_id in self.repositories:
                return self._answer(409, {"error": "exists", "url": self._url(repo_id)})
            self.repositories[repo_id] = {}
            return self._answer(200, {"url": self._url(repo_id)})
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            errors = [] if card.startswith("---\nlicense: ") else [{"message": "no licence"}]
            return self._answer(200 if not errors else 400, {"errors": errors, "warnings": []})
        repo_id, action = "/".join(path.split("/")[3:5]), path.split("/")[5] if path.count("/") > 4 else ""
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._answer(200, {"files": modes})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[repo_id][line["value"]["path"]] = content
            commit = self._commit(repo_id)
            url = f"{self._url(repo_id)}/commit/{commit}"
            return self._answer(200, {"commitOid": commit, "commitUrl": url, "success": True})
        return self._answer(404, {"error": f"no such call: {path}"})

    def do_GET(self):
        path = self._note()
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.repositories:
            repo_id = "/".join(parts[2:4])
            if parts[4:5] == ["tree"]:
                tree = self.repositories[repo_id].items()
                return self._answer(
                    200, [{"type": "file", "path": n, "size": len(c), "oid": _blob_id(c)} for n, c in tree]
                )
            siblings = [{"rfilename": name} for name in self.repositories[repo_id]]
            return self._answer(200, {"id": repo_id, "sha": self._commit(repo_id), "siblings": siblings})
        repo_id = "/".join(parts[:2])
        if parts[2:3] == ["resolve"] and "/".join(parts[4:]) in self.repositories.get(repo_id, {}):
            content = self.repositories[repo_id]["/".join(parts[4:])]
            headers = {"ETag": f'"{_blob_id(content)}"', "X-Repo-Commit": self._commit(repo_id)}
            return self._answer(200, content, headers)
        return self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _note(self) -> str:
        path = urlsplit(self.path).path
        self.calls.append((self.command, path))
        return path

    def _url(self, repo_id: str) -> str:
        return f"http://{self.headers['Host']}/{repo_id}"

    def _commit(self, repo_id: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.repositories[repo_id].items()))
        return hashlib.sha1(content).hexdigest()

    def _answer(self, status: int, content, headers=None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def fake_hub():
    """Serves an empty hub on a free loopback port; yields its address and its handler class."""
    handler = type("Handler", (FakeHub,), {"repositories": {}, "calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
