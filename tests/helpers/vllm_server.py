"""A small HTTP server that speaks vLLM's protocol, and can be made to fail in its ways."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from helpers.tiny import tiny_tokenizer
from rlcore.models.loading import load_policy
from rlcore.sampling.rollout import generate


class FakeVLLM:
    """A server of the model in `directory`.

    bodies: what was asked of the generate route. faults: statuses, or 0 for a connection that is
    cut, for the next requests in its place. deaf: new weights are accepted and not taken.
    """

    # of all servers: transformers patches its classes while it loads a model
    lock = threading.Lock()

    def __init__(self, directory: str):
        self.first = directory
        self.bodies: list[dict] = []
        self.loaded: list[Path] = []
        self.faults: list[int] = []
        self.deaf = False
        self.offset = 0.0
        self.forget()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do(None)

            def do_POST(self) -> None:
                self.do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def do(self, body: dict | None) -> None:
                with outer.lock:
                    fault = outer.faults.pop(0) if outer.faults else None
                    if fault == 0:
                        self.connection.close()
                        return
                    status, answer = (fault, "busy") if fault else outer.answer(self.path, body)
                text = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                return None

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def forget(self) -> None:
        """What a new start leaves: the first weights."""
        self.model, self.version = load_policy(self.first), "default"

    def answer(self, route: str, body: dict | None) -> tuple[int, Any]:
        if route == "/v1/models":
            return 200, {"data": [{"id": "policy"}]}
        if route == "/weight_info":
            return 200, {"weight_version": self.version}
        if route == "/reset_prefix_cache":
            return 200, {"success": True}
        if route == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True}
        if route == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.loaded.append(Path(body["kwargs"]["weights_path"]))
            fresh = load_policy(str(self.loaded[-1]))
            if fresh.config.hidden_size != self.model.config.hidden_size:
                return 500, {"error": {"message": "shapes differ"}}
            if not self.deaf:
                self.model = fresh
            return 200, None
        if route == "/inference/v1/generate":
            return self.generate(body)
        return 404, {"detail": "Not Found"}

    def generate(self, body: dict) -> tuple[int, Any]:
        ids, options = body["token_ids"], body["sampling_params"]
        if max(ids) >= self.model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}}
        if options["temperature"] == 0 and options.get("n", 1) > 1:
            return 400, {"error": {"message": "n must be 1 when using greedy sampling"}}
        self.bodies.append(body)
        ends = options.get("stop_token_ids", [])
        self.model.generation_config.eos_token_id = ends
        with torch.random.fork_rng():
            rollout = generate(
                self.model,
                tiny_tokenizer(),
                [ids],
                num_generations=options.get("n", 1),
                max_new_tokens=options["max_tokens"],
                temperature=options["temperature"] or 1.0,
                top_p=options.get("top_p", 1.0),
                top_k=options.get("top_k", 0),
                greedy=options["temperature"] == 0,
                seed=options.get("seed", 0),
            )
        rows = zip(
            rollout.completion_ids, rollout.completion_mask, rollout.sampling_logp, strict=True
        )
        return 200, {"choices": [self.choice(i, *row) for i, row in enumerate(rows)]}

    def choice(self, index: int, ids: Any, mask: Any, logp: Any) -> dict:
        kept = ids[mask].tolist()
        content = [
            {"token_id": token, "logprob": value + self.offset}
            for token, value in zip(kept, logp[mask].tolist(), strict=True)
        ]
        span = {"version": self.version, "start": 0, "end": len(kept)}
        return {
            "index": index,
            "token_ids": kept,
            "logprobs": {"content": content},
            "weight_versions": [span],
        }

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
