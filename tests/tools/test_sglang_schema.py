"""The schema tool on a package of a few lines, made for the test."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "sglang_schema.py"
_spec = importlib.util.spec_from_file_location("sglang_schema", TOOL)
assert _spec is not None and _spec.loader is not None
sglang_schema = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sglang_schema)

MESSAGES = """
class Base:
    rid: Optional[str] = None
class Pause(Base, kw_only=True):
    mode: Literal["abort", "retract"] = "abort"
    names: List[str]
"""
HTTP = """
@app.api_route("/pause", methods=["POST", "PUT"])
@level(1)
async def pause(obj: Annotated[Optional[Pause], Body()], request: Request): ...
@app.get(os.environ["X"])
async def elsewhere(): ...
@app.get("/flush")
async def flush(timeout: float = 0.0): ...
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "sglang-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(sglang_schema.MESSAGES, MESSAGES)
        file.writestr(sglang_schema.HTTP, HTTP)
    return path


def test_fields_come_with_their_bases_types_and_whether_they_are_required(wheel: Path) -> None:
    assert sglang_schema.Wheel(wheel).struct(sglang_schema.MESSAGES, "Pause") == {
        "rid": {"type": "Optional[str]", "required": False},
        "mode": {"type": "Literal['abort', 'retract']", "required": False},
        "names": {"type": "List[str]", "required": True},
    }


def test_routes_come_with_methods_body_and_query(wheel: Path) -> None:
    assert sglang_schema.Wheel(wheel).routes() == {
        "/pause": {"methods": ["POST", "PUT"], "body": "Pause", "query": []},
        "/flush": {"methods": ["GET"], "body": None, "query": ["timeout"]},
    }


def test_what_a_version_no_longer_has_is_named(wheel: Path) -> None:
    with pytest.raises(LookupError, match=r"sglang 9.8.7 has no /health, /model_info, .*, model_path"):
        sglang_schema.extract(wheel)
    with pytest.raises(LookupError, match="has no class Resume"):
        sglang_schema.Wheel(wheel).struct(sglang_schema.MESSAGES, "Resume")
