"""Shares as exact fractions."""

from fractions import Fraction


def exact_ratio(keep: float) -> tuple[int, int]:
    """The fraction that was meant by a float, as two integers: .1 is 1/10, not its binary neighbour.

    Integers also keep `torch.compile` from turning a changed `keep` into a symbolic float.
    """
    return Fraction(keep).limit_denominator(10**6).as_integer_ratio()
