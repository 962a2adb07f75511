"""A Hugging Face folder as a Megatron checkpoint: `hpt convert hf-to-megatron` as a program of its own.

What it does is in hpt_mega/checkpoint/.
"""

from __future__ import annotations

import argparse
import sys

from hpt_mega.checkpoint.command import configure_hf_to_megatron, run_tool

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    configure_hf_to_megatron(parser)
    sys.exit(run_tool(parser))
