"""Checkpoints: saving, verifying and restoring."""
