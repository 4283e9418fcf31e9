"""Mean query of a tile times key: training-free."""
