"""Data sets and their partition into clients.

`registry.load_clients` returns a `clients.ClientData`.
"""
