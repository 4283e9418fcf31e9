"""Rows of docs/results as tables."""

import json
from typing import Any

from provenance import RESULTS


def load(name: str, *setting: str) -> list[dict[str, Any]]:
    """The latest row of each setting; a setting that a row does not name is None."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())
    return list({tuple(str(row.get(key)) for key in setting): row for row in rows}.values())


def source_of(rows: list[dict[str, Any]]) -> str:
    seen = {(r["device"], f"torch {r['torch']}", f"timm {r['timm']}", f"commit {r['commit']}") for r in rows}
    return "; ".join(", ".join(names) for names in sorted(seen))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
