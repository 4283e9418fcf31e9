"""The names of the backends, which costs no torch."""

BACKENDS = ("reference", "torch", "cpu", "triton")
