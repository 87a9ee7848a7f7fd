"""Base models from package files, without a model hub."""
