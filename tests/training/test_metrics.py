"""Nothing that was measured is lost with a line that cannot be read."""

import json

import pytest

from sparsifiner.training.checkpoints import Position
from sparsifiner.training.metrics import forget_after, read_records
from tests.training.runs import train_tiny


def record(step, kind="train", **numbers):
    where = {"stage": "classify", "stage_index": 0, "step": step, "epoch": step / 2}
    return {"kind": kind, **where, **numbers}


RECORDS = [record(1, loss=2.5), record(2, "validation", top1=50.0), record(3, loss=float("nan"))]
LINES = [json.dumps(each).encode() for each in RECORDS]
DAMAGED = {
    "cut": LINES[1][:30],
    "empty": b"",
    "zeroed": bytes(len(LINES[1])),
    "no text": b"\xff\xfe" + LINES[1],
    "no object": b"[1, 2]",
    "without its step": LINES[1].replace(b'"step"', b'"stop"'),
    "without its top-1": LINES[1].replace(b"top1", b"top0"),
    "unknown kind": LINES[1].replace(b"validation", b"validatiom"),
    "kind of another type": LINES[1].replace(b'"validation"', b"[]"),
    "word for a number": LINES[1].replace(b"50.0", b'"50"'),
    "two ends": LINES[1][:30] + b"\r" + LINES[1][30:40],
}


def test_what_lies_behind_a_position_goes(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join(LINES) + b"\n")
    forget_after(file, Position(0, 2))
    assert read_records(file) == RECORDS[:2]
    assert file.read_bytes() == b"\n".join(LINES[:2]) + b"\n"
    forget_after(tmp_path / "none.jsonl", Position())
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_stays_and_is_named(tmp_path, caplog, name):
    file = tmp_path / "metrics.jsonl"
    for lines in ([LINES[0], DAMAGED[name], LINES[2]], [LINES[0], LINES[2], DAMAGED[name]]):
        caplog.clear()
        content = b"\n".join(lines) + b"\n"
        file.write_bytes(content)
        forget_after(file, Position(0, 4))
        assert file.read_bytes() == content
        (warning,) = caplog.records
        line = lines.index(DAMAGED[name]) + 1
        assert f"line {line} of {file} is damaged; it stays as it is" in warning.getMessage()
        assert [each["step"] for each in read_records(file)] == [1, 3]


@pytest.mark.parametrize("length", [1, 30, len(LINES[2]) - 1])
def test_only_a_cut_last_line_goes(tmp_path, caplog, length):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join([*LINES[:2], LINES[2][:length]]))
    forget_after(file, Position(0, 4))
    assert file.read_bytes() == b"\n".join(LINES[:2]) + b"\n"
    assert not caplog.records


def test_a_last_line_that_lacks_its_end_alone_stays(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join(LINES))
    forget_after(file, Position(0, 4))
    assert file.read_bytes() == b"\n".join(LINES) + b"\n"


def test_a_run_goes_on_over_a_damaged_line(tmp_path, caplog):
    before = train_tiny(tmp_path).records
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = lines[1][:20]
    file.write_text("\n".join([*lines, '{"kind": "tr']))
    after = train_tiny(tmp_path, resume=True).records
    assert file.read_text() == "\n".join(lines) + "\n"
    assert after == before[:1] + before[2:]
    assert [each.getMessage() for each in caplog.records if "line 2 of" in each.getMessage()]
