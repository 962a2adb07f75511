"""Extracts from an sglang wheel what rollout/sglang.py relies on, as JSON: routes, request fields, flags.

The package is read as syntax trees and never imported: it needs a GPU's libraries. The tests hold every
request against the committed result; run this on a newer wheel to see what changed:

    pip download --no-deps sglang
    python tools/sglang_schema.py sglang-*.whl --out tests/rollout/sglang_schema.json
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROUTES = (
    "/health",
    "/model_info",
    "/generate",
    "/flush_cache",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/begin_weight_update",
    "/end_weight_update",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weight_version",
)
FLAGS = (
    "model_path",
    "host",
    "port",
    "api_key",
    "dtype",
    "context_length",
    "max_running_requests",
    "tp_size",
    "mem_fraction_static",
    "skip_tokenizer_init",
    "enable_deterministic_inference",
    "enable_memory_saver",
    "log_level",
)
HTTP = "sglang/srt/entrypoints/http_server.py"
MESSAGES = "sglang/srt/managers/io_struct.py"
ENVIRONMENT = ("SGLANG_RETURN_ORIGINAL_LOGPROB",)


class Wheel:
    """The modules of a wheel, parsed."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self.version = path.name.split("-")[1]

    def tree(self, module: str) -> ast.Module:
        return ast.parse(self._zip.read(module))

    def struct(self, module: str, name: str) -> dict[str, dict[str, Any]]:
        """The fields of a class and of its bases in the module: {field: {type, required}}."""
        classes = {node.name: node for node in self.tree(module).body if isinstance(node, ast.ClassDef)}
        if name not in classes:
            raise LookupError(f"{module} has no class {name}")
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name) and base.id in classes]
        fields = {key: value for base in bases for key, value in self.struct(module, base).items()}
        for node in classes[name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                annotation = ast.unparse(node.annotation)
                fields[node.target.id] = {"type": annotation, "required": node.value is None}
        return fields

    def routes(self) -> dict[str, dict[str, Any]]:
        """{path: {methods, body: class or None, query: [names]}} of the native API."""
        found: dict[str, dict[str, Any]] = {}
        for node in self.tree(HTTP).body:
            if isinstance(node, ast.AsyncFunctionDef):
                for decorator in node.decorator_list:
                    if path := _path(decorator):
                        found[path] = {"methods": _methods(decorator), **_arguments(node)}
        return found

    def flags(self) -> dict[str, dict[str, str]]:
        """{field: {flag, type}} of the server's arguments."""
        found: dict[str, dict[str, str]] = {}
        folder = "sglang/srt/arg_groups/fields/"
        for module in (name for name in self._zip.namelist() if re.fullmatch(folder + r"\w+\.py", name)):
            for node in (n for n in self.tree(module).body if isinstance(n, ast.ClassDef)):
                for field, about in self.struct(module, node.name).items():
                    given = re.search(r"cli_name='(--[\w-]+)'", about["type"])
                    flag = given[1] if given else "--" + field.replace("_", "-")
                    kind = re.match(r"A\[(?:Optional\[)?(\w+)", about["type"])
                    found[field] = {"flag": flag, "type": kind[1] if kind else about["type"]}
        return found

    def unpickled(self) -> list[str]:
        """Globals that the server lets a serialised tensor name."""
        for node in ast.walk(self.tree("sglang/srt/utils/common.py")):
            if isinstance(node, ast.ClassDef) and node.name == "SafeUnpickler":
                for part in node.body:
                    if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "ALLOWED_GLOBALS":
                        return sorted(".".join(pair) for pair in ast.literal_eval(part.value))
        raise LookupError("sglang/srt/utils/common.py has no SafeUnpickler.ALLOWED_GLOBALS")

    def metadata_read(self) -> list[str]:
        """Attributes that the server reads of a flattened bucket's metadata."""
        module = "sglang/srt/model_executor/model_runner_components/weight_updater.py"
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.FunctionDef) and node.name == "_update_weights_from_flattened_bucket":
                return sorted(
                    {
                        part.attr
                        for part in ast.walk(node)
                        if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "meta"
                    }
                )
        raise LookupError(f"{module} has no _update_weights_from_flattened_bucket")

    def meta_info(self) -> list[str]:
        """Keys that an answer's meta_info may have."""
        keys: set[str] = set()
        for module in ("managers/tokenizer_manager.py", "utils/weight_versions.py"):
            for node in ast.walk(self.tree(f"sglang/srt/{module}")):
                if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "meta_info":
                    keys |= _texts([node.slice])
                elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "meta_info":
                    keys |= _texts(node.value.keys if isinstance(node.value, ast.Dict) else [])
                elif isinstance(node, ast.Call) and ast.unparse(node.func) == "meta_info.update":
                    keys |= _texts(node.args[0].keys if isinstance(node.args[0], ast.Dict) else [])
        return sorted(keys)

    def finish_types(self) -> list[str]:
        """The `type` of an answer's finish_reason."""
        found: set[str] = set()
        for node in self.tree("sglang/srt/managers/schedule_batch.py").body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("FINISH"):
                found |= set(re.findall(r"'type': '(\w+)'", ast.unparse(node)))
        return sorted(found)


