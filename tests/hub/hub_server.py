"""A small Hub for tests: the documented endpoints of huggingface.co, over a real socket.

It is no copy of the real one: it knows commits, branches, tags, pull requests, large files, gated
and private repositories, and it fails where a test tells it to. It counts what it serves. Source of
the endpoints: https://huggingface.co/docs/hub/api, and the requests that `huggingface_hub` makes.
"""

# ruff: noqa: ARG002 - every endpoint is called alike

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_TestTokenThatMustNeverBePrinted0000"
OWNER = "me"
ID_TOKEN = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJqb2IifQ.c2lnbmF0dXJlLXRoYXQtaXMtbm9uZQ"
EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny-llama"
LORA, RSLORA, MODEL = (EXAMPLES / name for name in ("lora", "rslora", "model"))
_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".png")


def git_oid(content: bytes) -> str:
    """Return the name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_oid(content: bytes) -> str:
    """Return the name that Git LFS gives to a file's content."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """A repository: its commits by name, and what its branches point at."""

    commits: dict[str, dict[str, bytes]]
    parents: dict[str, str | None]
    refs: dict[str, str]
    messages: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: tuple[str, ...] = (OWNER,)
    owner: str = OWNER
    pulls: int = 0

    def sha(self, revision: str) -> str | None:
        """Return the commit of a revision; None if there is none."""
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision."""
        return self.commits[self.sha(revision) or ""]

    def commit(self, files: Mapping[str, bytes], revision: str = "main", message: str = "") -> str:
        """Put a commit with all these files on a branch, and return its name."""
        parent = self.refs.get(revision)
        text = json.dumps([parent, message, sorted((n, lfs_oid(c)) for n, c in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.parents[sha], self.messages[sha] = dict(files), parent, message
        self.refs[revision] = sha
        return sha


@dataclass(frozen=True)
class Seen:
    """A request that was answered, and how many bytes of content it was sent."""

    method: str
    path: str
    range: str | None
    status: int
    nbytes: int
    authorised: bool


Fault = Callable[["_Handler", str, str], bool]
"""Called with (handler, method, path); returns whether it has answered, or cut the connection."""


class FakeHub:
    """The server's state; tests change it, and look at it, while it runs."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.aliases: dict[str, str] = {}
        self.datasets: set[str] = set()
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.tokens = {TOKEN: OWNER}
        self.objects: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self.yaml_errors: list[str] = []
        self.trusted: str | None = None
        self.ranges = True
        self.hashes = True
        self.lock = threading.RLock()
        self.endpoint = ""

    def add(
        self, name: str, files: Mapping[str, bytes] | Path | None = None, **kinds: object
    ) -> Repo:
        """Make a repository with one commit of files, or of a folder's files."""
        if isinstance(files, Path):
            root = files
            files = {p.relative_to(root).as_posix(): p.read_bytes()
                     for p in sorted(root.rglob("*")) if p.is_file()}  # fmt: skip
        repo = Repo({}, {}, {}, owner=name.partition("/")[0], **kinds)  # type: ignore[arg-type]
        repo.commit(
            {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, message="first"
        )
        self.repos[name] = repo
        return repo

    def fail(
        self,
        path: str,
        status: int,
        *,
        method: str | None = None,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        body: object = None,
    ) -> None:
        """Answer the next requests for a path (a regular expression) with an error."""
        left = [times]

        def fault(handler: _Handler, verb: str, target: str) -> bool:
            if left[0] <= 0 or (method or verb) != verb or not re.search(path, target):
                return False
            left[0] -= 1
            handler.drain()
            handler.reply(status, {} if body is None else body, headers or {})
            return True

        self.faults.append(fault)

    def cut(self, path: str, *, method: str, times: int = 1, after: int = 0) -> None:
        """Close the connection of the next requests for a path, after some bytes of the answer."""
        left = [times]

        def fault(handler: _Handler, verb: str, target: str) -> bool:
            if left[0] <= 0 or method != verb or not re.search(path, target):
                return False
            left[0] -= 1
            handler.cut_after = after
            return after == 0 and handler.hang_up()

        self.faults.append(fault)

    def lose_reply(self, path: str, *, times: int = 1) -> None:
        """Do what the next requests for a path ask for, and close the connection unanswered."""
        left = [times]

        def fault(handler: _Handler, verb: str, target: str) -> bool:
            if left[0] > 0 and re.search(path, target):
                left[0] -= 1
                handler.cut_after = 0
            return False

        self.faults.append(fault)

    def served(self, path: str = "") -> int:
        """Return how many bytes of content were sent for paths that match."""
        return sum(each.nbytes for each in self.seen if re.search(path, each.path))

    def asked(self, path: str, method: str | None = None) -> list[Seen]:
        """Return the requests for paths that match."""
        return [
            each
            for each in self.seen
            if re.search(path, each.path) and method in (None, each.method)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    cut_after: int | None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def drain(self) -> bytes:
        """Read the request's content, whole or in chunks."""
        if self._content is None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                self._content = b"".join(parts)
            else:
                self._content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._content

    def hang_up(self) -> bool:
        """Close the connection without an answer."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)
        return True

    def reply(
        self,
        status: int,
        body: object = b"",
        headers: Mapping[str, str] = {},
    ) -> None:
        """Send an answer: bytes as they are, anything else as JSON; cut it where asked to."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        nothing = self.command == "HEAD"
        with self.hub.lock:
            path = urllib.parse.unquote(self.path)
            sent = 0 if nothing else len(content)
            asked = self.headers.get("Range")
            seen = Seen(self.command, path, asked, status, sent, "Authorization" in self.headers)
            self.hub.seen.append(seen)
        if self.cut_after == 0:
            self.hang_up()
            return
        self.send_response(status)
        lower = {name.lower() for name in headers}
        if "content-length" not in lower:
            self.send_header("Content-Length", str(len(content)))
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if nothing:
            return
        if self.cut_after is not None:
            self.wfile.write(content[: self.cut_after])
            self.wfile.flush()
            self.hang_up()
            return
        self.wfile.write(content)

    def _answer(self, method: str) -> None:
        self._content: bytes | None = None
        self.cut_after = None
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path)
        self.query = dict(urllib.parse.parse_qsl(query))
        try:
            for fault in list(self.hub.faults):
                if fault(self, method, path):
                    return
            content = self.drain()
            with self.hub.lock:
                for pattern, verbs, action in _ROUTES:
                    found = re.fullmatch(pattern, path)
                    if found and method in verbs:
                        action(self, *found.groups(), content)
                        return
            self.reply(404, {"error": "no such endpoint"})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # Who asks, and what they may see.

    @property
    def user(self) -> str | None:
        """Name of who asks; None without a token that is known."""
        word = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.tokens.get(word)

    def repo(self, name: str) -> Repo | None:
        """Return a repository that the asking user may see; else answer, and return None."""
        if "Authorization" in self.headers and self.user is None:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self.reply(401, {"error": "Invalid username or password."}, message)
            return None
        if name in self.hub.aliases:
            target = self.path.replace(name, self.hub.aliases[name], 1)
            self.reply(307, b"", {"Location": target})
            return None
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.user not in found.readers):
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.reply(404 if self.user else 401, {"error": "Repository not found"}, missing)
            return None
        return found

    def commit_of(self, repo: Repo, revision: str) -> str | None:
        """Return the commit of a revision; else answer, and return None."""
        sha = repo.sha(revision)
        if sha is None:
            lost = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            self.reply(404, {"error": f"Invalid rev id: {revision}"}, lost)
        return sha

    def may_write(self, name: str, repo: Repo, *, proposing: bool = False) -> bool:
        """Return whether the asking user may write; else answer."""
        if self.user is None:
            self.reply(401, {"error": "Invalid username or password."})
            return False
        if self.user != repo.owner and not proposing:
            text = f"You don't have the rights to create a commit in {name}"
            self.reply(403, {"error": text}, {"X-Error-Message": text})
            return False
        return True

    # Reading.

    def models(self, content: bytes) -> None:
        """Answer with the repositories of an author that the asking user may see."""
        author = self.query.get("author", "")
        self.reply(200, [
            {"_id": "0", "id": name, "modelId": name, "private": repo.private, "tags": [],
             "downloads": 0, "likes": 0, "createdAt": "2026-01-01T00:00:00.000Z",
             "siblings": [{"rfilename": path} for path in repo.files()]}
            for name, repo in self.hub.repos.items()
            if name.startswith(f"{author}/") and (not repo.private or self.user in repo.readers)
        ])  # fmt: skip

    def info(self, name: str, revision: str | None, content: bytes) -> None:
        repo = self.repo(name)
        if repo is None or (sha := self.commit_of(repo, revision or "main")) is None:
            return
        with_hashes = "blobs" in self.query and self.hub.hashes
        siblings = [
            {"rfilename": path, **(_entry(path, data) if with_hashes else {})}
            for path, data in repo.commits[sha].items()
        ]
        self.reply(200, {
            "_id": "0", "id": name, "modelId": name, "sha": sha, "private": repo.private,
            "gated": "auto" if repo.gated else False, "disabled": False, "tags": [],
            "downloads": 0, "likes": 0, "siblings": siblings,
            "cardData": _front_matter(repo.commits[sha].get("README.md", b"")),
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
        })  # fmt: skip

    def tree(self, name: str, revision: str, place: str | None, content: bytes) -> None:
        repo = self.repo(name)
        if repo is None or (sha := self.commit_of(repo, revision)) is None:
            return
        inside = f"{place.strip('/')}/" if place else ""
        found = [_entry(p, d) for p, d in repo.commits[sha].items() if p.startswith(inside)]
        if self.query.get("recursive") not in ("true", "True", "1"):
            found = [each for each in found if "/" not in str(each["path"])[len(inside) :]]
        self.reply(200, found)

    def paths_info(self, name: str, revision: str, content: bytes) -> None:
        repo = self.repo(name)
        if repo is None or (sha := self.commit_of(repo, revision)) is None:
            return
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(content)["paths"]
        else:
            paths = urllib.parse.parse_qs(content.decode())["paths"]
        files = repo.commits[sha]
        self.reply(200, [_entry(path, files[path]) for path in paths if path in files])

    def refs(self, name: str, content: bytes) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s}
                    for n, s in repo.refs.items() if not n.startswith("refs/")]  # fmt: skip
        pulls = [{"name": n, "ref": n, "targetCommit": s}
                 for n, s in repo.refs.items() if n.startswith("refs/pr/")]  # fmt: skip
        answer = {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls}
        self.reply(200, answer)

    def history(self, name: str, revision: str, content: bytes) -> None:
        repo = self.repo(name)
        if repo is None or (sha := self.commit_of(repo, revision)) is None:
            return
        found, at = [], sha
        while at is not None:
            found.append({"id": at, "title": repo.messages[at], "message": "", "authors": [],
                          "date": "2026-01-01T00:00:00.000Z"})  # fmt: skip
            at = repo.parents[at]
        self.reply(200, found)

    def resolve(self, name: str, revision: str, place: str, content: bytes) -> None:
        repo = self.repo(name)
        if repo is None or (sha := self.commit_of(repo, revision)) is None:
            return
        if repo.gated and self.user not in repo.readers:
            text = f"Access to model {name} is restricted. You must have access to it."
            gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": text}
            self.reply(403 if self.user else 401, {"error": text}, gated)
            return
        data = repo.commits[sha].get(place)
        if data is None:
            lost = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.reply(404, {"error": "Entry not found"}, {**lost, "X-Repo-Commit": sha})
            return
        etag = lfs_oid(data) if place.endswith(_LFS_SUFFIXES) else git_oid(data)
        self.content(data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def content(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Send a file, or the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        shared = {**headers, "Accept-Ranges": "bytes"}
        if asked is None or not self.hub.ranges:
            self.reply(200, data, shared)
            return
        begin = int(asked[1])
        end = min(int(asked[2]) if asked[2] else len(data) - 1, len(data) - 1)
        if begin >= len(data):
            self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        place = {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        self.reply(206, data[begin : end + 1], {**shared, **place})

    def whoami(self, content: bytes) -> None:
        if self.user is None:
            self.reply(401, {"error": "Invalid username or password."})
        else:
            self.reply(200, {"type": "user", "id": "0", "name": self.user, "orgs": []})

    def dataset(self, name: str, content: bytes) -> None:
        if name in self.hub.datasets:
            self.reply(200, {"_id": "0", "id": name, "sha": "0" * 40, "private": False,
                             "siblings": [], "tags": [], "downloads": 0, "likes": 0,
                             "disabled": False, "gated": False})  # fmt: skip
        else:
            missing = {"X-Error-Code": "RepoNotFound"}
            self.reply(404 if self.user else 401, {"error": "Repository not found"}, missing)

    # Trusted publishing: a job's id token for one of the Hub's.

    def id_token(self, content: bytes) -> None:
        if self.headers.get("Authorization") == "Bearer of-the-job":
            self.reply(200, {"value": ID_TOKEN})
        else:
            self.reply(401, {"error": "no"})

    def exchange(self, content: bytes) -> None:
        asked = json.loads(content)
        if asked["subject_token"] != ID_TOKEN or asked["resource"] != self.hub.trusted:
            self.reply(403, {"error": "not a trusted publisher"})
        else:
            self.reply(200, {"access_token": TOKEN, "token_type": "bearer", "expires_in": 3600})

    # Buckets.

    def bucket_info(self, name: str, content: bytes) -> None:
        files = self.hub.buckets.get(name)
        if files is None:
            self.reply(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        size = sum(map(len, files.values()))
        self.reply(200, {"id": name, "private": True, "createdAt": "2026-01-01T00:00:00.000Z",
                         "size": size, "totalFiles": len(files)})  # fmt: skip

    def bucket_batch(self, name: str, content: bytes) -> None:
        files = self.hub.buckets[name]
        failed = []
        for line in content.splitlines():
            asked = json.loads(line)
            if asked["type"] == "deleteFile":
                files.pop(asked["path"], None)
            elif asked["xetHash"] in self.hub.objects:
                files[asked["path"]] = self.hub.objects[asked["xetHash"]]
            else:
                failed.append({"path": asked["path"], "error": "no such content"})
        self.reply(200, {"success": not failed, "processed": 1, "succeeded": 1, "failed": failed})

    def bucket_tree(self, name: str, place: str | None, content: bytes) -> None:
        files = self.hub.buckets.get(name)
        if files is None:
            self.reply(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        inside = f"{place.strip('/')}/" if place else ""
        found = {path: data for path, data in files.items()
                 if path.startswith(inside) or path == place}  # fmt: skip
        folders = set()
        if self.query.get("recursive") not in ("true", "True", "1"):
            deeper = {path for path in found if "/" in path[len(inside) :]}
            folders = {inside + path[len(inside) :].partition("/")[0] for path in deeper}
            found = {path: data for path, data in found.items() if path not in deeper}
        when = "2026-01-01T00:00:00.000Z"
        self.reply(200, [
            *({"type": "directory", "path": path, "uploadedAt": when} for path in sorted(folders)),
            *({"type": "file", "path": path, "size": len(data), "xetHash": lfs_oid(data),
               "mtime": when, "uploadedAt": when} for path, data in found.items()),
        ])  # fmt: skip

    def bucket_paths(self, name: str, content: bytes) -> None:
        files = self.hub.buckets.get(name, {})
        paths = json.loads(content)["paths"]
        self.reply(200, [
            {"type": "file", "path": path, "size": len(files[path]),
             "xetHash": lfs_oid(files[path]), "mtime": "2026-01-01T00:00:00.000Z"}
            for path in paths if path in files
        ])  # fmt: skip

    def bucket_file(self, name: str, place: str, content: bytes) -> None:
        files = self.hub.buckets.get(name, {})
        if place not in files:
            self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            self.content(files[place], {"ETag": f'"{lfs_oid(files[place])}"'})

    # Writing.

    def create(self, content: bytes) -> None:
        if self.user is None:
            self.reply(401, {"error": "Invalid username or password."})
            return
        asked = json.loads(content)
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "0"}
        if owner != self.user:
            text = f"You don't have the rights to create a model under the namespace {owner}"
            self.reply(403, {"error": text}, {"X-Error-Message": text})
        elif name in self.hub.repos:
            self.reply(409, {"error": "You already created this model repo", **url})
        else:
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.add(name, private=bool(is_private))
            self.reply(200, url)

    def branch(self, name: str, branch: str, content: bytes) -> None:
        repo = self.repo(name)
        if repo is None or not self.may_write(name, repo):
            return
        start = json.loads(content or b"{}").get("startingPoint", "main")
        if branch in repo.refs:
            self.reply(409, {"error": "Reference already exists"})
        elif (sha := self.commit_of(repo, start)) is not None:
            repo.refs[branch] = sha
            self.reply(200, {})

    def validate_yaml(self, content: bytes) -> None:
        errors = [{"message": text} for text in self.hub.yaml_errors]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, revision: str, content: bytes) -> None:
        repo = self.repo(name)
        proposing = "create_pr" in self.query
        if repo is None or not self.may_write(name, repo, proposing=proposing):
            return
        if (sha := self.commit_of(repo, revision)) is None:
            return
        here = repo.commits[sha]
        self.reply(200, {"files": [
            {"path": each["path"],
             "uploadMode": "lfs" if each["path"].endswith(_LFS_SUFFIXES) else "regular",
             "shouldIgnore": False,
             "oid": None if each["path"] not in here else _entry(each["path"], here[each["path"]])[
                 "remote"]}
            for each in json.loads(content)["files"]
        ]})  # fmt: skip

    def lfs_batch(self, name: str, content: bytes) -> None:
        objects = []
        for each in json.loads(content)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{each['oid']}", "header": {}}
                verify = {"href": f"{self.hub.endpoint}/lfs-verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, content: bytes) -> None:
        if lfs_oid(content) != oid:
            self.reply(400, {"error": "the content is another"})
        else:
            self.hub.objects[oid] = content
            self.reply(200)

    def lfs_verify(self, content: bytes) -> None:
        self.reply(200 if json.loads(content)["oid"] in self.hub.objects else 404, {})

    def commit(self, name: str, revision: str, content: bytes) -> None:
        repo = self.repo(name)
        proposing = "create_pr" in self.query
        if repo is None or not self.may_write(name, repo, proposing=proposing):
            return
        if (sha := self.commit_of(repo, revision)) is None:
            return
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, sha):
            text = "A commit has happened since. Please refresh and try again."
            self.reply(412, {"error": text}, {"X-Error-Message": text})
            return
        files = dict(repo.commits[sha])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.reply(400, {"error": "the large file was not uploaded"})
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        message = header["summary"] + (
            "\n\n" + header["description"] if header.get("description") else ""
        )
        answer: dict[str, object] = {"success": True}
        if proposing:
            repo.pulls += 1
            target = f"refs/pr/{repo.pulls}"
            repo.refs[target] = sha
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{repo.pulls}"
        else:
            target = revision
        made = repo.commit(files, target, message)
        answer |= {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{made}", "commitOid": made}
        self.reply(200, answer)


def _front_matter(card: bytes) -> object:
    import yaml

    found = re.match(rb"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def _entry(path: str, data: bytes) -> dict[str, object]:
    """Return what listings say of a file."""
    large = path.endswith(_LFS_SUFFIXES)
    version = "version https://git-lfs.github.com/spec/v1"
    pointer = f"{version}\noid sha256:{lfs_oid(data)}\nsize {len(data)}\n"
    oid = git_oid(pointer.encode() if large else data)
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": oid,
                                "blobId": oid}  # fmt: skip
    entry["remote"] = lfs_oid(data) if large else oid
    if large:
        entry["lfs"] = {"oid": lfs_oid(data), "sha256": lfs_oid(data), "size": len(data),
                        "pointerSize": len(pointer)}  # fmt: skip
    return entry


_ID = r"((?!api/|datasets/)[\w.-]+(?:/[\w.-]+)?)"
_REV = r"(refs/(?:pr|convert)/[^/]+|[^/]+)"
_ROUTES: list[tuple[str, tuple[str, ...], Callable[..., None]]] = [
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (r"/id-token", ("GET",), _Handler.id_token),
    (r"/oauth/token", ("POST",), _Handler.exchange),
    (r"/api/validate-yaml", ("POST",), _Handler.validate_yaml),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/models", ("GET",), _Handler.models),
    (rf"/api/models/{_ID}/revision/{_REV}", ("GET",), _Handler.info),
    (rf"/api/models/{_ID}/tree/{_REV}(/.*)?", ("GET",), _Handler.tree),
    (rf"/api/models/{_ID}/paths-info/{_REV}", ("POST",), _Handler.paths_info),
    (rf"/api/models/{_ID}/refs", ("GET",), _Handler.refs),
    (rf"/api/models/{_ID}/commits/{_REV}", ("GET",), _Handler.history),
    (rf"/api/models/{_ID}/preupload/{_REV}", ("POST",), _Handler.preupload),
    (rf"/api/models/{_ID}/commit/{_REV}", ("POST",), _Handler.commit),
    (rf"/api/models/{_ID}/branch/(.+)", ("POST",), _Handler.branch),
    (rf"/api/models/{_ID}()", ("GET",), lambda self, name, _, c: self.info(name, None, c)),
    (rf"/api/datasets/{_ID}(?:/revision/.*)?", ("GET",), _Handler.dataset),
    (rf"/api/buckets/{_ID}", ("GET",), _Handler.bucket_info),
    (rf"/api/buckets/{_ID}/batch", ("POST",), _Handler.bucket_batch),
    (rf"/api/buckets/{_ID}/tree(/.*)?", ("GET",), _Handler.bucket_tree),
    (rf"/api/buckets/{_ID}/paths-info", ("POST",), _Handler.bucket_paths),
    (rf"/buckets/{_ID}/resolve/(.+)", ("GET", "HEAD"), _Handler.bucket_file),
    (rf"/{_ID}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (r"/lfs/(\w+)", ("PUT",), _Handler.lfs_put),
    (r"/lfs-verify", ("POST",), _Handler.lfs_verify),
    (rf"/{_ID}/resolve/{_REV}/(.+)", ("GET", "HEAD"), _Handler.resolve),
]


@contextlib.contextmanager
def running() -> Iterator[FakeHub]:
    """Run a Hub on a free port until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)
        assert not thread.is_alive()


def environment(server, home, token=TOKEN):
    """Return the variables that send the library to a server, with a cache of its own."""
    others = ("HF_", "TRANSFORMERS_", "LINES")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    made = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "COLUMNS": "100",
    }
    return {**kept, **made, **({} if token is None else {"HF_TOKEN": token})}
