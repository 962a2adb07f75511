"""Conversion of whole checkpoints: the same bits come back, and nothing half done is ever left."""

from __future__ import annotations

import errno
import filecmp
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpt_mega.checkpoint.convert import hf_to_megatron, megatron_to_hf, verify
from hpt_mega.checkpoint.layout import TargetLayout
from hpt_mega.checkpoint.workers import LostWorkerError, WorkerError
from hpt_mega.resharding.mapping import MappingError
from tests.checkpoint.families import MIXTURES, MODELS, save_model

LAYOUTS = [
    TargetLayout(),
    TargetLayout(tp=2),
    TargetLayout(tp=4, pp=2),
    TargetLayout(pp=3),
    TargetLayout(tp=2, pp=3, ep=2, etp=2),
    TargetLayout(ep=4, etp=1, tp=2),
]


def silent(done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(MODELS):
        # several dtypes, and files enough for an index
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        save_model(name, folder / name, dtype, max_shard_size="40KB")
        (folder / name / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / name / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def assert_same_folders(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    different = [name for name in names if not filecmp.cmp(left / name, right / name, shallow=False)]
    assert not different


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_to_megatron_and_back_every_file_is_bitwise_equal(
    name: str, layout: TargetLayout, models: Path, tmp_path: Path
) -> None:
    if layout.ep > 1 and name not in MIXTURES:
        layout = TargetLayout(tp=layout.tp, pp=layout.pp)
    hf_to_megatron(models / name, tmp_path / "megatron", layout, silent)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", None, silent)
    assert_same_folders(models / name, tmp_path / "hf")
    verify(tmp_path / "hf", tmp_path / "megatron")


def test_each_rank_of_the_layout_has_a_file_of_about_equal_size(models: Path, tmp_path: Path) -> None:
    hf_to_megatron(models / "llama_4_layers", tmp_path / "out", TargetLayout(tp=2, pp=2, vpp=2), silent)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out" / "release").glob("__*_0.distcp"))]
    assert len(sizes) == 4
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (TargetLayout(tp=3), "attention heads"),
        (TargetLayout(tp=8), "4 key/value heads"),
        (TargetLayout(pp=4), "3 layers"),
        (TargetLayout(ep=2), "no experts"),
        (TargetLayout(vpp=2), "--vpp is 2 and --pp is 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    layout: TargetLayout, message: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(models / "llama", tmp_path / "out", layout, silent)


class Damage:
    """A model folder to break, and a conversion of it that must fail and leave nothing."""

    def __init__(self, root: Path) -> None:
        self.hf = root / "hf"
        save_model("qwen2", self.hf)
        self.out = root / "out" / "megatron"
        self.out.parent.mkdir()

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.hf / "model.safetensors")

    def rewrite(self, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.hf / "model.safetensors", metadata={"format": "pt"})

    def must_fail(self, message: str) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            hf_to_megatron(self.hf, self.out, TargetLayout(tp=2), silent)
        assert list(self.out.parent.iterdir()) == []


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    return Damage(tmp_path)


def test_leftovers_on_both_sides_are_listed_by_name(damage: Damage) -> None:
    tensors = damage.weights()
    tensors["model.layers.1.strange.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    damage.rewrite(tensors)
    damage.must_fail(r"(?s)model\.layers\.1\.mlp\.up_proj\.weight.*model\.layers\.1\.strange\.weight")


def test_a_wrong_shape_is_an_error_that_says_both(damage: Damage) -> None:
    tensors = damage.weights()
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(20, 48)
    tensors["model.layers.2.self_attn.o_proj.weight"] = torch.zeros(48, 50)
    damage.rewrite(tensors)
    damage.must_fail(
        r"(?s)0.self_attn.k_proj.weight is \[20, 48\], expected \[40, 48\].*"
        r"2.self_attn.o_proj.weight is \[48, 50\], expected \[48, 80\]"
    )


@pytest.mark.parametrize("kept", [0.7, 0.0001])
def test_a_truncated_file_is_an_error(kept: float, damage: Damage) -> None:
    path = damage.hf / "model.safetensors"
    os.truncate(path, int(kept * path.stat().st_size))
    damage.must_fail("cut off")


def test_a_wrong_dtype_is_an_error(damage: Damage) -> None:
    tensors = damage.weights()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    damage.rewrite(tensors)
    damage.must_fail("model.norm.weight is stored as torch.float16")


def test_a_missing_index_and_a_missing_file_are_errors(damage: Damage) -> None:
    save_model("qwen2", damage.hf, max_shard_size="40KB")
    (damage.hf / "model.safetensors").unlink(missing_ok=True)
    index = (damage.hf / "model.safetensors.index.json").read_text()
    (damage.hf / "model.safetensors.index.json").unlink()
    damage.must_fail("no model.safetensors.index.json")
    (damage.hf / "model.safetensors.index.json").write_text(index)
    next(damage.hf.glob("model-00002*")).unlink()
    damage.must_fail("not there: model-00002")


@pytest.mark.parametrize("way", ["a relative path", "an absolute path", "no name"])
def test_an_index_cannot_name_a_file_outside_its_folder(way: str, damage: Damage, tmp_path: Path) -> None:
    """Neither for reading nor, where a Megatron checkpoint brought the index along, for writing over it."""
    hf_to_megatron(damage.hf, damage.out, TargetLayout(), silent)
    precious = tmp_path / "precious"
    shutil.move(damage.hf / "model.safetensors", precious)
    before = precious.read_bytes()
    name = {"a relative path": "../../../precious", "an absolute path": str(precious), "no name": ".."}[way]
    index = json.dumps({"weight_map": dict.fromkeys(load_file(precious), name)})
    for folder in (damage.hf, damage.out / "hf"):
        (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="expected the name of a file in the folder "):
        megatron_to_hf(damage.out, tmp_path / "a" / "b", None, silent)
    assert precious.read_bytes() == before
    shutil.rmtree(damage.out)
    damage.must_fail("expected the name of a file in the folder ")


def test_a_megatron_checkpoint_cannot_name_a_file_outside_its_folder(damage: Damage, tmp_path: Path) -> None:
    hf_to_megatron(damage.hf, damage.out, TargetLayout(), silent)
    description = damage.out / "release" / ".metadata"
    content = pickle.loads(description.read_bytes())
    for info in content.storage_data.values():
        info.relative_path = f"../release/{info.relative_path}"
    description.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="expected the name of a file in the folder "):
        megatron_to_hf(damage.out, tmp_path / "back", None, silent)


def test_an_unknown_architecture_lists_the_known(damage: Damage) -> None:
    config = json.loads((damage.hf / "config.json").read_text())
    (damage.hf / "config.json").write_text(json.dumps(config | {"architectures": ["GptNeoForCausalLM"]}))
    damage.must_fail("known: LlamaForCausalLM, Qwen2ForCausalLM")


def test_a_tied_model_whose_second_copy_differs_is_an_error(tmp_path: Path) -> None:
    save_model("qwen2_tied", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(101, 48)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(MappingError, match="tie_word_embeddings"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out", TargetLayout(), silent)


def test_a_megatron_checkpoint_changed_on_the_way_is_an_error(damage: Damage, tmp_path: Path) -> None:
    hf_to_megatron(damage.hf, damage.out, TargetLayout(), silent)
    path = damage.out / "release" / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        megatron_to_hf(damage.out, tmp_path / "back", None, silent)
    os.truncate(path, len(raw) // 2)
    with pytest.raises(ValueError, match="cut off"):
        megatron_to_hf(damage.out, tmp_path / "back", None, silent)
    assert not (tmp_path / "back").exists()


def test_swapped_names_of_equal_shape_are_caught_by_the_logits(damage: Damage, tmp_path: Path) -> None:
    hf_to_megatron(damage.hf, damage.out, TargetLayout(), silent)
    whole = check_logits(damage.hf, damage.out)
    assert whole.returncode == 0, whole.stderr
    tensors = damage.weights()
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    damage.rewrite({**tensors, gate: tensors[up], up: tensors[gate]})
    swapped = check_logits(damage.hf, damage.out)
    assert swapped.returncode != 0
    assert "each other's names" in swapped.stderr


def check_logits(hf: Path, megatron: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "from pathlib import Path; from hpt_mega.checkpoint.logits import check_logits; "
        f"print(check_logits(Path({str(hf)!r}), Path({str(megatron)!r})))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


def test_an_out_folder_that_is_there_is_left_alone(damage: Damage) -> None:
    damage.out.mkdir()
    (damage.out / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="there already"):
        hf_to_megatron(damage.hf, damage.out, TargetLayout(), silent)
    assert (damage.out / "precious").read_text() == "mine"


class Killed(BaseException):
    """Like a signal: no handler of errors sees it."""


@pytest.mark.parametrize("when", [1, 7, 20])
def test_killed_at_any_parameter_nothing_half_done_is_seen_and_the_next_run_goes_on(
    when: int, damage: Damage, tmp_path: Path
) -> None:
    def kill_later(what: str) -> object:
        steps = iter(range(when))

        def progress(done: int, total: int) -> None:
            if next(steps, None) is None:
                # what a kill leaves beyond the last step in the journal
                home, kind = (
                    (damage.out.parent, "distcp") if what == "megatron" else (tmp_path, "safetensors")
                )
                begun = [*home.glob(f".*.partial/**/*.{kind}")]
                assert begun
                for path in begun:
                    with path.open("ab") as file:
                        file.write(b"half a tensor")
                raise Killed

        return progress

    with pytest.raises(Killed):
        hf_to_megatron(damage.hf, damage.out, TargetLayout(tp=2, pp=2), kill_later("megatron"))  # type: ignore[arg-type]
    assert not damage.out.exists()
    assert hf_to_megatron(damage.hf, damage.out, TargetLayout(tp=2, pp=2), silent).resumed == when + 1
    with pytest.raises(Killed):
        megatron_to_hf(damage.out, tmp_path / "back", None, kill_later("hf"))  # type: ignore[arg-type]
    assert not (tmp_path / "back").exists()
    assert megatron_to_hf(damage.out, tmp_path / "back", None, silent).resumed == when + 1
    assert_same_folders(damage.hf, tmp_path / "back")


def test_several_processes_write_the_bits_of_one(models: Path, tmp_path: Path) -> None:
    layout = TargetLayout(tp=2, pp=2, ep=2, etp=2)
    for processes in (1, 3):
        out = tmp_path / str(processes)
        out.mkdir()
        hf_to_megatron(models / "qwen3_moe", out / "megatron", layout, silent, processes=processes)
        megatron_to_hf(out / "megatron", out / "hf", None, silent, processes=processes)
    for folder in ("megatron/release", "megatron/hf", "hf"):
        assert_same_folders(tmp_path / "1" / folder, tmp_path / "3" / folder)
    one, several = (json.loads((tmp_path / n / "megatron/manifest.json").read_text()) for n in "13")
    assert one == several


def test_a_worker_that_fails_is_named_with_its_step_and_nothing_is_left(damage: Damage) -> None:
    tensors = damage.weights()
    damage.rewrite({**tensors, "model.norm.weight": tensors["model.norm.weight"].half()})
    with pytest.raises(
        WorkerError, match=r"worker \d of 2 failed at decoder.final_layernorm.weight: model.norm"
    ):
        hf_to_megatron(damage.hf, damage.out, TargetLayout(), silent, processes=2)
    assert list(damage.out.parent.iterdir()) == []


def test_a_killed_worker_ends_the_conversion_and_the_next_run_goes_on(damage: Damage) -> None:
    done = []

    def kill_one(bytes_done: int, total: int) -> None:
        done.append(bytes_done)
        if len(done) == 5:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(LostWorkerError, match=r"worker \d of 2 died at .* \(exit code -9"):
        hf_to_megatron(damage.hf, damage.out, TargetLayout(tp=2), kill_one, processes=2)
    assert not damage.out.exists()
    assert not multiprocessing.active_children()
    again = hf_to_megatron(damage.hf, damage.out, TargetLayout(tp=2), silent, processes=2)
    assert 5 <= again.resumed < again.parameters
    verify(damage.hf, damage.out)


def test_what_another_request_left_is_not_gone_on_with(damage: Damage) -> None:
    def kill(done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        hf_to_megatron(damage.hf, damage.out, TargetLayout(tp=2), kill)
    assert hf_to_megatron(damage.hf, damage.out, TargetLayout(tp=4), silent).resumed == 0


# by itself: whoever watches it from outside may be late
KILLED = """
import os, signal, sys
from pathlib import Path
from hpt_mega.checkpoint.convert import hf_to_megatron
from hpt_mega.checkpoint.layout import TargetLayout
from hpt_mega.checkpoint.workers import LostWorkerError, WorkerError

def kill(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), TargetLayout(), kill)
"""


def test_a_real_kill_in_the_middle_leaves_no_output(tmp_path: Path) -> None:
    save_model("deepseek_v3", tmp_path / "hf")
    command = [sys.executable, "-m", "hpt_mega.cli", "convert", "hf-to-megatron"]
    command += ["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "hf"), str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert subprocess.run([*command, "--verify"]).returncode == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("room", [100, 30_000])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(
    room: int, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, left = os.pwrite, room

    def on_full_disk(file: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(file, data, offset)

    monkeypatch.setattr(os, "pwrite", on_full_disk)
    damage.must_fail("No space left on device")


def test_too_little_room_is_said_before_anything_is_written(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    damage.must_fail("make room")
