"""Every value that was tuned on one machine can be measured again."""

import importlib
import pathlib

import pytest

from sparsifiner import tuned

ROOT = pathlib.Path(__file__).parents[1]
# measured by the commands beside them
ELSEWHERE = {"FASTER", "AUTO_SUMMARY_WINDOWS"}
pytestmark = pytest.mark.usefixtures("checkout")


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tune")


def test_every_value_is_measured_again(tune):
    values = {name for name in vars(tuned) if name.isupper()}
    entries = {name for value in values - ELSEWHERE for name in entries_of(value)}
    assert set(tune.tunings()) == entries | set(tune.native_values())


def entries_of(name):
    value = getattr(tuned, name)
    return {f"{name}[{key}]" for key in value} if isinstance(value, dict) else {name}


def test_values_are_what_the_work_is_done_with(tune, monkeypatch):
    monkeypatch.setattr(tuned, "SORTED_SCORES", tuned.SORTED_SCORES)
    seen = []
    times = tune.milliseconds("SORTED_SCORES", [3, 5], lambda: seen.append(tuned.SORTED_SCORES), "cpu")
    assert (len(times), set(seen), tuned.SORTED_SCORES) == (2, {3, 5}, tune.value_of("SORTED_SCORES"))
    assert seen[:4] == [3, 5, 3, 5]
    before = tune.value_of("GATHERED_BYTES[cpu]")
    assert tune.milliseconds("GATHERED_BYTES[cpu]", [1, 2], lambda: None, "cpu")
    assert tuned.GATHERED_BYTES["cpu"] == before
