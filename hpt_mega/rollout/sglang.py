"""An SGLang server as an engine of the fleet: launched by us or found at a URL, spoken to over HTTP.

How weights are packed is in sglang_wire.py. sglang is not imported: its server is a process of its own. What
is relied on was read from sglang 0.5.23; tools/sglang_schema.py extracts it from a wheel for the tests.
"""

from __future__ import annotations

import json
import operator
import os
import secrets
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from hpt_mega.process import OwnedProcess, free_port, tail
from hpt_mega.resharding.assembly import Assembly
from hpt_mega.resharding.manifest import TransferError
from hpt_mega.resharding.network import BroadcastGroup, Meeting
from hpt_mega.resharding.planner import Plan
from hpt_mega.resharding.transport import SharedBuckets
from hpt_mega.rollout import sglang_wire as wire
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.exchange import ExchangeError, exchange, reading

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REQUESTS_AT_ONCE = 64
_POLL_S = 0.25
_LOG_LINES = 12


@dataclass(frozen=True)
class Launch:
    """How our own server is started. The model's folder gives the shape; an update replaces its weights."""

    model: Path
    dtype: str  # SGLang's name: bfloat16, float32
    max_model_len: int
    max_sequences: int
    memory_share: float  # of the GPU: weights and KV cache
    repeatable: bool  # seeds fix every draw, whatever the batch; the kernels for it are slower
    sleeps: bool = False  # can give its memory back
    environment: dict[str, str] = field(default_factory=dict)  # e.g. CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class Settings:
    """What both kinds of server need. Deadlines in seconds."""

    tp: int
    weights: Literal["memory", "broadcast"]  # same host, or any host through a process group
    request_s: float
    update_s: float  # of each step of an update
    control_s: float  # of what moves no weights
    group_host: str = "127.0.0.1"  # our address as the server's ranks reach it, for "broadcast"
    group_backend: str = "nccl"


