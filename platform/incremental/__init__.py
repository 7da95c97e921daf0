"""Incremental learning: streams as index schedules, learners that chain, and their metrics."""
