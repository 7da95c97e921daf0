"""Several processes as one run: how they find each other, and how they end together."""
