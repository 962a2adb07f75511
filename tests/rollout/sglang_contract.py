"""A server that speaks SGLang's HTTP API as far as rollout/sglang.py uses it, and checks every request.

Paths, methods, fields, types, flags and pickled names are held against sglang_schema.json, which is extracted
from the real package; a request that does not fit is recorded in `violations` and refused. What it answers
(the session around an update, pauses, whose stop tokens count) follows the sources of that version.
It has no model: tokens are numbers made of seed and weights. Run as a script it is `sglang.launch_server`.
"""

from __future__ import annotations

import argparse
import base64
import builtins
import hashlib
import io
import json
import pickle
import subprocess
import sys
import threading
import typing
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

SCHEMA = json.loads((Path(__file__).parent / "sglang_schema.json").read_text())
END_OF_TEXT = 2
VOCABULARY = 23
OPEN = ("/health", "/ready", "/metrics")  # need no key: srt/utils/auth.py


class _Names(dict[str, Any]):
    """Names in annotations: typing's, builtins, and Any for SGLang's own classes."""

    def __missing__(self, name: str) -> Any:
        return getattr(typing, name, None) or getattr(builtins, name, None) or typing.Any


def misfit(value: Any, annotation: str) -> str:
    """Empty where the JSON value fits the annotation, else what does not."""
    if "Base64Bytes()" in annotation:
        return "" if all(base64.b64decode(part, validate=True) for part in value) else "empty message"
    annotation = annotation.removeprefix("Annotated[").split(", PlainValidator")[0]
    wanted = eval(annotation, {}, _Names())  # of the committed schema
    return "" if _fits(value, wanted) else f"{json.dumps(value)[:80]} is no {annotation}"


def _fits(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is typing.Any:
        return True
    if origin is typing.Union:
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, set):
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, arguments[1]) for one in value.values())
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is wanted


