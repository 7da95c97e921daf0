"""Experiments with model merging."""
