"""The programs an experiment can run: one file per kind, each a script that reads top to bottom."""
