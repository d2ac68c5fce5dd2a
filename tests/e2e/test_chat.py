"""The example chat service answers with a model that the gate lets through, and stops when the gate no longer holds."""

from __future__ import annotations

import http.client
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.helpers.family import Family, finding, verdict

from trainguard.home import Home
from trainguard.seal.write import seal_path

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.nightly]
FOLDER = Path(__file__).parents[2] / "examples" / "chat"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; what it adds to the path and to the modules is taken back."""
    for name in ("finetune", "train", "chat_serve"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("chat_serve", FOLDER / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("finetune", "train"):
        sys.modules.pop(name, None)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    made = Family(Home(tmp_path / "home"), tmp_path)
    made.judged(monkeypatch)
    return made


def saved(serve: ModuleType, family: Family) -> Path:
    """A tiny model, saved by run `chat` as its last step."""
    train = sys.modules["train"]
    torch.manual_seed(0)
    gpt = train.GPT(1, 16, 4, 32, 0.0)
    family.run("chat")
    path = family.folder / "step-000010.pt"
    sources = [{"shard": "<b>sums</b>", "source": "arithmetic", "licence": "Apache-2.0"}]
    torch.save({"model": gpt.state_dict(), "alphabet": train.ALPHABET, "step": 10, "sources": sources}, path)
    seal_path(family.home, path, run="chat", step=10, source="run")
    return path


@pytest.fixture
def service(serve: ModuleType, family: Family) -> Iterator[tuple[Any, int]]:
    model = serve.Model(saved(serve, family), family.home, "VERIFIED", "TIL-1", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_address[1]
    server.RequestHandlerClass = serve.handler(model, frozenset({f"127.0.0.1:{port}"}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield model, port
    server.shutdown()
    server.server_close()
    thread.join()


def ask(port: int, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request(method, path, body=body, headers=headers)
    answer = link.getresponse()
    told = answer.status, answer.read().decode()
    link.close()
    return told


def test_it_answers_shows_where_the_model_comes_from_and_stops_when_it_turns_out_tainted(
    service: tuple[Any, int], family: Family
) -> None:
    _, port = service
    status, page = ask(port, "GET", "/")
    assert status == 200
    for words in ("VERIFIED at TIL-1", "run chat, step 10", "Apache-2.0", "&lt;b&gt;sums&lt;/b&gt;"):
        assert words in page
    status, answer = ask(port, "POST", "/say", "2 + 2?")
    assert status == 200
    assert len(answer) <= 80
    assert ask(port, "GET", "/chat.js")[0] == 200
    assert ask(port, "GET", "/../serve.py")[0] == 404

    family.verdicts["chat"] = verdict(finding(4))
    status, answer = ask(port, "POST", "/say", "2 + 2?")
    assert status == 503
    assert "the verdict is TAINTED" in answer
    assert json.loads(ask(port, "GET", "/provenance")[1])["passed"] is False
    assert "disabled" in ask(port, "GET", "/")[1]


def test_other_hosts_long_messages_and_foreign_pages_are_turned_away(service: tuple[Any, int]) -> None:
    _, port = service
    assert ask(port, "GET", "/", Host="evil.example")[0] == 403
    assert ask(port, "POST", "/say", "hi", Origin="http://evil.example")[0] == 403
    assert ask(port, "POST", "/say", "x" * 401)[0] == 400
    assert ask(port, "POST", "/other", "hi")[0] == 400


@pytest.mark.parametrize("change", ["tainted", "edited"])
def test_a_model_whose_gate_does_not_hold_is_not_even_loaded(
    serve: ModuleType, family: Family, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = saved(serve, family)
    if change == "tainted":
        family.verdicts["chat"] = verdict(finding(4))
    else:
        path.write_bytes(path.read_bytes() + b"x")
    loaded: list[object] = []
    monkeypatch.setattr(serve.trainguard, "open_checkpoint", lambda *a, **k: loaded.append(a))
    with pytest.raises(SystemExit, match="the gate does not hold"):
        serve.Model(path, family.home, "VERIFIED", "TIL-1", 60.0)
    assert loaded == []
