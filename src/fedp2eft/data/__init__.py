"""Data sets and their partition into clients.

`settings.load_federation` is the way in; a `federation.Federation` is what comes out.
"""
