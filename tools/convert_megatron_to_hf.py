"""A Megatron checkpoint as a Hugging Face folder: `hpt convert megatron-to-hf` as a program of its own.

What it does is in hpt_mega/checkpoint/.
"""

from __future__ import annotations

import argparse
import sys

from hpt_mega.checkpoint.command import configure_megatron_to_hf, run_tool

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    configure_megatron_to_hf(parser)
    sys.exit(run_tool(parser))
