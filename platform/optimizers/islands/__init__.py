"""Low-communication training: what islands exchange, how often, and in how many bytes."""
