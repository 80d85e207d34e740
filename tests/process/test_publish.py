"""`python -m d2lora publish` with the Hub's own client, against a server that answers as the Hub does."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests" / "old_store"
CELL = "lab-math-sft-m8-n8-s0-c5e788bc"


class Hub(ThreadingHTTPServer):
    """Keeps what was created and committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.created: list[dict] = []
        self.committed: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/me/adapter"})
        elif "/preupload/" in self.path:
            files = [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.committed += [line["value"]["path"] for line in lines if line["key"] == "file"]
            commit = f"{self.server.address}/me/adapter/commit/{'1' * 40}"
            self._answer({"success": True, "commitUrl": commit, "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def publish(hub: Hub, *words: str) -> str:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-m", "d2lora", "publish", CELL, "--output", str(REAL), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cell_is_uploaded_when_told_and_only_then_and_is_private_first(hub: Hub, tmp_path: Path) -> None:
    publish(hub, "--folder", str(tmp_path / "new"))
    assert hub.created == []
    text = publish(hub, "--folder", str(tmp_path / "new"), "--to", "me/adapter")
    assert f"uploaded: {hub.address}/me/adapter" in text
    assert [created["visibility"] for created in hub.created] == ["private"]
    written = {str(f.relative_to(tmp_path / "new")) for f in (tmp_path / "new").rglob("*") if f.is_file()}
    assert set(hub.committed) == written == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
