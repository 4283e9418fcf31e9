"""Measuring: multiply-accumulates, accuracy, milliseconds."""
