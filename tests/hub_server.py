"""The part of the Hugging Face Hub's HTTP interface that a push and a pull use, on this machine:
hub_server.py PORT. Data set repositories, of which someone/acts is there; files in memory, large ones
through LFS. Repositories of `forbidden` cannot be made.

The requests are those that huggingface_hub's own client makes. Requests without the token of the
tests are refused, as for a private repository.
"""

import base64
import hashlib
import json
import sys
from typing import Any

from aiohttp import web

TOKEN = "hf_token_of_tests"
REPO = "someone/acts"
_LFS_FROM_BYTES = 1000

Reply = web.StreamResponse


class Repository:
    """files: content by path; objects: LFS objects by SHA-256; commits: how many there were."""

    def __init__(self, name: str, url: str, *, private: bool) -> None:
        self.name, self._url, self.private = name, url, private
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.commits = 0

    @property
    def head(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()

    def _entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        entry = {"type": "file", "path": path, "size": len(data)}
        entry["oid"] = hashlib.sha1(data).hexdigest()
        if len(data) >= _LFS_FROM_BYTES:
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        return entry

    def _entries(self, below: str) -> list[dict[str, Any]]:
        """Files and folders below a folder, all of them."""
        found = [self._entry(path) for path in sorted(self.files) if path.startswith(below)]
        folders = {
            "/".join(path.split("/")[:depth])
            for path in self.files
            if path.startswith(below)
            for depth in range(1, path.count("/") + 1)
        }
        return found + [
            {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
            for folder in sorted(folders)
            if folder.startswith(below)
        ]

    # --- requests ---

    async def about(self, request: web.Request) -> Reply:
        about = {"id": self.name, "sha": self.head, "private": self.private, "tags": []}
        return web.json_response(about)

    async def tree(self, request: web.Request) -> Reply:
        path = request.match_info.get("path", "")
        below = f"{path}/" if path else ""
        entries = self._entries(below)
        if path and not entries:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        if request.query.get("recursive", "").lower() not in ("true", "1"):
            depth = below.count("/")
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        return web.json_response(entries)

    async def paths_info(self, request: web.Request) -> Reply:
        try:
            paths = (await request.json())["paths"]
        except ValueError:
            paths = (await request.post()).getall("paths")
        found = [self._entry(path) for path in paths if path in self.files]
        found += [
            {"type": "directory", "path": path, "oid": "0" * 40}
            for path in paths
            if any(name.startswith(f"{path}/") for name in self.files)
        ]
        return web.json_response(found)

    async def preupload(self, request: web.Request) -> Reply:
        files = (await request.json())["files"]
        return web.json_response(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["size"] >= _LFS_FROM_BYTES else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
            }
        )

    async def batch(self, request: web.Request) -> Reply:
        objects = []
        for each in (await request.json())["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.objects:
                href = f"{self._url}/lfs/{self.name}/{each['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        return web.json_response({"transfer": "basic", "objects": objects})

    async def put_object(self, request: web.Request) -> Reply:
        data, oid = await request.read(), request.match_info["oid"]
        if hashlib.sha256(data).hexdigest() != oid:
            return web.Response(status=400)
        self.objects[oid] = data
        return web.Response()

    async def commit(self, request: web.Request) -> Reply:
        for line in (await request.read()).splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
        self.commits += 1
        url = f"{self._url}/datasets/{self.name}/commit/{self.head}"
        return web.json_response({"commitUrl": url, "commitOid": self.head, "success": True})

    async def resolve(self, request: web.Request) -> Reply:
        data = self.files.get(request.match_info["path"])
        if data is None:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        asked = request.http_range
        part = data[asked]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.head}
        if asked.start is None and asked.stop is None:
            return web.Response(body=data, headers=headers)
        first = asked.start or 0
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        return web.Response(status=206, body=part, headers=headers)


class Hub:
    """repositories: those that are there, by name."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.repositories = {REPO: Repository(REPO, url, private=True)}

    async def create(self, request: web.Request) -> Reply:
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "forbidden" or asked["type"] != "dataset":
            return web.Response(status=403)
        url = {"url": f"{self._url}/datasets/{name}"}
        if name in self.repositories:
            return web.json_response(url, status=409)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.repositories[name] = Repository(name, self._url, private=private)
        return web.json_response(url)

    async def validate_yaml(self, request: web.Request) -> Reply:
        return web.json_response({"errors": [], "warnings": []})

    def of(self, method: str) -> Any:
        """The handler of requests to a repository, by the name of its method."""

        async def handler(request: web.Request) -> Reply:
            name = f"{request.match_info['owner']}/{request.match_info['repo']}"
            found = self.repositories.get(name.removesuffix(".git"))
            if found is None:
                return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
            answer: Reply = await getattr(found, method)(request)
            return answer

        return handler


@web.middleware
async def only_with_token(request: web.Request, handler: Any) -> Reply:
    is_upload = request.path.startswith("/lfs/")
    if not is_upload and request.headers.get("Authorization") != f"Bearer {TOKEN}":
        return web.Response(status=401, headers={"X-Error-Code": "RepoNotFound"})
    answer: Reply = await handler(request)
    return answer


def main() -> None:
    port = int(sys.argv[1])
    hub = Hub(f"http://127.0.0.1:{port}")
    app = web.Application(middlewares=[only_with_token], client_max_size=1 << 30)
    api, name = "/api/datasets/{owner}/{repo}", "{owner}/{repo}"
    app.router.add_post("/api/repos/create", hub.create)
    app.router.add_post("/api/validate-yaml", hub.validate_yaml)
    for path, method in (
        (api, "about"),
        (api + "/revision/{revision}", "about"),
        (api + "/tree/{revision}", "tree"),
        (api + "/tree/{revision}/{path:.*}", "tree"),
        (f"/datasets/{name}/resolve/{{revision}}/{{path:.*}}", "resolve"),
    ):
        app.router.add_get(path, hub.of(method))
    for path, method in (
        (api + "/paths-info/{revision}", "paths_info"),
        (api + "/preupload/{revision}", "preupload"),
        (api + "/commit/{revision}", "commit"),
        (f"/datasets/{name}/info/lfs/objects/batch", "batch"),
    ):
        app.router.add_post(path, hub.of(method))
    app.router.add_put(f"/lfs/{name}/{{oid}}", hub.of("put_object"))
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main()
