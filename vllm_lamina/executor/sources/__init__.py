"""Where an engine's attention workers come from."""
