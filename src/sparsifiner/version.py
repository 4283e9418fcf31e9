"""The version of this package, which its build reads, too."""

__version__ = "0.1.0"