def _texts(nodes: Iterable[ast.expr | None]) -> set[str]:
    """The nodes that are string literals."""
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _path(decorator: ast.expr) -> str:
    """The literal path of `@app.<method>(path, ...)`, else empty."""
    if not isinstance(decorator, ast.Call) or not ast.unparse(decorator.func).startswith("app."):
        return ""
    return next((path for path in _texts(decorator.args[:1]) if path.startswith("/")), "")


def _methods(decorator: ast.expr) -> list[str]:
    assert isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute)
    given = {key.arg: key.value for key in decorator.keywords}
    return ast.literal_eval(given["methods"]) if "methods" in given else [decorator.func.attr.upper()]


def _arguments(function: ast.AsyncFunctionDef) -> dict[str, Any]:
    body, query = None, []
    for argument in function.args.args:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        if argument.arg == "obj":
            body = re.sub(r"Annotated\[(.*), Body\(\)\]", r"\1", annotation).removeprefix("Optional[")
            body = body.removesuffix("]")
        elif argument.arg != "request":
            query.append(argument.arg)
    return {"body": body, "query": query}


def extract(path: Path) -> dict[str, Any]:
    """The schema of the wheel at `path`. Raises LookupError that names what the package no longer has."""
    wheel = Wheel(path)
    routes, flags = wheel.routes(), wheel.flags()
    if missing := [name for name in ROUTES if name not in routes] + [f for f in FLAGS if f not in flags]:
        raise LookupError(f"sglang {wheel.version} has no {', '.join(missing)}")
    environment = wheel.tree("sglang/srt/environ.py")
    known = {ast.unparse(node.targets[0]) for node in ast.walk(environment) if isinstance(node, ast.Assign)}
    if missing := [name for name in ENVIRONMENT if name not in known]:
        raise LookupError(f"sglang {wheel.version} reads no {', '.join(missing)}")
    used = {path: routes[path] for path in ROUTES}
    bodies = sorted({route["body"] for route in used.values() if route["body"]})
    return {
        "version": wheel.version,
        "routes": used,
        "messages": {name: wheel.struct(MESSAGES, name) for name in bodies},
        "sampling_params": wheel.struct("sglang/srt/sampling/sampling_params.py", "SamplingParams"),
        "flags": {name: flags[name] for name in FLAGS},
        "environment": list(ENVIRONMENT),
        "unpickled": wheel.unpickled(),
        "metadata_read": wheel.metadata_read(),
        "meta_info": wheel.meta_info(),
        "finish_types": wheel.finish_types(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(json.dumps(extract(given.wheel), indent=1) + "\n")
