"""One client's work on its own rows: ξ, stage 1, stage 2, personalization; no Flower in here."""
