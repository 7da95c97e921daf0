"""Compiling a config's training step for a TPU pod that isn't here, and searching its layouts."""
