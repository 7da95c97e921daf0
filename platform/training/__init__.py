"""The training engine: state, step, loop and tasks."""
