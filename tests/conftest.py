"""What tests share."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from robench.core.data import Data
from robench.core.logs import Lines, logged
from robench.evaluation.evaluated import EvaluatedModel
from tests.small import ensemble, noise


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published weights, real images and reference answers; a test that needs it is skipped without."""
    folder = Path(os.environ.get("ROBENCH_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set ROBENCH_DATA to the folder with parity.npz and checkpoints/")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums do not depend on how many threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What robench logs from INFO on while the test runs."""
    lines: list[str] = []
    with logged(Lines(lines)):
        yield lines


@pytest.fixture(scope="session")
def make_model() -> Callable[[int], EvaluatedModel]:
    return lambda seed: EvaluatedModel.of_model(ensemble(seed), torch.device("cpu"), name=f"model{seed}", seed=seed)


@pytest.fixture(scope="session")
def data() -> Data:
    return noise()


@pytest.fixture
def web() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A server on this machine, and what it answers by path; it answers 404 elsewhere."""
    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(web: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, bytes]]:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", web[0])
    return web