class Unpickler(pickle.Unpickler):
    """Loads what SGLang's own would load."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in SCHEMA["unpickled"]:
            raise RuntimeError(f"Blocked unsafe global ({module}.{name})")
        return super().find_class(module, name)


class Contract:
    """The server's state, and what each path does."""

    def __init__(self, key: str, tp: int = 1, repeatable: bool = True) -> None:
        self.key, self.tp, self.repeatable = key, tp, repeatable
        self.violations: list[str] = []
        self.paths: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "default"
        self.paused = self.asleep = self.session = False
        self.lose_bytes = False  # damages what arrives
        self.groups: dict[str, Any] = {}
        self.hold = threading.Event()  # cleared: requests wait, until they are aborted
        self.hold.set()
        self.aborts = 0

    def handle(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        """(status, JSON answer). Raises AssertionError on what SGLang would not understand."""
        url = urlsplit(target)
        self.paths.append(url.path)
        assert url.path in SCHEMA["routes"], f"no path {url.path}"
        route = SCHEMA["routes"][url.path]
        assert method in route["methods"], f"{url.path} takes {route['methods']}, not {method}"
        assert set(parse_qs(url.query)) <= set(route["query"]), f"{url.path} has no {url.query}"
        if route["body"] is not None:
            self.check(body, SCHEMA["messages"][route["body"]], route["body"])
        return getattr(self, url.path[1:])(body)

    def check(self, body: Any, fields: dict[str, Any], what: str) -> None:
        assert isinstance(body, dict), f"{what} is {body!r}"
        for name, value in body.items():
            assert name in fields, f"{what} has no field {name}"
            wrong = misfit(value, fields[name]["type"])
            assert not wrong, f"{what}.{name}: {wrong}"
        missing = [name for name, field in fields.items() if field["required"] and name not in body]
        assert not missing, f"{what} lacks {missing}"

    # Generation.

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        single = isinstance(body["input_ids"][0], int)
        prompts = [body["input_ids"]] if single else body["input_ids"]
        given = body["sampling_params"]
        settings = [given] * len(prompts) if isinstance(given, dict) else given
        for one in settings:
            self.check(one, SCHEMA["sampling_params"], "SamplingParams")
            assert one.get("n", 1) == 1, "copies made by n share a seed"
        rids = body.get("rid") or ["0"] * len(prompts)
        assert len(rids) == len(set(rids)) == len(prompts) == len(settings) or single
        assert not self.asleep and not self.paused, "a paused server holds requests back"
        aborts, version = self.aborts, self.version
        while not self.hold.wait(0.01):
            if self.aborts > aborts:
                break
        answers = [
            self.answer(prompt, one, rid, body, aborts < self.aborts, version)
            for prompt, one, rid in zip(prompts, settings, rids, strict=True)
        ]
        return 200, answers[0] if single else answers

    def token(self, *about: object) -> int:
        held = sum(float(tensor.double().sum()) for tensor in self.weights.values())
        digest = hashlib.sha256(repr((held, *about)).encode()).digest()
        return 3 + digest[0] % (VOCABULARY - 3)

    def answer(
        self, prompt: list[int], given: dict[str, Any], rid: str, body: Any, aborted: bool, version: str
    ) -> dict[str, Any]:
        seed = given.get("sampling_seed", 42) if self.repeatable else id(given)
        tokens: list[int] = []
        ended: dict[str, Any] = {"type": "length", "length": given["max_new_tokens"]}
        stops = {END_OF_TEXT, *given.get("stop_token_ids", [])}
        while len(tokens) < given["max_new_tokens"] and not aborted:
            tokens.append(self.token(prompt, seed, len(tokens)))
            if tokens[-1] in stops and not given.get("ignore_eos", False):
                ended = {"type": "stop", "matched": tokens[-1]}
                break
        if aborted:
            ended = {"type": "abort", "message": "Abort in waiting queue"}
        assert ended["type"] in SCHEMA["finish_types"]
        about = {"id": rid, "finish_reason": ended, "prompt_tokens": len(prompt), "weight_version": version}
        if body.get("return_logprob"):
            about["output_token_logprobs"] = [[-token / 8, token, None] for token in tokens]
            scored = [[-token / 16, token, None] for token in prompt[body.get("logprob_start_len", -1) :]]
            scored[0][0] = None  # nothing precedes the first
            about["input_token_logprobs"] = scored
        assert set(about) <= set(SCHEMA["meta_info"])
        return {"output_ids": tokens, "meta_info": about}

    # Control.

    def health(self, body: Any) -> tuple[int, Any]:
        return 503 if self.paused or self.asleep else 200, None

    def model_info(self, body: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.version}

    def pause_generation(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.aborts += body.get("mode", "abort") == "abort"
        self.paused = True
        return 200, {"message": "Generation paused successfully.", "status": "ok"}

    def continue_generation(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.paused = False
        return 200, {"message": "Generation continued successfully.", "status": "ok"}

    def flush_cache(self, body: Any) -> tuple[int, Any]:
        return 200, "Cache flushed."

    def release_memory_occupation(self, body: Any) -> tuple[int, Any]:
        assert self.paused, "released while requests may run"
        self.asleep, self.weights = True, {}
        return 200, None

    def resume_memory_occupation(self, body: Any) -> tuple[int, Any]:
        self.asleep = False
        return 200, None

    def update_weight_version(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.version = body["new_version"]
        return 200, {"success": True, "message": "", "new_version": self.version}

    # Weights.

    @staticmethod
    def outcome(success: bool, message: str) -> tuple[int, Any]:
        return (200 if success else 400), {"success": success, "message": message}

    def begin_weight_update(self, body: Any) -> tuple[int, Any]:
        if self.session:
            return self.outcome(False, "a weight-update session is already open")
        self.session = True
        return self.outcome(True, "Success")

    def end_weight_update(self, body: Any) -> tuple[int, Any]:
        if not self.session:
            return self.outcome(False, "no weight-update session is open")
        self.session = False
        return self.outcome(True, "Success")

    def load(self, flat: torch.Tensor, metadata: list[tuple[str, torch.dtype, torch.Size, int, int]]) -> None:
        """As FlattenedTensorBucket.reconstruct_tensors does, copied as load_weights does."""
        assert self.paused and not self.asleep
        for name, dtype, shape, start, end in metadata:
            assert start % dtype.itemsize == 0, f"{name} is not aligned"
            self.weights[name] = flat[start:end].view(dtype).reshape(shape).clone()
            if self.lose_bytes:
                self.weights[name].view(-1)[0] = 0

    def update_weights_from_tensor(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.session:
            return self.outcome(False, "update_weights_from_tensor must run between begin and end")
        messages = body["serialized_named_tensors"]
        assert len(messages) == self.tp and body["load_format"] == "flattened_bucket"
        loaded = Unpickler(io.BytesIO(base64.b64decode(messages[0]))).load()
        assert all(set(vars(one)) == set(SCHEMA["metadata_read"]) for one in loaded["metadata"])
        assert all(one.numel == one.end_idx - one.start_idx for one in loaded["metadata"])
        places = [(m.name, m.dtype, m.shape, m.start_idx, m.end_idx) for m in loaded["metadata"]]
        self.load(loaded["flattened_tensor"], places)
        return self.outcome(True, "Success")

    def init_weights_update_group(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.groups[body["group_name"]] = Peer(body)
        return self.outcome(True, "Succeeded to initialize custom process group.")

    def destroy_weights_update_group(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["group_name"] not in self.groups:
            return self.outcome(False, "The group to be destroyed does not exist.")
        self.groups.pop(body["group_name"]).close()
        return self.outcome(True, "Succeeded to destroy custom process group.")

    def update_weights_from_distributed(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.session:
            return self.outcome(False, "update_weights_from_distributed must run between begin and end")
        places, start = [], 0
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            kind = getattr(torch, dtype)
            end = start + torch.Size(shape).numel() * kind.itemsize
            places.append((name, kind, torch.Size(shape), start, end))
            start = end
        self.load(self.groups[body["group_name"]].receive(start), places)
        return self.outcome(True, "Succeeded to update parameter online.")


class Peer:
    """The server's rank of an update group: a process, as one process cannot be both ends."""

    def __init__(self, body: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--peer", json.dumps(body)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdin is not None
        self.said, self.told = self.process.stdout, self.process.stdin
        assert self.said.readline() == b"joined\n"

    def receive(self, size: int) -> torch.Tensor:
        self.told.write(f"{size}\n".encode())
        self.told.flush()
        return torch.frombuffer(bytearray(self.said.read(size)), dtype=torch.uint8)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def peer(body: dict[str, Any]) -> None:
    """Joins as init_custom_process_group does, and hands on what is broadcast."""
    store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False)
    group, _ = c10d._new_process_group_helper(
        body["world_size"],
        body["rank_offset"],
        [],
        dist.Backend(body["backend"]),
        dist.PrefixStore(body["group_name"], store),
        group_name=body["group_name"],
        timeout=timedelta(seconds=20),
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(body["world_size"])}
    sys.stdout.buffer.write(b"joined\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin:
        flat = torch.empty(int(line), dtype=torch.uint8)
        dist.broadcast(flat, src=0, group=group)
        sys.stdout.buffer.write(flat.numpy().tobytes())
        sys.stdout.buffer.flush()


def serve(contract: Contract, port: int = 0) -> ThreadingHTTPServer:
    """Serves on the loopback interface from a thread; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *about: object) -> None: ...

        def respond(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            status, answer = 401, {"error": "Unauthorized"}
            if path.startswith(OPEN) or self.headers.get("Authorization") == f"Bearer {contract.key}":
                try:
                    status, answer = contract.handle(self.command, self.path, json.loads(raw or "null"))
                except Exception as error:  # the test has to learn of it, not this thread
                    contract.violations.append(f"{type(error).__name__}: {error}")
                    status, answer = 422, {"error": str(error)}
            content = json.dumps(answer).encode() if answer is not None else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = respond

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(arguments: list[str]) -> None:
    """The arguments of `python -m sglang.launch_server`, with types as the schema has them."""
    if arguments[0] == "--peer":
        peer(json.loads(arguments[1]))
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for about in SCHEMA["flags"].values():
        if about["type"] == "bool":
            parser.add_argument(about["flag"], action="store_true")
        else:
            parser.add_argument(about["flag"], type={"int": int, "float": float}.get(about["type"], str))
    at = arguments.index("--config")
    config = json.loads(Path(arguments[at + 1]).read_text())  # JSON is YAML
    filed = [part for key, value in config.items() for part in (f"--{key}", str(value))]
    given = parser.parse_args(filed + arguments[:at] + arguments[at + 2 :])
    print(f"serving {given.model_path} on port {given.port}", flush=True)
    if "broken" in str(given.model_path):
        sys.exit("RuntimeError: this model cannot be loaded")
    serve(Contract(given.api_key, given.tp_size, given.enable_deterministic_inference), given.port)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
