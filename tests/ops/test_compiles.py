"""How many kernels a stream of image sizes asks for, as Triton tells them apart: nothing is compiled."""

import json
import os
import subprocess
import sys

import pytest

from sparsifiner.ops.backends import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)


def test_one_compile_for_each_kernel_and_power_of_two_of_the_patches():
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.specialisations"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sizes"] == 30
    assert {"attend_kernel", "select_kernel", "tile_scores_kernel"} <= found["kernels"].keys()
    powers = found["powers_of_two"]
    assert {name: count for name, count in found["kernels"].items() if count > powers} == {}
