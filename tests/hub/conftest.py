"""A hub on this machine: so much of its HTTP interface as `huggingface_hub` calls to make, fill and read a repository.

And two trained folders to put there.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from coadapt.cli.group import run
from coadapt.demo import BASE
from coadapt.demo.task import examples

Files = dict[str, bytes]
OWNER, READER = "hf_owner", "hf_reader"


@dataclass
class Hub:
    """What it holds, and what it was asked."""

    address: str = ""
    repos: dict[str, dict[str, Files]] = field(default_factory=dict)
    """Repository -> branch -> files."""
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256, before a commit names them."""
    asked: list[str] = field(default_factory=list)
    fails_at: str | None = None
    """A part of an address at which it is broken."""

    def take(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        """A commit, whole."""
        files = dict(self.repos[repo][branch])
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                self.commits.append({"repo": repo, "branch": branch, **value})
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        self.repos[repo][branch] = files


def sha(files: Files) -> str:
    """A name for a state of a repository."""
    every = json.dumps({name: hashlib.sha1(content).hexdigest() for name, content in sorted(files.items())})
    return hashlib.sha1(every.encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _reply(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self) -> None:
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self._whole()
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.fails_at and self.hub.fails_at in path:
            return self._reply(501, {"error": "broken"})
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return getattr(self, method)(body, *found.groups())
        return self._reply(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    def _whole(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _may_write(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != OWNER:
            self._reply(403 if token == READER else 401, {"error": "no"})
        return token == OWNER

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return
        said = json.loads(body)
        repo = f"{said['organization']}/{said['name']}"
        if repo in self.hub.repos:
            self._reply(409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{repo}"})
            return
        self.hub.repos[repo] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
        self.hub.private[repo] = said.get("visibility") == "private"
        self._reply(200, {"url": f"{self.hub.address}/{repo}"})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        if self._may_write():
            taken = branch in self.hub.repos[repo]
            self.hub.repos[repo].setdefault(branch, dict(self.hub.repos[repo]["main"]))
            self._reply(409 if taken else 200, {"error": "Reference already exists"} if taken else {})

    def info(self, body: bytes, repo: str, branch: str | None = None) -> None:
        if repo not in self.hub.repos:
            self._reply(404, {"error": "no"}, X_Error_Code="RepoNotFound")
            return
        files = self._files(repo, branch)
        siblings = [{"rfilename": name} for name in files]
        self._reply(200, {"id": repo, "sha": sha(files), "siblings": siblings, "private": False, "tags": []})

    def _files(self, repo: str, revision: str | None) -> Files:
        branches = self.hub.repos[repo]
        return branches.get(revision or "main") or next(f for f in branches.values() if sha(f) == revision)

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        folders = {name.partition("/")[0] for name in files if "/" in name}
        listed: list[dict[str, Any]] = [{"type": "directory", "path": one, "oid": "0" * 40} for one in folders]
        listed += [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        self._reply(200, listed)

    def valid(self, body: bytes) -> None:
        self._reply(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, branch: str) -> None:
        if self._may_write():
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._reply(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/store/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._reply(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._reply(200)

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        if self._may_write():
            self.hub.take(repo, branch, [json.loads(line) for line in body.splitlines()])
            made = sha(self.hub.repos[repo][branch])
            self._reply(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{made}", "commitOid": made})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        content = files[name]
        self._reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha(files))


_REPO = r"([^/]+/[^/]+)"
_ROUTES = (
    (r"POST /api/repos/create", "create"),
    (rf"POST /api/models/{_REPO}/branch/(.+)", "branch"),
    (rf"GET /api/models/{_REPO}", "info"),
    (rf"GET /api/models/{_REPO}/revision/(.+)", "info"),
    (rf"GET /api/models/{_REPO}/tree/(.+)", "tree"),
    (r"POST /api/validate-yaml", "valid"),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", "preupload"),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /store/(\w+)", "store"),
    (rf"POST /api/models/{_REPO}/commit/(.+)", "commit"),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The hub that everything here talks to; its owner is logged in."""
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": found}))
    found.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    template = found.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_TOKEN", OWNER)
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in `tiny/base`, rows in `data/rows.jsonl`, and the runs `one` (a LoRA) and `two`."""
    place = tmp_path_factory.mktemp("somebody-at-work")
    shutil.copytree(BASE, place / "tiny" / "base")
    (place / "data").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in examples("train", 48, 0))
    (place / "data" / "rows.jsonl").write_text(rows, "utf-8")
    how = "--max-steps 4 --logging-steps 1 --eval-steps 2 --eval-split 0.25 --save-steps 4 --use-cpu --no-verify"
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setattr("coadapt.cli.output.quiet", lambda: None)
        for out, method in (("one", "lora"), ("two", "prompt + lora")):
            args = ["train", "--model", "tiny/base", "--data", str(place / "data" / "rows.jsonl"), "--method", method]
            assert run([*args, "--output-dir", out, *how.split()]) == 0
        assert run("eval --adapter two --limit 4 --max-new-tokens 8 --use-cpu --show 0".split()) == 0
    return place


@pytest.fixture
def at_work(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is where the test stands."""
    shutil.copytree(workplace, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("coadapt.cli.output.quiet", lambda: None)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "work"
