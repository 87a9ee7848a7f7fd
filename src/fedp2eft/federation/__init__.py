"""The federation: messages, engines, rounds and what is kept of them."""
