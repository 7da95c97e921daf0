"""Data sets, their order, and the feeds that bring batches to the step."""
