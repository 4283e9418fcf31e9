"""Choices are read from plain values, of which files have lists for tuples."""

from dataclasses import dataclass

import pytest

from sparsifiner.choices import Choices


class Base:
    pass


@dataclass(frozen=True)
class Sized(Base):
    """Something of sizes.

    Attributes:
        sizes: of it.
    """

    sizes: tuple[int, ...] = (1, 2)


def test_lists_of_files_become_tuples_that_can_be_hashed():
    read = Choices("thing", Base, {"sized": Sized}).read({"method": "sized", "sizes": [3, 4]})
    assert read == Sized((3, 4))
    assert hash(read) == hash(Sized((3, 4)))


def test_options_of_another_kind_are_refused():
    choices = Choices("thing", Base, {"sized": Sized})
    with pytest.raises(TypeError, match="thing: sizes of sized must be"):
        choices.read({"method": "sized", "sizes": ["a"]})
    with pytest.raises(ValueError, match="thing: size do not fit sized, whose options are sizes"):
        choices.read({"method": "sized", "size": 3})
