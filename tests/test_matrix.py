"""No law is without a sample, and what the full matrix gave is counted as it was."""

import json
from types import SimpleNamespace

import pytest

from tests.matrix import SAMPLED, Result


def test_every_law_has_a_sample(pytestconfig):
    laws = pytestconfig.stash[SAMPLED]
    assert [law for law, cases in laws.items() if not cases] == []


@pytest.mark.matrix(sample=lambda number, word: number == 1 or word == "b")
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("word", ["a", "b"])
def test_samples_are_taken_by_the_parameters_that_they_name(pytestconfig, number, word):
    assert pytestconfig.getoption("matrix") != "sample" or (number, word) != (2, "a")


def report(case, when, outcome, law="tests/test_x.py::test_law"):
    cases = {} if case is None else {"cases": {"name": case}}
    return SimpleNamespace(
        nodeid=f"{law}[{case}]", when=when, outcome=outcome, user_properties=list(cases.items())
    )


def test_a_case_passes_if_all_of_it_passes(tmp_path):
    result = Result(tmp_path / "matrix.json")
    for case, outcomes in {
        "good": ("passed", "passed", "passed"),
        "bad": ("passed", "failed", "passed"),
        "untidy": ("passed", "passed", "failed"),
        "elsewhere": ("skipped", "passed"),
        None: ("passed", "failed", "passed"),
    }.items():
        for when, outcome in zip(("setup", "call", "teardown"), outcomes, strict=False):
            result.pytest_runtest_logreport(report(case, when, outcome))
    result.pytest_sessionfinish()
    written = json.loads((tmp_path / "matrix.json").read_text())
    (law,) = written["laws"]
    counts = {"passed": 1, "failed": 2, "skipped": 1}
    assert law == {
        "law": "tests/test_x.py::test_law",
        **counts,
        "cases": {"name": ["bad", "elsewhere", "good", "untidy"]},
    }
    assert counts.items() <= written.items()
    assert {"device", "torch", "timm", "triton", "commit"} <= written.keys()


def test_the_matrix_held(checkout):
    written = json.loads((checkout / "docs" / "results" / "matrix.json").read_text())
    assert (written["failed"], written["command"]) == (0, "make matrix")
    assert written["passed"] > 100
