"""One process's model, data and caches; it knows no Flower."""
