"""How the federation trains the base model itself."""
