"""Merges of models of several tasks: their configs, their evaluation, and what came of them."""
