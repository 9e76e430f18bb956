"""vLLM on a server: its OpenAI-compatible API, and the endpoints that it adds in development mode."""

import functools
import http.client
import json
import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ...logging import EVERY_RANK, get_logger
from .client import Sample
from .weights import write_weights
from .worker import EXTENSION


logger = get_logger(__name__)

ADAPTER = "grpo_trl"
"""The adapter's name on the server."""
CONCURRENCY = 256
"""Requests that are under way at a time; the server batches them."""
RETRY_SECONDS = 1.0
HEALTH = "/health"
HEALTH_SECONDS = 5.0
COMMAND = (
    f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --worker-extension-cls {EXTENSION}"
)
ADAPTER_COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    "--enable-lora --max-lora-rank RANK"
)


Result = TypeVar("Result")


class ServerGone(ConnectionError):
    """The server does not answer, or has lost what it was given."""


class VLLMServer:
    """A client of `vllm serve`, also of `trl vllm-serve`.

    A server that goes away is waited for, `timeout` seconds at most; when it is back it gets the last weights or adapter
    again, and what was lost is sampled again.

    Args:
        url: Of the server, e.g. `"http://127.0.0.1:8000"`.
        timeout: Seconds that a server may take to answer `/health`.
        folder: Where weights and adapters are written; the server reads them there.
        device: Of the trainer; on CUDA, weights go over NCCL to a server that was started for it.
        group_port: Of the NCCL group.
        writes: Whether this rank writes weights and has the server load them; the others do so only after a restart.

    Raises:
        ConnectionError: Nothing answers there within `timeout`.
        ValueError: The server reports logprobs of another distribution than the one it samples from.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        folder: Path,
        device: torch.device | None = None,
        group_port: int = 51216,
        *,
        writes: bool = True,
    ):
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._folder = folder
        self._device = device
        self._group_port = group_port
        self._writes = writes
        self._loads = 0
        self._restore: Callable[[], None] = lambda: None
        self._nccl: Any = None
        self._wait()
        card = self._get("/v1/models")["data"][0]
        self.name: str = card["id"]
        self.max_model_length: int = card["max_model_len"]
        self._model = self.name
        self._check_logprobs()
        self._identity = self._started()

    def generate(self, prompt_ids: list[list[int]], params: list[dict[str, Any]]) -> list[list[Sample]]:
        requests = list(zip(prompt_ids, params, strict=True))
        threads = ThreadPoolExecutor(min(CONCURRENCY, len(requests)))
        try:
            return self._surviving(lambda: self._complete_all(requests, threads))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._loads += 1
        folder = self._folder / f"weights-{self._loads}"
        if self._takes_nccl:
            if self._writes:
                self._broadcast(weights)
            self._restore = _cannot_restore
            self._identity = self._started()
            return
        if self._writes:
            write_weights(weights, folder)
        self._send(partial(self._load_files, folder))
        if self._writes:
            shutil.rmtree(self._folder / f"weights-{self._loads - 1}", ignore_errors=True)

    def load_adapter(self, folder: Path) -> None:
        self._model = ADAPTER
        self._send(partial(self._load_adapter, folder))

    def close(self) -> None:
        if self._nccl is not None:
            self._nccl.close_communicator()

    # ---- Sampling ----
    def _complete_all(self, requests: list[Any], threads: ThreadPoolExecutor) -> list[list[Sample]]:
        """All requests, from one process of the server: another one would not have the weights."""
        samples = list(threads.map(lambda one: self._complete(*one), requests))
        if self._started() != self._identity:
            raise ServerGone(f"The vLLM server at {self.url} has been restarted")
        return samples

    def _complete(self, prompt_ids: list[int], params: dict[str, Any]) -> list[Sample]:
        body = {
            "model": self._model,
            "prompt": prompt_ids,
            "return_token_ids": True,
            "skip_special_tokens": False,
            **params,
        }
        choices = self._post("/v1/completions", body)["choices"]
        return [_sample(choice) for choice in sorted(choices, key=lambda choice: int(choice["index"]))]

    def _check_logprobs(self) -> None:
        """With one token allowed, the distribution that is sampled from has one token, whose logprob is 0."""
        params = {"max_tokens": 1, "allowed_token_ids": [0], "temperature": 1.0, "logprobs": 0, "ignore_eos": True}
        (sample,) = self._complete([0], params)
        if sample.logps and abs(sample.logps[0]) > 1e-6:
            raise ValueError(
                f"The vLLM server at {self.url} reports logprobs before temperature and top_p, which say nothing of the "
                "distribution it samples from. Start it with --logprobs-mode processed_logprobs."
            )

    # ---- Weights ----
    def _send(self, restore: Callable[[], None]) -> None:
        """Have the server load something, now and whenever it was restarted."""

        def work() -> None:
            if self._writes:
                restore()
            self._identity = self._started()

        self._restore = restore
        self._surviving(work)

    def _load_files(self, folder: Path) -> None:
        self._development("/collective_rpc", {"method": "load_policy_files", "args": [str(folder)]}, COMMAND)
        self._drop_cache(COMMAND)

    def _load_adapter(self, folder: Path) -> None:
        # From a path of its own: prefix-cache blocks of the same path are not invalidated.
        body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
        self._development("/v1/load_lora_adapter", body, ADAPTER_COMMAND)
        self._drop_cache(ADAPTER_COMMAND)

    def _drop_cache(self, command: str) -> None:
        if not (self._development("/reset_prefix_cache", {}, command) or {"success": True})["success"]:
            raise RuntimeError(
                f"The vLLM server at {self.url} could not drop its prefix cache: it is serving other requests. Use a "
                "server for this run alone."
            )

    @functools.cached_property
    def _takes_nccl(self) -> bool:
        """Whether weights go from GPU to GPU: the trainer has one, and the server was started for it."""
        if self._device is None or self._device.type != "cuda":
            return False
        info = self._development("/server_info?config_format=json", None, COMMAND)
        return bool(info["vllm_config"].get("weight_transfer_config"))

    def _broadcast(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        if self._nccl is None:
            from trl.generation.vllm_client import VLLMClient

            self._nccl = VLLMClient(self.url, group_port=self._group_port, connection_timeout=self._timeout)
            self._nccl.init_communicator(self._device)
        with self._nccl.weight_update():
            for name, tensor in weights:
                self._nccl.update_named_param(name, tensor)
        self._nccl.reset_prefix_cache()

    # ---- HTTP ----
    def _surviving(self, work: Callable[[], Result]) -> Result:
        """`work()`, again whenever the server went away in the middle and is back with what it had.

        Raises:
            ConnectionError: It has been away, or failing, for `timeout` seconds.
        """
        failing_since: float | None = None
        while True:
            try:
                if failing_since is not None:
                    self._wait()
                    self._restore()
                    self._identity = self._started()
                return work()
            except ServerGone as error:
                now = time.monotonic()
                failing_since = now if failing_since is None else failing_since
                if now - failing_since > self._timeout:
                    raise ConnectionError(f"{error}, for vllm_server_timeout={self._timeout:g} s.") from error
                logger.warning("%s; waiting for it, to sample again from the current weights.", error, extra=EVERY_RANK)
                time.sleep(RETRY_SECONDS)

    def _wait(self) -> None:
        start = time.monotonic()
        while True:
            try:
                self._call("GET", HEALTH, None, timeout=HEALTH_SECONDS)
                return
            except ServerGone as error:
                if time.monotonic() - start > self._timeout:
                    raise ConnectionError(
                        f"No vLLM server answers at {self.url} (vllm_server_timeout={self._timeout:g} s): {error}. Start "
                        f"one with `{COMMAND}`, or set vllm_server_base_url to where it is."
                    ) from error
            time.sleep(RETRY_SECONDS)

    def _is_healthy(self) -> bool:
        """Whether the engine behind the API is alive; where it is not, the server is about to end."""
        try:
            self._call("GET", HEALTH, None, timeout=HEALTH_SECONDS)
        except (ServerGone, RuntimeError):
            return False
        return True

    def _started(self) -> str | None:
        """What changes when the server is restarted; None if it does not say."""
        metrics = self._call("GET", "/metrics", None)
        return next((line for line in metrics.splitlines() if line.startswith("process_start_time_seconds ")), None)

    def _development(self, path: str, body: dict[str, Any] | None, command: str) -> Any:
        try:
            return self._get(path) if body is None else self._post(path, body)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\nThe server must have been started with `{command}`.") from error

    def _get(self, path: str) -> Any:
        return json.loads(self._call("GET", path, None))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._call("POST", path, body)
        return json.loads(answer) if answer.startswith(("{", "[")) else None

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout: float | None = None) -> str:
        """One request.

        Raises:
            ServerGone: Nothing answers, or what answers is not up yet, has lost its engine, or no longer knows the adapter.
            RuntimeError: The server refuses the request.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=timeout)
        try:
            connection.connect()
            _keep_alive(connection.sock)
            payload = None if body is None else json.dumps(body)
            connection.request(method, parts.path + path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise ServerGone(f"The vLLM server at {self.url} does not answer ({error!r})") from error
        finally:
            connection.close()
        lost = response.status == 404 and body is not None and body.get("model") == ADAPTER
        broken = response.status == 500 and path != HEALTH and not self._is_healthy()
        if response.status in (502, 503, 504) or lost or broken:
            raise ServerGone(f"The vLLM server at {self.url} has gone or was restarted (HTTP {response.status})")
        if response.status != 200:
            raise RuntimeError(
                f"The vLLM server at {self.url} answers {path} with HTTP {response.status}: {text[:500]}"
            )
        return text


def _sample(choice: dict[str, Any]) -> Sample:
    logps = (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]
    return Sample(
        choice["token_ids"],
        [math.nan if logp is None else logp for logp in logps],
        ended=choice["finish_reason"] == "stop",
    )


def _keep_alive(connection: socket.socket) -> None:
    """Notice within two minutes that a machine is gone: a request waits as long as its sampling takes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _cannot_restore() -> None:
    raise RuntimeError(
        "The vLLM server was restarted, and is no longer in the NCCL group that carries weights. Resume from the last "
        "checkpoint."
    )
