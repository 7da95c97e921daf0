"""Experiments in incremental learning."""
