"""Rows as batches, losses and scores."""
