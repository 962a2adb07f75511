"""Rollout engines: everything that turns questions into sampled responses."""
