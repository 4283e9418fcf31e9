"""What docs/ says is what benchmarks/report.py writes from committed results, and its commands are right."""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from sparsifiner.cli import bench, main
from sparsifiner.config import config_from_dict, config_to_dict
from sparsifiner.old_spellings import OLD_OPTIONS

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
pytestmark = pytest.mark.usefixtures("checkout")


def test_pages_are_written_from_the_results(tmp_path):
    for name in ("benchmarks", "configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    pages = [page.relative_to(ROOT) for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    assert len(pages) == 4
    for page in pages[1:]:
        (tmp_path / page).unlink()
    subprocess.run([sys.executable, "benchmarks/report.py"], cwd=tmp_path, check=True)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: run benchmarks/report.py"


def test_results_are_measurements_without_weights():
    suffixes = {path.suffix for path in RESULTS.rglob("*") if path.is_file()}
    assert suffixes - {".lock"} == {".json", ".jsonl", ".yaml"}


def test_commands_of_models_time_what_their_rows_say(monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(bench, "benchmark_model", lambda settings, config: asked.update(config=config) or [])
    files = [RESULTS / f"{name}.json" for name in ("cpu", "gpu", "calls")]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())]
    commands = {row["command"]: row for row in rows if row["benchmark"] == "model"}
    assert len(commands) > 10
    for command, row in commands.items():
        assert main(shlex.split(command)[1:]) == 0, command
        names = [name for name in (*config_to_dict(asked["config"]), *OLD_OPTIONS) if name in row]
        told = {name: row[name] for name in names} | {"tokens": row["token_method"]}
        assert config_from_dict(told) == asked["config"], command
