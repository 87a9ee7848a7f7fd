"""Sparse-rank adapters on PEFT: gates, penalties, budget, export."""
