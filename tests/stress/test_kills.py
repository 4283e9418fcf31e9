"""A sample of what `make stress` does."""

from sparsifiner.training import loop
from tests.stress import kills


def test_a_few_kills_change_nothing(monkeypatch, capfd):
    monkeypatch.setattr(loop, "write_training_report", lambda file, records: None)  # of the run left alone
    assert kills.main(["--kills", "2", "--seed", "0", "--no-reports"]) == 0
    out = capfd.readouterr().out
    assert "2 of 2 kills: equal to the bit" in out
    assert out.endswith("all equal\n")
