"""Experiments as a whole, on the engine of this process."""
