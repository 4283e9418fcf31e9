"""Patterns that look at no image, to compare with."""
