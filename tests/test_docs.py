"""The pages of docs/ are what benchmarks/report.py writes from what is committed."""

import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_pages_are_written_from_the_results(tmp_path):
    for name in ("benchmarks", "configs", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    pages = [page.relative_to(ROOT) for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    assert len(pages) == 4
    for page in pages[1:]:
        (tmp_path / page).unlink()
    subprocess.run([sys.executable, "benchmarks/report.py"], cwd=tmp_path, check=True, timeout=300)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: run benchmarks/report.py"
