"""Laws over many models, backends and sizes: `make test` holds a sample of each, `make matrix` all of it.

A law that is marked `matrix(sample=...)` has a sample: the cases of which `sample`, called with those
parameters that it names, is true. `--matrix only` runs such laws, on all of their cases; `--matrix all` runs
every test on all of its cases.
"""

import inspect
import json
import pathlib

import pytest
import torch

MODES = ("sample", "all", "only")
SAMPLED = pytest.StashKey()  # of the configuration: how many cases of each law run


def pytest_addoption(parser):
    group = parser.getgroup("matrix")
    group.addoption("--matrix", choices=MODES, default="sample", help="which cases run; see tests/matrix.py")
    group.addoption("--matrix-result", type=pathlib.Path, help="JSON file to write: which laws held on what")


def pytest_configure(config):
    config.addinivalue_line("markers", "matrix(sample): a law over many cases; make test runs a sample")
    file = config.getoption("matrix_result")
    if file is not None and not hasattr(config, "workerinput"):  # pytest-xdist's own processes write nothing
        config.pluginmanager.register(Result(file))


def pytest_collection_modifyitems(config, items):
    mode = config.getoption("matrix")
    kept, left, sampled = [], [], config.stash.setdefault(SAMPLED, {})
    for item in items:
        marker = item.get_closest_marker("matrix")
        if marker is not None:
            item.user_properties.append(("cases", {name: said(item, name) for name in item.callspec.params}))
        runs = mode == "all" or (mode == "only" and marker is not None)
        runs = runs or (mode == "sample" and (marker is None or is_sampled(item, marker)))
        (kept if runs else left).append(item)
        if marker is not None:
            law = law_of(item.nodeid)
            sampled[law] = sampled.get(law, 0) + runs
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def law_of(nodeid):
    return nodeid.partition("[")[0]


def is_sampled(item, marker):
    sample, parameters = marker.kwargs["sample"], item.callspec.params
    return sample(**{name: parameters[name] for name in inspect.signature(sample).parameters})


def said(item, name):
    """A parameter in a few words."""
    value = item.callspec.params[name]
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items()) or "as they are"
    return getattr(value, "__name__", str(value))


class Result:
    """Counts what passed, law by law.

    Args:
        file: where to write it.
    """

    def __init__(self, file):
        self.file = file
        self.cases = {}  # law -> parameter -> its values
        self.outcomes = {}  # law -> test -> outcome

    def pytest_runtest_logreport(self, report):
        cases = dict(report.user_properties).get("cases")
        if cases is None:
            return
        law = law_of(report.nodeid)
        for name, value in cases.items():
            self.cases.setdefault(law, {}).setdefault(name, set()).add(value)
        outcomes = self.outcomes.setdefault(law, {})
        if outcomes.get(report.nodeid, "passed") == "passed":  # setting up and tearing down count, too
            outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self):
        # tests/conftest.py, which imports this, must come before Triton
        from sparsifiner.measure.records import provenance  # noqa: PLC0415

        laws = []
        for law, outcomes in sorted(self.outcomes.items()):
            cases = {name: sorted(values) for name, values in self.cases[law].items()}
            laws.append({"law": law, **count(outcomes.values()), "cases": cases})
        every = [outcome for outcomes in self.outcomes.values() for outcome in outcomes.values()]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        written = {"command": "make matrix", **provenance(device), **count(every), "laws": laws}
        self.file.write_text(json.dumps(written, indent=1) + "\n")


def count(outcomes):
    outcomes = list(outcomes)
    return {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
