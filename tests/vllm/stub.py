"""A server that speaks vLLM's protocol and samples nothing: what a client must survive can be arranged on it."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from grpo_trl.seeds import derive_seed

from .helpers import free_port


class StubServer:
    """Completions follow from prompt, seed, place, and what was loaded last.

    Args:
        delay: Seconds that a request for completions takes.
        logprob: Of each token, if several are allowed.
        processed: Whether logprobs are those of the distribution that is sampled from.
        missing: Paths that this version of the server does not have.
        max_model_length: Tokens of prompt and completion together.
        model: Gets the weights that are sent; completions follow from them, and logprobs are its own. None: neither.
    """

    def __init__(self, delay=0.0, logprob=-1.0, processed=True, missing=(), max_model_length=64, model=None):
        self.model, self.max_model_length = model, max_model_length
        self.lock = threading.Lock()
        self.delay, self.logprob, self.processed, self.missing = delay, logprob, processed, missing
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.calls = []
        self.loaded = None
        self.starts = 0
        self.dies_in = None
        self.engine_fails = self.engine_dead = False
        self.completions = 0

    def start(self):
        self.starts += 1
        self.loaded = None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                stub.answer(self, None)

            def do_POST(self):
                stub.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    @contextlib.contextmanager
    def running(self) -> Iterator["StubServer"]:
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def answer(self, handler, body):
        path = handler.path.split("?")[0]
        status, reply = (404, "Not Found") if path in self.missing else self.reply(path, body)
        if status is None:
            handler.connection.close()
            return
        text = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def reply(self, path, body):
        if path == "/metrics":
            return 200, f"# a comment\nprocess_start_time_seconds {self.starts}\n"
        if path == "/v1/models":
            return 200, {"data": [{"id": "model", "max_model_len": self.max_model_length}]}
        if path == "/health" and self.engine_dead:
            return 503, ""
        if path == "/v1/completions" and (self.engine_fails or self.engine_dead):
            return 500, "EngineCore encountered an issue."
        if path == "/v1/completions":
            self.completions += 1
            return self.complete(body)
        if body is not None:
            self.calls.append((path, body))
        if path == "/collective_rpc":
            self.loaded = body["args"]
            self.load(body["args"][0])
        if path == "/v1/load_lora_adapter":
            self.loaded = body["lora_path"]
        return 200, {"success": True}

    def complete(self, body):
        if body["model"] != "model" and self.loaded is None:
            return 404, f"The model `{body['model']}` does not exist."
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in < 0:
                return None, None
        time.sleep(self.delay)
        allowed = body.get("allowed_token_ids")
        logprob = 0.0 if allowed and self.processed else self.logprob
        choices = []
        for place in range(body.get("n", 1)):
            name = (body["prompt"], body.get("seed"), place, self.digest())
            ids = allowed or [2 + derive_seed(*map(str, name), token) % 40 for token in range(body["max_tokens"])]
            logprobs = {"token_logprobs": [logprob] * len(ids) if allowed else self.logprobs(body, ids)}
            choices.append({"index": place, "token_ids": ids, "logprobs": logprobs, "finish_reason": "length"})
        return 200, {"choices": choices}

    def load(self, folder):
        if self.model is not None:
            with self.lock:
                self.model.load_state_dict(load_file(next(Path(folder).iterdir())), strict=False)

    def digest(self):
        return 0 if self.model is None else float(sum(p.detach().double().sum() for p in self.model.parameters()))

    def logprobs(self, body, ids):
        if self.model is None:
            return [self.logprob] * len(ids)
        with self.lock, torch.no_grad():
            logits = self.model(torch.tensor([body["prompt"] + ids])).logits[0, len(body["prompt"]) - 1 : -1]
            return (logits / body["temperature"]).log_softmax(-1)[torch.arange(len(ids)), ids].tolist()
