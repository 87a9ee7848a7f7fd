"""A personalization strategy that chooses itself: the federation chooses, each client checks."""