class SGLangEngine:
    """One server; an EngineHandle and its client. Give `launch`, or `url` and `key` of a server that runs.

    Raises ValueError where both or neither are given, or where weights are to go through the memory of
    another host.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        log: Path,
        *,
        launch: Launch | None = None,
        url: str = "",
        key: str = "",
    ) -> None:
        if (launch is None) == (url == ""):
            raise ValueError(f"engine {name}: give either launch or url")
        parts = urlsplit(url)
        if url and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError(f"engine {name}: url is {url!r}, expected http://HOST:PORT")
        if url and settings.weights == "memory" and parts.hostname not in _LOOPBACK:
            raise ValueError(
                f"engine {name}: weights go through the memory of this host and the server is at "
                f"{parts.hostname}; use broadcast"
            )
        self.name = name
        self._settings, self._log, self._launch = settings, log, launch
        self._url, self._key = url, key
        self._process: OwnedProcess | None = None
        self._version: int | None = None
        self._awake = True  # and not paused: a health check is answered by generating a token
        self._asleep = False
        self._session = False  # a weight update was begun and not ended
        self._group: BroadcastGroup | None = None
        self._plan: Plan | None = None
        self._shared: SharedBuckets | None = None
        self._assembly = Assembly()

    # The life of the server.

    @property
    def client(self) -> SGLangEngine:
        return self

    def start(self, deadline_s: float) -> None:
        """Launch the server, or find it, and wait until it answers to our key. Raises EngineError."""
        self.close()
        must_end_by = time.monotonic() + deadline_s
        if self._launch is None:
            self._await_answer(must_end_by, deadline_s)
            return
        self._key = secrets.token_hex(24)
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        config = self._log.with_suffix(".key.yaml")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        config.unlink(missing_ok=True)
        # not an argument: those any user of the machine can list
        with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"api-key": self._key}, file)
        command, environment = self._command(self._launch, port, config), self._environment(self._launch)
        self._process = process = OwnedProcess(command, environment, self._log)
        try:
            self._await_answer(must_end_by, deadline_s)
        except EngineError:
            process.close()
            raise
        finally:
            config.unlink(missing_ok=True)

    def alive(self) -> str:
        """Empty while the server does its work, by generating a token where it is not paused."""
        if self._process is not None and (ended := self._process.ended()):
            return ended
        if self._process is None and self._launch is not None:
            return "not started"
        try:
            self._request("GET", "/health" if self._awake else "/model_info", None, self._settings.control_s)
        except EngineError as error:
            return str(error).splitlines()[0]
        return ""

    def log_tail(self, lines: int) -> str:
        """The end of our server's log; a server at a URL keeps its own."""
        return tail(self._log, lines, self._key)

    def close(self) -> None:
        """End our server. One at a URL runs on, without our group."""
        self._leave_group()
        process, self._process = self._process, None
        self._version, self._session, self._awake, self._asleep = None, False, True, False
        if process is not None:
            process.close()

    # Rollouts.

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        """`sampling.n` samples a prompt; sample j of prompt i has seed sampling.seed + i * n + j."""
        version = self._version
        if version is None:
            raise self._error("has no weights to sample with: its last update failed, or it had none")
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix=self.name) as pool:
            asked = [
                pool.submit(self._sample, prompt, sampling, sampling.seed + index * sampling.n, version)
                for index, prompt in enumerate(prompts)
            ]
            return [one.result() for one in asked]

    def logp(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """Log-probabilities of the response's tokens at temperature 1, under the engine's weights."""
        body = {
            "input_ids": [*prompt, *response],
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = self._post("/generate", body, self._settings.request_s)
        with reading("/generate", self._error):
            scored = answer["meta_info"]["input_token_logprobs"][len(prompt) :]
            if [entry[1] for entry in scored] != list(response):
                raise self._error("scored other tokens than it was given")
            return [float(entry[0]) for entry in scored]

    def abort(self) -> None:
        """End every request: its generate raises EngineError. Nothing is generated before the next update."""
        self._version, self._awake = None, False
        self._post("/pause_generation", {"mode": "abort"}, self._settings.update_s)

    def _sample(
        self, prompt: Sequence[int], sampling: SamplingParams, seed: int, version: int
    ) -> list[Sample]:
        """One request with n copies of the prompt: copies made by SGLang's own `n` would share a seed."""
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(sampling.stop_tokens),
            "ignore_eos": not sampling.stop_tokens,  # it would ignore our stop tokens too
        }
        body = {
            "rid": [uuid.uuid4().hex for _ in range(sampling.n)],
            "input_ids": [list(prompt)] * sampling.n,
            "sampling_params": [common | {"sampling_seed": (seed + j) % 2**62} for j in range(sampling.n)],
            "return_logprob": True,
        }
        answers = self._post("/generate", body, self._settings.request_s)
        with reading("/generate", self._error):
            return [self._read(one, sampling, version) for one in answers]

    def _read(self, answer: dict[str, Any], sampling: SamplingParams, version: int) -> Sample:
        about = answer["meta_info"]
        ended = about["finish_reason"]
        if ended["type"] not in ("stop", "length"):
            raise self._error(f"gave a request up: {ended.get('message') or ended}")
        drawn = [(float(entry[0]), operator.index(entry[1])) for entry in about["output_token_logprobs"]]
        logp, tokens = zip(*drawn, strict=True)
        if list(tokens) != answer["output_ids"]:
            raise self._error(f"gave {len(answer['output_ids'])} tokens and {len(tokens)} log-probabilities")
        if ended["type"] == "stop" and tokens[-1] not in sampling.stop_tokens:
            raise self._error(
                f"stopped at token {tokens[-1]}, its model's end of text; add it to stop_tokens "
                f"{sampling.stop_tokens}, as SGLang stops at both"
            )
        versions = {str(span["version"]) for span in about.get("weight_versions", [])}
        versions.add(str(about["weight_version"]))
        if versions != {str(version)}:
            raise self._error(f"sampled with weights of {sorted(versions)}, expected {version}")
        return Sample(tokens, logp, ended["type"] == "stop", version)

    # Weights.

    def connect(self, path: str, plan: Plan) -> None:
        self._plan, self._shared = plan, SharedBuckets(path, plan.bucket_bytes)

    def begin_update(self) -> None:
        """End what is in flight and begin the session that SGLang takes weights in.

        Until finish_update has returned the server stays paused and reports the version "unverified".
        """
        update_s = self._settings.update_s
        if self._asleep:
            self._request("POST", "/resume_memory_occupation", {}, update_s)
            self._asleep = False
        self.abort()
        self._label("unverified")
        if self._session:  # it begins none before the last is ended
            self._post("/end_weight_update", {}, update_s)
        self._post("/begin_weight_update", {"selector": "all"}, update_s)
        self._session, self._assembly = True, Assembly()

    def load(self, index: int, checksums: Sequence[str]) -> None:
        """Send on what bucket `index` completes; read in our own process, so that checksums say nothing."""
        if self._plan is None or self._shared is None:
            raise self._error("was not told what weights will come; connect comes first")
        bucket = self._plan.buckets[index]
        try:
            if tensors := wire.aligned(self._assembly.take(bucket, self._shared.buffer(index))):
                self._send(tensors)
        except EngineError:
            self._leave_group()  # a broadcast that was given up leaves it unusable
            raise

    def finish_update(self, policy_version: int) -> None:
        self._post("/end_weight_update", {}, self._settings.update_s)
        self._session = False
        self._request("POST", "/flush_cache", None, self._settings.control_s)
        self._label(str(policy_version))
        self._post("/continue_generation", {}, self._settings.control_s)
        self._version, self._awake = policy_version, True

    def sleep(self) -> None:
        """Give the GPU's memory back, weights and cache; begin_update takes it again."""
        self.abort()
        self._asleep = True
        self._request("POST", "/release_memory_occupation", {}, self._settings.update_s)

    def _send(self, tensors: list[tuple[str, wire.Tensor]]) -> None:
        flat = wire.flatten(tensors)
        common = {"load_format": wire.LOAD_FORMAT, "flush_cache": False}
        if self._settings.weights == "memory":
            # a message for each rank: one handle must not be opened twice
            messages = [wire.serialize(tensors, flat) for _ in range(self._settings.tp)]
            body = common | {"serialized_named_tensors": messages}
            self._post("/update_weights_from_tensor", body, self._settings.update_s)
            return
        self._group = self._group or self._join()
        body = common | {
            "names": [name for name, _ in tensors],
            "dtypes": [wire.dtype_name(tensor) for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": self._group.name,
        }
        path, update_s = "/update_weights_from_distributed", self._settings.update_s
        try:
            self._group.send(flat, lambda: self._post(path, body, update_s))
        except TransferError as error:
            raise self._error(str(error)) from None

    def _join(self) -> BroadcastGroup:
        """A new group of us and the server's ranks; the server answers when all have met."""
        settings = self._settings

        def invite(meeting: Meeting) -> None:
            body = {
                "master_address": meeting.host,
                "master_port": meeting.port,
                "rank_offset": 1,
                "world_size": meeting.world_size,
                "group_name": meeting.name,
                "backend": meeting.backend,
            }
            self._post("/init_weights_update_group", body, settings.update_s)

        try:
            return BroadcastGroup.open(
                settings.group_host,
                1 + settings.tp,
                f"hpt-{self.name}-{secrets.token_hex(4)}",
                settings.group_backend,
                settings.update_s,
                invite,
            )
        except TransferError as error:
            raise self._error(str(error)) from None

    def _leave_group(self) -> None:
        if self._group is None:
            return
        group, self._group = self._group, None
        with suppress(EngineError):  # a dead server has left already
            self._post("/destroy_weights_update_group", {"group_name": group.name}, self._settings.control_s)
        group.close()

    def _label(self, version: str) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        self._post("/update_weight_version", body, self._settings.control_s)

    # Parts.

    def _command(self, launch: Launch, port: int, config: Path) -> list[str]:
        options = {
            "config": config,
            "model-path": launch.model,
            "host": "127.0.0.1",
            "port": port,
            "dtype": launch.dtype,
            "context-length": launch.max_model_len,
            "max-running-requests": launch.max_sequences,
            "tp-size": self._settings.tp,
            "mem-fraction-static": launch.memory_share,
            "log-level": "warning",
        }
        flags = ["--skip-tokenizer-init"]
        flags += ["--enable-memory-saver"] if launch.sleeps else []
        flags += ["--enable-deterministic-inference"] if launch.repeatable else []
        return [
            *(sys.executable, "-m", "sglang.launch_server"),
            *(str(part) for key, value in options.items() for part in (f"--{key}", value)),
            *flags,
        ]

    @staticmethod
    def _environment(launch: Launch) -> dict[str, str]:
        return {
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",  # log-probabilities at the sampling temperature
        } | launch.environment

    def _await_answer(self, must_end_by: float, deadline_s: float) -> None:
        while True:
            try:
                self._request("GET", "/health", None, self._settings.control_s)
                self._request("GET", "/model_info", None, self._settings.control_s)  # asks for our key
                return
            except EngineError as error:
                if self._process is not None and (ended := self._process.ended()):
                    raise self._error(f"{ended} at its start") from None
                if time.monotonic() > must_end_by:
                    last = str(error).splitlines()[0]
                    raise self._error(f"did not answer within {deadline_s:g} s; {last}") from None
            time.sleep(_POLL_S)

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        said = self._request("POST", path, body, timeout_s)
        with reading(path, self._error):
            answer = json.loads(said or "null")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise self._error(f"refused {path}: {answer.get('message')}")
        return answer

    def _request(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> bytes:
        """One exchange on a connection of its own. Raises EngineError that says what was asked."""
        sent = None if body is None else json.dumps(body)
        try:
            return exchange(self._url, method, path, sent, self._key or "", timeout_s)
        except ExchangeError as error:
            raise self._error(str(error)) from None

    def _error(self, what: str) -> EngineError:
        end = self.log_tail(_LOG_LINES)
        shown = "".join(f"\n  | {line}" for line in end.splitlines())
        return EngineError(
            f"engine {self.name} {what}" + (f"\nlast lines of {self._log}:{shown}" if end else "")
        )
