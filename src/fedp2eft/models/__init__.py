"""Base models: where they come from, how they are loaded, in which precision."""
