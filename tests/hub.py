"""A stand-in of the Hugging Face Hub's HTTP API on the loopback interface: repositories in memory, and the rules for metadata of cards."""

import base64
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
import yaml

REVISION = "0123456789abcdef0123456789abcdef01234567"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "llama3", "openrail", "other"}  # some of the Hub's
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
REPOSITORY = r"[\w.-]+/[\w.-]+"


def problems_of(content: str) -> list[str]:
    """Return what the Hub's documentation of model cards forbids in a card's metadata."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(block[1]) if block else None
    if not isinstance(data, dict):
        return ["no metadata"]

    def texts(key: str) -> list:
        value = data.get(key, [])
        return value if isinstance(value, list) else [value]

    bad = [
        f"{key}: {value!r}"
        for key, pattern in (
            ("language", r"[a-z]{2,3}"),
            ("base_model", REPOSITORY),
            ("tags", ".+"),
        )
        for value in texts(key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value)
    ]
    if not isinstance(data.get("tags", []), list):
        bad.append("tags: no list")
    if data.get("license", "other") not in LICENSES:
        bad.append(f"license: {data['license']!r}")
    if "license_name" in data and data.get("license") != "other":
        bad.append("license_name: the license is not other")
    if data.get("base_model_relation", "merge") not in RELATIONS:
        bad.append(f"base_model_relation: {data['base_model_relation']!r}")
    return bad


class Hub:
    """Repositories of the stand-in.

    Attributes:
        files: Repository -> path -> content.
        validated: Cards that were sent for validation.
        url: Address.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.validated: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        """Return status, content and headers of the answer to a request."""
        if path == "/api/validate-yaml":
            self.validated.append(content := json.loads(body)["content"])
            bad = problems_of(content)
            return (400, "; ".join(bad), {}) if bad else (200, {"errors": [], "warnings": []}, {})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}, {}
        if found := re.fullmatch(rf"/api/models/({REPOSITORY})/(\w+)/[^/]+.*", path):
            return self._repository(found[1], found[2], body)
        if found := re.fullmatch(rf"/({REPOSITORY})/resolve/[^/]+/(.+)", path):
            data = self.files.get(found[1], {}).get(found[2])
            if data is not None:
                marks = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": REVISION}
                return 200, data, marks
        return 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"}

    def _repository(self, name: str, verb: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        if name not in self.files:
            return 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"}
        held = self.files[name]
        if verb == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"uploadMode": "regular", "shouldIgnore": False, "oid": None}] * len(asked)
            return 200, {"files": [a | m for a, m in zip(asked, modes, strict=True)]}, {}
        if verb == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.url}/{name}/commit/{REVISION}"
            return 200, {"commitUrl": url, "commitOid": REVISION, "success": True}, {}
        if verb == "tree":
            rows = [
                {"type": "file", "path": p, "size": len(d), "oid": sha1(d).hexdigest()}
                for p, d in held.items()
            ]
            return 200, rows, {}
        siblings = [{"rfilename": path} for path in held]
        return 200, {"id": name, "modelId": name, "sha": REVISION, "siblings": siblings}, {}


@contextmanager
def serving() -> Generator[Hub]:
    """Run a stand-in, which huggingface_hub takes for the Hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while n := int(self.rfile.readline(), 16):
                    body += self.rfile.read(n)
                    self.rfile.readline()
                self.rfile.readline()
            path = unquote(urlsplit(self.path).path)
            status, content, headers = hub.answer(self.command, path, body)
            data = content if isinstance(content, bytes) else (
                content if isinstance(content, str) else json.dumps(content)
            ).encode()  # fmt: skip
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
