"""Everything that touches megatron-core: process groups, model, training step, optimizer, precision.

No other package imports megatron.core or transformer_engine.
"""
