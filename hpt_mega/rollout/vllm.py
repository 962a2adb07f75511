"""A vLLM server as an engine of the fleet: started, asked, given new weights and ended, over loopback HTTP.

What runs inside vLLM's processes is in vllm_plugin.py and vllm_worker.py. vLLM is not imported here.
"""

from __future__ import annotations

import json
import operator
import os
import secrets
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpt_mega.process import KEEP_MEMORY, OwnedProcess, PortClaim, free_port, tail
from hpt_mega.resharding.planner import Plan
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.exchange import ExchangeError, exchange, reading
from hpt_mega.rollout.vllm_plugin import BACKEND

_GENERATE = "/inference/v1/generate"
_MODULE = "vllm.entrypoints.launchers.api_server.entry"
_REQUESTS_AT_ONCE = 64
_REQUIRE_KEY = "hpt_mega.rollout.vllm_plugin.RequireKey"
_POLL_S = 0.25
_LOOK_S = 5.0  # for an answer during the start
_BEFORE_UPDATES = "default"  # vLLM's name of the weights it was started with
_LOG_LINES = 12


@dataclass(frozen=True)
class ServerSettings:
    """How a server is started. The model's folder gives the shape; the first update replaces its weights."""

    model: Path
    dtype: str  # vLLM's name: bfloat16, float32
    max_model_len: int
    max_sequences: int
    tp: int
    seed: int
    kv_cache_gib: int  # on CPU
    gpu_memory_share: float  # on GPU
    logp_at_temperature: bool  # log-probabilities after temperature (and top-p) instead of before
    sleeps: bool = False  # can give its memory back; on GPU


