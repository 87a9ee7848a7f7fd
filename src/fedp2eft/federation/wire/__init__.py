"""Messages and their arrays."""
