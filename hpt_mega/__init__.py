"""hpt_mega: Hybrid Post-Training of large language models at Megatron scale."""

__version__ = "0.1.0"
