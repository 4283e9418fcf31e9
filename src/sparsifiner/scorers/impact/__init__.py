"""How much a tile's result would change without a key: training-free."""
