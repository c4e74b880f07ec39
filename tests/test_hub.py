"""A finished model is pushed to the hub: through huggingface_hub to a stand-in on this machine."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import json
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
from helpers.tiny import save_tiny

from rlcore.errors import UserError
from rlcore.trainers.sft import SFTConfig, train_sft

STATUS = {
    "hf_right": 200,
    "hf_reads": 200,
    "hf_narrow": 403,
    "hf_busy": 503,
}  # of tokens that the hub knows


class Hub(http.server.BaseHTTPRequestHandler):
    """Knows one token; keeps what is committed."""

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def do_GET(self) -> None:
        if self.path.endswith("whoami-v2"):
            status = STATUS.get(self.headers.get("Authorization", "").removeprefix("Bearer "), 401)
            role = "read" if self.headers.get("Authorization") == "Bearer hf_reads" else "write"
            self._answer(status, {"name": "me", "auth": {"accessToken": {"role": role}}})
        else:
            self._answer(404, {"error": "not here"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server.state
        if self.path.endswith("/repos/create"):
            hub["created"] = json.loads(body)
            self._answer(200, {"url": f"{self._address}/me/model"})
        elif self.path.endswith("/validate-yaml"):
            hub["card"] = json.loads(body)["content"]
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path and not hub["refuses"]:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    value = line["value"]
                    hub["files"][value["path"]] = base64.b64decode(value["content"])
            self._answer(200, {"commitUrl": f"{self._address}/me/model/commit/1", "commitOid": "1"})
        else:
            self._answer(403, {"error": "no room"})

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = {"files": {}, "refuses": False}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server.state
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path) -> SFTConfig:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "completion": "2"}))
    return SFTConfig(
        model=save_tiny(tmp_path / "model"), dataset=str(tmp_path / "rows.jsonl"), max_steps=2,
        output_dir=str(tmp_path / "run"), save_steps=1, push_to_hub="me/model",
    )  # fmt: skip


def test_the_finished_model_and_its_card_are_pushed_and_no_samples(hub, config, capsys):
    directory = train_sft(config).output_dir
    assert hub["created"]["name"] == "model" and hub["created"]["organization"] == "me"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "training.yaml"} <= (
        hub["files"].keys()
    )
    left = {"metrics.jsonl", "completions.jsonl", "report.html"}
    assert not left & hub["files"].keys() and not any("/" in name for name in hub["files"])
    for name, content in hub["files"].items():
        assert (Path(directory) / name).read_bytes() == content
    assert hub["card"] == hub["files"]["README.md"].decode()
    assert "pushed to" in capsys.readouterr().err


def test_a_hub_that_refuses_costs_no_model(hub, config, capsys):
    hub["refuses"] = True
    directory = train_sft(config).output_dir
    assert (directory / "model.safetensors").is_file()
    assert "could not be pushed to me/model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        (
            "hf_wrong",
            "me/model",
            "push_to_hub me/model: the hub refuses your token (401: Invalid user token",
        ),
        ("hf_narrow", "me/model", "push_to_hub me/model: the hub refuses your token (403: "),
        ("hf_busy", "me/model", "push_to_hub me/model: the hub answers with an error (503: "),
        ("hf_reads", "me/model", "push_to_hub me/model: your token of the hub may only read"),
        (None, "me/model", "push_to_hub me/model: there is no token of the hub on this machine"),
        ("hf_right", "a/b/c", "push_to_hub 'a/b/c' is no repository"),
    ],
)
def test_who_cannot_push_is_told_before_anything_trains(
    hub, config, monkeypatch, tmp_path, token, name, said
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as caught:
        train_sft(dataclasses.replace(config, push_to_hub=name))
    assert str(caught.value).startswith(said)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_is_not_reached_is_no_question_of_who_asks(hub, config, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        UserError, match=r"push_to_hub me/model: the hub at .* is not reached"
    ) as caught:
        train_sft(config)
    assert "log in" not in str(caught.value)
    assert ("HF_HUB_OFFLINE" in str(caught.value)) == offline
    assert not Path(config.output_dir).exists()
