"""Nearer to the dense twin at the same number of keys, on a few images without labels."""

from sparsifiner.calibration.budgets import Calibration, Match, calibrate

__all__ = ["Calibration", "Match", "calibrate"]