@dataclass
class VLLMClient:
    """The HTTP client of one vLLM server, of this host. Methods may be called from any thread."""

    name: str  # in messages
    url: str
    key: str = field(repr=False)
    request_deadline_s: float
    update_deadline_s: float  # of each step of an update
    answer_deadline_s: float  # of what neither samples nor moves weights
    log: Path
    _asleep: bool = False

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        """`sampling.n` samples a prompt, stamped with the weights' version. Raises EngineError."""
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix=self.name) as pool:
            asked = [
                pool.submit(self._sample, prompt, sampling, sampling.seed + index * sampling.n)
                for index, prompt in enumerate(prompts)
            ]
            return [one.result() for one in asked]

    def logp(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """Log-probabilities of the response's tokens at temperature 1, under the engine's weights."""
        body = {
            "token_ids": [*prompt, *response],
            "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False},
        }
        answer = self._post(_GENERATE, body, self.request_deadline_s)
        with reading(_GENERATE, self.error):
            scored = zip(response, answer["prompt_logprobs"][len(prompt) :], strict=True)
            return [float(where[str(token)]["logprob"]) for token, where in scored]

    def connect(self, path: str, plan: Plan) -> None:
        """Tell the engine where the trainer's buckets are and what will come through them."""
        info = {"path": path, "plan": plan.describe(), "digest": plan.digest}
        self._post("/init_weight_transfer_engine", {"init_info": info}, self.answer_deadline_s)

    def begin_update(self) -> None:
        """Hold running requests still and make the model ready for new weights."""
        if self._asleep:
            self._post("/wake_up", {}, self.update_deadline_s)
            self._asleep = False
        self._post("/pause?mode=keep", {}, self.update_deadline_s)
        self._post("/start_weight_update", {}, self.update_deadline_s)

    def load(self, index: int, checksums: Sequence[str]) -> None:
        """Have the engine read bucket `index`; returns when it no longer needs the memory."""
        update = {"index": index, "checksums": list(checksums)}
        self._post("/update_weights", {"update_info": update}, self.update_deadline_s)

    def finish_update(self, policy_version: int) -> None:
        """Serve the new weights; what was computed with the old ones is forgotten."""
        self._post("/finish_weight_update", {"weight_version": str(policy_version)}, self.update_deadline_s)
        # requests held still go on from their tokens, computed anew under the new weights
        self._post("/reset_prefix_cache?reset_running_requests=true", {}, self.update_deadline_s)
        self._post("/resume", {}, self.update_deadline_s)

    def abort(self) -> None:
        """End what is being generated; nothing is before the next update."""
        self._post("/pause?mode=abort", {}, self.answer_deadline_s)

    def sleep(self) -> None:
        """Give the GPU's memory back, weights and cache; begin_update takes it again."""
        self._asleep = True
        self._post("/sleep?level=2", {}, self.answer_deadline_s)

    def trouble(self, path: str = "/health", timeout_s: float | None = None) -> str:
        """Empty where the server answers; else what it did instead."""
        try:
            exchange(self.url, "GET", path, None, self.key, timeout_s or self.answer_deadline_s)
        except ExchangeError as error:
            return str(error)
        return ""

    def _sample(self, prompt: Sequence[int], sampling: SamplingParams, seed: int) -> list[Sample]:
        body = {
            "token_ids": list(prompt),
            "sampling_params": {
                "n": sampling.n,
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": seed % 2**62,
                "stop_token_ids": list(sampling.stop_tokens),
                "ignore_eos": True,
                "logprobs": 0,
                "detokenize": False,
            },
        }
        answer = self._post(_GENERATE, body, self.request_deadline_s)
        with reading(_GENERATE, self.error):
            return [self._read(choice) for choice in answer["choices"]]

    def _read(self, choice: dict[str, Any]) -> Sample:
        if choice["finish_reason"] not in ("stop", "length"):
            raise self.error(f"gave a request up: {choice['finish_reason']}")
        tokens = tuple(operator.index(token) for token in choice["token_ids"])
        logp = tuple(float(position["logprob"]) for position in choice["logprobs"]["content"])
        if len(tokens) != len(logp):
            raise self.error(f"gave {len(tokens)} tokens and {len(logp)} log-probabilities")
        versions = [span["version"] for span in choice["weight_versions"]]
        oldest = min(0 if version == _BEFORE_UPDATES else int(version) for version in versions)
        return Sample(tokens, logp, choice["finish_reason"] == "stop", oldest)

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        answer = self._request("POST", path, json.dumps(body), timeout_s)
        with reading(path, self.error):
            return json.loads(answer or "null")

    def _request(self, method: str, path: str, body: str | None, timeout_s: float) -> bytes:
        try:
            return exchange(self.url, method, path, body, self.key, timeout_s)
        except ExchangeError as error:
            raise self.error(str(error)) from None

    def error(self, what: str) -> EngineError:
        end = "".join(f"\n  | {line}" for line in tail(self.log, _LOG_LINES, self.key).splitlines())
        return EngineError(f"engine {self.name} {what}\nlast lines of {self.log}:{end}")


@dataclass
class VLLMServer:
    """One vLLM server process that lives no longer than this one; an EngineHandle."""

    name: str
    settings: ServerSettings
    log: Path
    request_deadline_s: float
    update_deadline_s: float = 120.0
    answer_deadline_s: float = 30.0
    environment: dict[str, str] = field(default_factory=dict)  # e.g. CUDA_VISIBLE_DEVICES
    address: str = "127.0.0.1"  # where it listens
    port: int = 0  # 0: a free one
    key: str = field(default="", repr=False)  # empty: one that only we know
    middleware: tuple[str, ...] = ()
    _key: str = field(default="", repr=False)  # of the server as it was last started
    _port: PortClaim | None = None
    _process: OwnedProcess | None = None
    _client: VLLMClient | None = None

    @property
    def client(self) -> VLLMClient:
        """Raises EngineError where the server was not started."""
        if self._client is None:
            raise EngineError(f"engine {self.name} was not started")
        return self._client

    def start(self, deadline_s: float) -> None:
        """Start the server and wait until it answers. Raises EngineError, with its log's end."""
        self.close()
        must_end_by = time.monotonic() + deadline_s
        key = self._key = self.key or secrets.token_urlsafe(24)
        port = self.port or free_port()
        host = "127.0.0.1" if self.address == "0.0.0.0" else self.address
        client = VLLMClient(
            self.name,
            f"http://{host}:{port}",
            key,
            self.request_deadline_s,
            self.update_deadline_s,
            self.answer_deadline_s,
            self.log,
        )
        try:
            self._port = PortClaim(self.address, port)
        except (OSError, OverflowError) as error:
            raise EngineError(
                f"engine {self.name} was not started: port {port} of {self.address} cannot be had ({error}); "
                "end the server that has it, or choose another port"
            ) from None
        process = OwnedProcess(self._command(port), self._own_environment(key) | self.environment, self.log)
        self._process = process
        # not /health, which anybody's server on a port that was taken meanwhile would answer to our key
        while trouble := client.trouble("/is_paused", timeout_s=_LOOK_S):
            if ended := process.ended():
                raise client.error(f"{ended} at its start")
            if time.monotonic() > must_end_by:
                process.close()
                raise client.error(f"did not answer within {deadline_s:g} s of its start; {trouble}")
            time.sleep(_POLL_S)
        self._client = client

    def alive(self) -> str:
        """Empty while the server runs and answers; else what is wrong."""
        process, client = self._process, self._client
        if process is None or client is None:
            return "not started"
        return process.ended() or client.trouble()

    def log_tail(self, lines: int) -> str:
        return tail(self.log, lines, self._key)

    def close(self) -> None:
        """End the server and all its processes."""
        process, self._process, self._client = self._process, None, None
        port, self._port = self._port, None
        if process is not None:
            process.close()
        if port is not None:
            port.release()

    def _command(self, port: int) -> list[str]:
        settings = self.settings
        options = {
            "model": settings.model,
            "host": self.address,
            "port": port,
            "dtype": settings.dtype,
            "max-model-len": settings.max_model_len,
            "max-num-seqs": settings.max_sequences,
            "tensor-parallel-size": settings.tp,
            "gpu-memory-utilization": settings.gpu_memory_share,
            "seed": settings.seed,
            "generation-config": "vllm",
            "logprobs-mode": "processed_logprobs" if settings.logp_at_temperature else "raw_logprobs",
            "weight-transfer-config": json.dumps({"backend": BACKEND}),
            "uvicorn-log-level": "warning",
        }
        flags = ["--enable-scale-out", "--skip-tokenizer-init", "--no-enable-log-requests"]
        flags += ["--enable-sleep-mode"] if settings.sleeps else []
        if not torch.cuda.is_available():
            # on CPU there are no graphs, and a prompt cut in two ends a worker whose request has a seed
            flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        return [
            *(sys.executable, "-m", _MODULE),
            *(str(part) for key, value in options.items() for part in (f"--{key}", value)),
            # the last one comes first
            *(part for name in (*self.middleware, _REQUIRE_KEY) for part in ("--middleware", name)),
            *flags,
        ]

    def _own_environment(self, key: str) -> dict[str, str]:
        return {
            "VLLM_API_KEY": key,  # not an argument: those any user of the machine can list
            "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that change weights
            "VLLM_CPU_KVCACHE_SPACE": str(self.settings.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own choice leaves cores idle
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.settings.tp)),
            "VLLM_NO_USAGE_STATS": "1",
            **({} if torch.cuda.is_available() else KEEP_MEMORY),  # an update takes that of all weights
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
