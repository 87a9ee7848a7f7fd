"""The commands: one function each, whose signature is the command line.

Nothing heavy is imported before a command runs, so that help comes at once.
"""
