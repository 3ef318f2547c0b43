"""A Hub on this machine: the few calls of its HTTP interface that publishing and fetching need.

The real client talks to it, so that the code is the same as with the real Hub. Large files come by Git
LFS, small ones inside the commit; a commit is whole and never changes.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".pt", ".png")
TOKEN = "hf_of_the_tests"


class LocalHub(BaseHTTPRequestHandler):
    """repos: name -> commits, the newest last, each a dictionary of path -> bytes.

    asked: every request, in order. refuse_card: what validation says of a card, if anything.
    """

    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, list[tuple[str, dict[str, bytes]]]]]
    private: ClassVar[set[str]]
    uploaded: ClassVar[dict[str, bytes]]
    asked: ClassVar[list[str]]
    refuse_card: ClassVar[str | None]

    @classmethod
    def reset(cls) -> None:
        cls.repos, cls.private, cls.uploaded, cls.asked, cls.refuse_card = {}, set(), {}, [], None

    @classmethod
    def commit(cls, repo: str, files: dict[str, bytes]) -> str:
        """A commit with exactly these files, as somebody else would make it."""
        commits = cls.repos.setdefault(repo, [])
        listed = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([len(commits), repo, listed]).encode()).hexdigest()
        commits.append((oid, dict(files)))
        return oid

    def do_HEAD(self) -> None:
        self._resolve(head=True)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        if found is None:
            return self._resolve(head=False)
        files = self._at(found[1], unquote(found[2] or "main"))
        if files is None:
            return None
        siblings = [{"rfilename": path} for path in files[1]]
        return self._json({"id": found[1], "sha": files[0], "siblings": siblings})

    def do_PUT(self) -> None:
        data = self._body()
        self.uploaded[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        if path == "/api/validate-yaml":
            errors = [{"message": self.refuse_card}] if self.refuse_card else []
            return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", path)
        if found is not None:
            return self._paths_info(found[1], unquote(found[2]), parse_qs(body.decode())["paths"])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if found is not None:
            return (self._preupload if found[2] == "preupload" else self._commit)(found[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs_batch(json.loads(body))
        return self._refuse(404, "RepoNotFound")

    # --- writing ---

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "forbidden":
            return self._refuse(403, "")
        status = 409 if repo in self.repos else 200
        if repo not in self.repos:
            self.commit(repo, {".gitattributes": b""})
            if asked.get("visibility") == "private":
                self.private.add(repo)
        return self._json({"url": f"{self._address()}/{repo}"}, status)

    def _preupload(self, repo: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self._address()}/lfs/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        files = dict(self.repos[repo][-1][1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.uploaded[value["oid"]]
            elif item["key"] == "deletedFolder":
                files = {p: d for p, d in files.items() if not p.startswith(value["path"])}
        oid = self.commit(repo, files)
        self._json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self._address()}/{repo}/commit/{oid}",
            }
        )

    # --- reading ---

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision; None after a refusal was sent."""
        commits = self.repos.get(repo)
        if commits is None:
            self._refuse(404, "RepoNotFound")
            return None
        found = commits[-1:] if revision == "main" else [c for c in commits if c[0] == revision]
        if not found:
            self._refuse(404, "RevisionNotFound")
            return None
        return found[0]

    def _paths_info(self, repo: str, revision: str, paths: list[str]) -> None:
        found = self._at(repo, revision)
        if found is not None:
            there = [path for path in paths if path in found[1]]
            self._json(
                [
                    {"type": "file", "path": path, "size": len(found[1][path]), "oid": "0" * 40}
                    for path in there
                ]
            )

    def _resolve(self, *, head: bool) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", urlsplit(self.path).path)
        if found is None:
            return self._refuse(404, "RepoNotFound")
        at = self._at(found[1], unquote(found[2]))
        if at is None:
            return None
        oid, files = at
        data = files.get(unquote(found[3]))
        if data is None:
            return self._refuse(404, "EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", oid)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)
        return None

    # --- plumbing ---

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        self.asked.append(f"{self.command} {self.path}")


@contextmanager
def serving() -> Iterator[str]:
    """Run the Hub; its address."""
    LocalHub.reset()
    server = ThreadingHTTPServer(("127.0.0.1", 0), LocalHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
