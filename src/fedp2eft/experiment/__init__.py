"""Settings, runs and their tables."""
