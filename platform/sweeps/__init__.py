"""Sweeps: search spaces, trials, their grouping into compiled programs, and the scoring of them."""
