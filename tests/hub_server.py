"""A Hugging Face Hub on this machine, for tests: model repositories in memory, spoken to by the real `huggingface_hub`.

    with HubServer() as hub:
        subprocess.run([sys.executable, "session.py"], env=hub.env, check=True)
        assert "model_index.json" in hub.files("tester/my-pipeline")

`huggingface_hub` reads its settings when it is imported, so what talks to the server runs in a process of its own, with
`HubServer.env`. Covered: creating and deleting repositories (public and private), commits of regular and of LFS files,
deletions, branches, tags, pull requests, listings by pages, downloads with ranges, and the errors of the real Hub
(`X-Error-Code`).
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
TOKEN = "hf_" + "t" * 34
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.npz")
LFS_LIMIT = 10 * 2**20  # files above this size go to LFS whatever their name is, as on the real Hub


class Request(NamedTuple):
    """One answered request."""

    method: str
    path: str
    status: int


class File(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Id of the git object: of the content, or of the LFS pointer to it."""
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], message: str) -> str:
        content = [self.name, ref, len(self.commits), message, sorted((path, file.oid) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[ref] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag, a pull request or a commit id means."""
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer:
    """A Hub on a free port, served by a thread while the context is open.

    Args:
        lfs: send large-file types through the LFS protocol, as the real Hub does; False takes every file in the commit.
        page_size: entries in one page of a listing.

    Attributes:
        url: address of the server.
        log: every request that was answered, in order.
    """

    def __init__(self, lfs: bool = True, page_size: int = 1000):
        self.lfs, self.page_size = lfs, page_size
        self.log: list[Request] = []
        self._repos: dict[str, Repo] = {}
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._home = tempfile.mkdtemp(prefix="hub-home-")
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def env(self) -> dict[str, str]:
        """Environment for a process whose `huggingface_hub` talks to this server and to nothing else."""
        unwanted = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": self._home,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path and content of the files of a repository.

        Raises:
            KeyError: there is no such repository or revision.
        """
        with self._lock:
            sha = self._repos[repo].resolve(revision)
            if sha is None:
                raise KeyError(revision)
            return {path: file.content for path, file in sorted(self._repos[repo].commits[sha].items())}

    def repos(self) -> dict[str, Repo]:
        """The repositories by name."""
        with self._lock:
            return dict(self._repos)

    # --- what the server does, one method an endpoint ----------------------------------------------------------------
    # Each gets the request and the named parts of its path, and returns (status, body, headers).

    def _repo(self, request: _Handler, name: str, write: bool = False) -> Repo:
        repo = self._repos.get(name)
        user = request.user()
        if repo is None or (repo.private and user is None):
            # The real Hub hides whether a repository exists from those who may not see it.
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise Refusal(401, None, "Unauthorized")
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def whoami(self, request: _Handler) -> Any:
        if request.user() is None:
            raise Refusal(401, None, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return 200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": access}, {}

    def validate_yaml(self, request: _Handler) -> Any:
        content = request.json()["content"]
        block = re.match(r"---\n.*?\n---", content, re.DOTALL)
        warnings = [] if block else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {"errors": [], "warnings": warnings}, {}

    def create_repo(self, request: _Handler) -> Any:
        if request.user() is None:
            raise Refusal(401, None, "Unauthorized")
        wanted = request.json()
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self._repos:
            return 409, {"error": "You already created this model repo", **answer}, {}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self._repos[name] = Repo(name, private)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        repo.commit("main", {".gitattributes": File(attributes.encode(), False)}, "initial commit")
        return 200, answer, {}

    def delete_repo(self, request: _Handler) -> Any:
        wanted = request.json()
        repo = self._repo(request, f"{wanted.get('organization') or USER}/{wanted['name']}", write=True)
        del self._repos[repo.name]
        return 200, b"", {}

    def info(self, request: _Handler, name: str, revision: str = "main") -> Any:
        repo = self._repo(request, name)
        sha, files = self._files(repo, revision)
        with_blobs = "blobs" in request.query
        siblings = [
            {"rfilename": path, **({"size": len(file.content), "blobId": file.oid} if with_blobs else {})}
            for path, file in sorted(files.items())
        ]
        answer = {
            "_id": "0" * 24, "id": name, "modelId": name, "sha": sha, "private": repo.private, "gated": False,
            "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
            "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip
        return 200, answer, {}

    def refs(self, request: _Handler, name: str) -> Any:
        repo = self._repo(request, name)

        def rows(prefix: str, items: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": item, "ref": prefix + item, "targetCommit": sha} for item, sha in items.items()]

        branches = {item: sha for item, sha in repo.refs.items() if not item.startswith("refs/pr/")}
        answer: dict[str, Any] = {
            "branches": rows("refs/heads/", branches),
            "converts": [],
            "tags": rows("refs/tags/", repo.tags),
        }
        if "include_prs" in request.query:
            requests = {item: sha for item, sha in repo.refs.items() if item.startswith("refs/pr/")}
            answer["pullRequests"] = rows("", requests)
        return 200, answer, {}

    def create_branch(self, request: _Handler, name: str, branch: str) -> Any:
        repo = self._repo(request, name, write=True)
        if branch in repo.refs:
            raise Refusal(409, None, "Reference already exists")
        repo.refs[branch] = self._files(repo, request.json().get("startingPoint") or "main")[0]
        return 201, b"OK", {}

    def delete_branch(self, request: _Handler, name: str, branch: str) -> Any:
        repo = self._repo(request, name, write=True)
        if branch == "main" or branch not in repo.refs:
            raise Refusal(403 if branch == "main" else 404, None, f"Cannot delete branch {branch}")
        del repo.refs[branch]
        return 200, b"OK", {}

    def create_tag(self, request: _Handler, name: str, revision: str) -> Any:
        repo = self._repo(request, name, write=True)
        tag = request.json()["tag"]
        if tag in repo.tags:
            raise Refusal(409, None, "Tag reference exists already")
        repo.tags[tag] = self._files(repo, revision)[0]
        return 201, b"OK", {}

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        return entry

    def _entries(self, files: dict[str, File], under: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{under}/" if under else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": hashlib.sha1(folder.encode()).hexdigest(),
                }
            if recursive or len(parts) == 1:
                entries[path] = self._entry(path, file)
        return list(entries.values())

    def tree(self, request: _Handler, name: str, revision: str, under: str = "") -> Any:
        repo = self._repo(request, name)
        _, files = self._files(repo, revision)
        entries = self._entries(files, under, request.query.get("recursive", ["false"])[0].lower() == "true")
        if under and not entries:
            raise Refusal(404, "EntryNotFound", f"{under} does not exist on {revision!r}")
        start = int(request.query.get("cursor", ["0"])[0])
        end = start + self.page_size
        headers = {}
        if end < len(entries):
            address = f"{self.url}{urlsplit(request.path).path}"
            query = "&".join(f"{key}={values[0]}" for key, values in request.query.items() if key != "cursor")
            headers["Link"] = f'<{address}?{query}&cursor={end}>; rel="next"'
        return 200, entries[start:end], headers

    def paths_info(self, request: _Handler, name: str, revision: str) -> Any:
        repo = self._repo(request, name)
        _, files = self._files(repo, revision)
        entries = {entry["path"]: entry for entry in self._entries(files, "", recursive=True)}
        wanted = parse_qs(request.body().decode()).get("paths", [])
        return 200, [entries[path] for path in wanted if path in entries], {}

    def preupload(self, request: _Handler, name: str, revision: str) -> Any:
        repo = self._repo(request, name, write=True)
        sha, files = self._files(repo, revision)
        answer = []
        for wanted in request.json()["files"]:
            path = wanted["path"]
            large = wanted["size"] > LFS_LIMIT or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            oid = files[path].etag if path in files else None
            mode = "lfs" if self.lfs and large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answer, "commitOid": sha}, {}

    def lfs_batch(self, request: _Handler, name: str) -> Any:
        self._repo(request, name, write=True)
        objects = []
        for wanted in request.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self._blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.url}/_lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/_lfs/{wanted['oid']}/verify"},
                }
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def lfs_put(self, request: _Handler, oid: str) -> Any:
        content = request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(422, None, "The content does not have this sha256")
        self._blobs[oid] = content
        return 200, b"", {}

    def lfs_verify(self, request: _Handler, oid: str) -> Any:
        if len(self._blobs.get(oid, b"")) != request.json()["size"]:
            raise Refusal(404, None, "The object is not there or has another size")
        return 200, {}, {}

    def lfs_get(self, request: _Handler, oid: str) -> Any:
        return self._content(request, self._blobs[oid], {"ETag": f'"{oid}"'})

    def commit(self, request: _Handler, name: str, revision: str) -> Any:
        repo = self._repo(request, name, write=True)
        parent, files = self._files(repo, revision)
        files, header = dict(files), {}
        for line in request.body().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self._blobs:
                    raise Refusal(400, None, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = File(self._blobs[value["oid"]], True)
            elif key == "deletedFile":
                if value["path"] not in files:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {
                    path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")
                }
            else:
                raise Refusal(400, None, f"Unknown operation {key}")
        if header.get("parentCommit") not in (None, parent):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        ref = revision
        if "create_pr" in request.query:
            ref = f"refs/pr/{1 + sum(item.startswith('refs/pr/') for item in repo.refs)}"
        sha = repo.commit(ref, files, header.get("summary", ""))
        address = f"{self.url}/{name}/discussions/{ref.rpartition('/')[2]}" if ref != revision else None
        answer = {
            "success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}", "hookOutput": "",
            "pullRequestUrl": address,
        }  # fmt: skip
        return 200, answer, {}

    def resolve(self, request: _Handler, name: str, revision: str, path: str) -> Any:
        repo = self._repo(request, name)
        sha, files = self._files(repo, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            return (
                404,
                b"Entry not found",
                {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
            )
        file = files[path]
        if file.lfs:  # large files come from a store of their own, on another host
            headers |= {
                "X-Linked-ETag": f'"{file.etag}"',
                "X-Linked-Size": str(len(file.content)),
                "ETag": f'"{file.oid}"',
            }
            return 302, b"", {**headers, "Location": f"{self.url.replace('127.0.0.1', 'localhost')}/_lfs/{file.etag}"}
        return self._content(request, file.content, {**headers, "ETag": f'"{file.etag}"'})

    def _content(self, request: _Handler, content: bytes, headers: dict[str, str]) -> Any:
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted is None:
            return 200, content, headers
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return 416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"}
        return 206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", HubServer.whoami),
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml),
    ("POST", r"/api/repos/create", HubServer.create_repo),
    ("DELETE", r"/api/repos/delete", HubServer.delete_repo),
    ("GET", rf"/api/models/{_NAME}/refs", HubServer.refs),
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", HubServer.info),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", HubServer.tree),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)/(?P<under>.+)", HubServer.tree),
    ("GET", rf"/api/models/{_NAME}", HubServer.info),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", HubServer.create_branch),
    ("DELETE", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", HubServer.delete_branch),
    ("POST", rf"/api/models/{_NAME}/tag/(?P<revision>[^/]+)", HubServer.create_tag),
    ("POST", rf"/api/models/{_NAME}/paths-info/(?P<revision>[^/]+)", HubServer.paths_info),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", HubServer.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", HubServer.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_put),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", HubServer.lfs_verify),
    ("GET", r"/_lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_get),
    ("GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubServer.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `HubServer.log` keeps the requests

    def body(self) -> bytes:
        return self._body

    def json(self) -> Any:
        return json.loads(self._body or b"{}")

    def user(self) -> str | None:
        """Who asks; None without a token.

        Raises:
            Refusal: the token is wrong.
        """
        header = self.headers.get("Authorization")
        if header is None:
            return None
        if header != f"Bearer {TOKEN}":
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return USER

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self) -> tuple[int, Any, dict[str, str]]:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, endpoint in _ROUTES:
            match = re.fullmatch(pattern, path) if wanted == method else None
            if match is not None:
                parts = {key: unquote(value) for key, value in match.groupdict().items()}
                with self.hub._lock:
                    return endpoint(self.hub, self, **parts)
        raise Refusal(404, None, f"no endpoint {method} {path}")

    def _handle(self) -> None:
        self._body = self._read()
        try:
            status, body, headers = self._answer()
        except Refusal as refusal:
            status, body, headers = refusal.status, {"error": refusal.message}, {"X-Error-Message": refusal.message}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.hub.log.append(Request(self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle
