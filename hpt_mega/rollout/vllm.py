"""A vLLM server that we own: started, asked for samples, given new weights, and ended, over loopback HTTP.

What runs inside vLLM's processes is in vllm_plugin.py and vllm_worker.py. vLLM is not imported here.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hpt_mega.resharding.planner import Plan
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.exchange import ExchangeError, exchange
from hpt_mega.rollout.process import free_port, tail
from hpt_mega.rollout.vllm_plugin import BACKEND, OWNED

_MODULE = "vllm.entrypoints.launchers.api_server.entry"
_REQUESTS_AT_ONCE = 64
_POLL_S = 0.25
_GRACE_S = 5.0
_BEFORE_UPDATES = "default"  # vLLM's name of the weights it was started with
_LONGEST_ANSWER_S = 30.0  # of the control endpoints that move no weights


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


@dataclass
class VLLMClient:
    """The HTTP client of one vLLM server on this host. Methods may be called from any thread."""

    name: str  # in messages
    port: int
    key: str = field(repr=False)
    request_deadline_s: float
    log: Path

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
        answer = self._post("/inference/v1/generate", body, self.request_deadline_s)
        scored = answer["prompt_logprobs"][len(prompt) :]
        return [where[str(token)]["logprob"] for token, where in zip(response, scored, strict=True)]

    def connect(self, path: str, plan: Plan) -> None:
        """Tell the engine where the trainer's buckets are and what will come through them."""
        info = {"path": path, "plan": plan.describe(), "digest": plan.digest}
        self._post("/init_weight_transfer_engine", {"init_info": info}, _LONGEST_ANSWER_S)

    def begin_update(self) -> None:
        """Hold running requests still and make the model ready for new weights."""
        self._post("/pause?mode=keep", {}, _LONGEST_ANSWER_S)
        self._post("/start_weight_update", {}, _LONGEST_ANSWER_S)

    def load(self, index: int, checksums: Sequence[str]) -> None:
        """Have the engine read bucket `index`; returns when it no longer needs the memory."""
        update = {"index": index, "checksums": list(checksums)}
        self._post("/update_weights", {"update_info": update}, self.request_deadline_s)

    def finish_update(self, policy_version: int) -> None:
        """Serve the new weights; what was computed with the old ones is forgotten."""
        self._post("/finish_weight_update", {"weight_version": str(policy_version)}, self.request_deadline_s)
        # requests held still go on from their tokens, computed anew under the new weights
        self._post("/reset_prefix_cache?reset_running_requests=true", {}, _LONGEST_ANSWER_S)
        self._post("/resume", {}, _LONGEST_ANSWER_S)

    def answers(self) -> bool:
        try:
            self._request("GET", "/health", None, timeout_s=5.0)
        except EngineError:
            return False
        return True

    def log_tail(self, lines: int = 12) -> str:
        return "\n".join(f"  | {line}" for line in tail(self.log, lines).splitlines())

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
        answer = self._post("/inference/v1/generate", body, self.request_deadline_s)
        return [_read(choice) for choice in answer["choices"]]

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        return json.loads(self._request("POST", path, json.dumps(body), timeout_s) or "null")

    def _request(self, method: str, path: str, body: str | None, timeout_s: float) -> bytes:
        try:
            return exchange(f"http://127.0.0.1:{self.port}", method, path, body, self.key, timeout_s)
        except ExchangeError as error:
            raise self.error(str(error)) from None

    def error(self, what: str) -> EngineError:
        return EngineError(f"engine {self.name} {what}\nlast lines of {self.log}:\n{self.log_tail()}")


@dataclass
class VLLMServer:
    """One vLLM server process that lives no longer than this one; `client` talks to it once it is started."""

    name: str
    settings: ServerSettings
    log: Path
    request_deadline_s: float
    environment: dict[str, str] = field(default_factory=dict)  # e.g. CUDA_VISIBLE_DEVICES
    _process: subprocess.Popen[bytes] | None = None
    _client: VLLMClient | None = None

    @property
    def client(self) -> VLLMClient:
        """Raises EngineError where the server was not started."""
        if self._client is None:
            raise EngineError(f"engine {self.name} was not started")
        return self._client

    def start(self, deadline_s: float) -> None:
        """Start the server and wait until it answers. Raises EngineError, with its log's end.

        Call it from a thread that lives as long as the server: the kernel ends the server with that thread.
        """
        self.close()
        client = VLLMClient(
            self.name, free_port(), secrets.token_urlsafe(24), self.request_deadline_s, self.log
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(client.port),
                env=os.environ | self._own_environment(client.key) | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        waiting_until = time.monotonic() + deadline_s
        while not client.answers():
            if self._process.poll() is not None:
                raise client.error(f"ended at its start with exit code {self._process.returncode}")
            if time.monotonic() > waiting_until:
                self.close()
                raise client.error(f"did not answer within {deadline_s:.0f} s of its start")
            time.sleep(_POLL_S)
        self._client = client

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def alive(self) -> str:
        """Empty while the server runs and answers; else what is wrong."""
        if self._process is None:
            return "not started"
        if self._process.poll() is not None:
            return f"ended with exit code {self._process.returncode}"
        return "" if self.client.answers() else "does not answer"

    def close(self) -> None:
        """End the server and all its processes."""
        if self._process is None:
            return
        for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(wait_s)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._process = self._client = None

    def _command(self, port: int) -> list[str]:
        settings = self.settings
        options = {
            "model": settings.model,
            "host": "127.0.0.1",
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
            "middleware": "hpt_mega.rollout.vllm_plugin.RequireKey",
            "uvicorn-log-level": "warning",
        }
        flags = ["--enable-scale-out", "--skip-tokenizer-init", "--no-enable-log-requests"]
        if not torch.cuda.is_available():
            # on CPU there are no graphs, and a prompt cut in two ends a worker whose request has a seed
            flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        return [
            *(sys.executable, "-m", _MODULE),
            *(str(part) for key, value in options.items() for part in (f"--{key}", value)),
            *flags,
        ]

    def _own_environment(self, key: str) -> dict[str, str]:
        return {
            OWNED: "1",
            "VLLM_API_KEY": key,  # not an argument: those any user of the machine can list
            "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that change weights
            "VLLM_CPU_KVCACHE_SPACE": str(self.settings.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own choice leaves cores idle
            "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.settings.tp)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }


def _read(choice: dict[str, Any]) -> Sample:
    logp = tuple(position["logprob"] for position in choice["logprobs"]["content"])
    versions = [span["version"] for span in choice["weight_versions"]]
    oldest = min(0 if version == _BEFORE_UPDATES else int(version) for version in versions)
    return Sample(tuple(choice["token_ids"]), logp, choice["finish_reason"] == "stop", oldest)
