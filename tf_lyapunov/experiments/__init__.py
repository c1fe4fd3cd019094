"""Configured, resumable runs: config, training, run directory."""
