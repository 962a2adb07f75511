"""Checkpoints: Hugging Face import and export (hf.py), and saving and resuming a run (store.py)."""
