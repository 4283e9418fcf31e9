"""The true attention, to compare with."""
