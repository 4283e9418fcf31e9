"""Only a run's own checkpoints go, and a damaged one is told apart before anything of it is loaded."""

import logging
import os
import shutil
from types import SimpleNamespace

import pytest

from sparsifiner.training import Stage, loop, processes
from tests.training.damages import DAMAGES, cut, damage, flipped, garbage, zeroed
from tests.training.runs import assert_equal_runs, checkpoints_of, digests_of, train_tiny

NEWEST, BEFORE = "00-00000004", "00-00000003"
FILES = (
    "model.safetensors",
    "optimizer.bin",
    "progress.pt",
    "random_states_0.pkl",
    "run.txt",
    "manifest.json",
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Drawing the report takes longer than these runs."""
    monkeypatch.setattr(loop, "write_training_report", lambda file, records: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_training_report", lambda file, records: None)
        train_tiny(folder)
    return folder


@pytest.fixture
def copy(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that ended after three of its four steps."""
    train_step = loop._Trainer._train_step

    def stop(trainer, *arguments):
        if arguments[-1] == 3:  # the step
            raise KeyboardInterrupt
        train_step(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "stopped")
    return tmp_path / "stopped"


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def is_in_sample(name, kind):
    """Every kind of damage to the weights and to the list of files, and one to each of the others."""
    others = dict(zip(FILES[1:5], DAMAGES, strict=False))
    return name in {"model.safetensors", "manifest.json"} or others[name] is kind


@pytest.mark.matrix(sample=is_in_sample)
@pytest.mark.parametrize("kind", DAMAGES, ids=lambda kind: kind.__name__ if kind else "missing")
@pytest.mark.parametrize("name", FILES)
def test_the_run_falls_back_from_a_damaged_checkpoint(undisturbed, copy, caplog, name, kind):
    assert checkpoints_of(copy) == [BEFORE, NEWEST]
    damage(copy / "checkpoints" / NEWEST / name, kind)
    train_tiny(copy, resume=True)
    (line,) = warnings_in(caplog)
    what = {None: "is missing", cut: "bytes instead of", garbage: "bytes instead of"}
    wrong = "has changed" if name == "manifest.json" and kind else what.get(kind, "has changed")
    assert f"{NEWEST} is damaged: {name} " in line
    assert wrong in line
    assert line.endswith(f"the run goes on from the one before, {BEFORE}")
    assert_equal_runs(copy, undisturbed)
    # the damaged one was written anew
    assert checkpoints_of(copy) == [BEFORE, NEWEST]
    weights = [folder / "checkpoints" / NEWEST / "model.safetensors" for folder in (copy, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_nothing_is_said_of_intact_checkpoints(copy, caplog):
    before = digests_of(copy / "checkpoints")
    train_tiny(copy, resume=True)
    assert warnings_in(caplog) == []
    assert digests_of(copy / "checkpoints") == before


def test_without_an_intact_checkpoint_nothing_is_changed(copy):
    damage(copy / "checkpoints" / NEWEST / "optimizer.bin", cut)
    damage(copy / "checkpoints" / BEFORE / "model.safetensors", None)
    before = digests_of(copy)
    reasons = r"4: optimizer\.bin has \d+ bytes instead of \d+; .*3: model\.safetensors is missing"
    with pytest.raises(ValueError, match=rf"is intact \(.*{reasons}\); put a copy of one back"):
        train_tiny(copy, resume=True)
    assert digests_of(copy) == before


def unsealed(folder):
    """A run as versions left it that sealed no checkpoint, and kept one."""
    shutil.rmtree(folder / "checkpoints" / BEFORE)
    for file in ("run.txt", "manifest.json"):
        (folder / "checkpoints" / NEWEST / file).unlink()
    (folder / ".run").unlink()
    return folder


def test_a_run_of_a_version_without_seals_goes_on(undisturbed, copy, stopped, caplog):
    train_tiny(unsealed(copy), resume=True)
    assert_equal_runs(copy, undisturbed)
    for file in ("run.txt", "manifest.json"):
        (stopped / "checkpoints" / BEFORE / file).unlink()
    shutil.rmtree(stopped / "checkpoints" / "00-00000002")
    before = digests_of(stopped / "checkpoints" / BEFORE)
    train_tiny(stopped, resume=True)
    assert_equal_runs(stopped, undisturbed)
    assert digests_of(stopped / "checkpoints" / BEFORE) == before
    assert warnings_in(caplog) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", garbage),
        ("optimizer.bin", cut),
        ("optimizer.bin", flipped),
        ("progress.pt", zeroed),
        ("progress.pt", None),
        ("random_states_0.pkl", garbage),
    ],
)
def test_formats_tell_of_damage_where_there_is_no_seal(copy, name, kind):
    damage(unsealed(copy) / "checkpoints" / NEWEST / name, kind)
    with pytest.raises(ValueError, match=rf"no checkpoint in .* is intact \({NEWEST}: {name} "):
        train_tiny(copy, resume=True)


def test_what_others_keep_beside_checkpoints_stays(undisturbed, stopped, caplog):
    scratch = stopped.parent / "scratch"
    (stopped / "checkpoints").rename(scratch)
    (stopped / "checkpoints").symlink_to(scratch)
    elsewhere = stopped.parent / "elsewhere"
    for folder in ("thesis", "unfinished", "00-00000000", f"00-00000001 {BEFORE}"):
        (scratch / folder).mkdir()
        (scratch / folder / "x.tex").write_text("years")
    shutil.copytree(scratch / BEFORE, elsewhere)
    shutil.copytree(scratch / BEFORE, scratch / f"{BEFORE} copy")
    shutil.copytree(scratch / BEFORE, scratch / "00-00000002 best")
    shutil.copytree(scratch / BEFORE, scratch / "00-00000001")  # its mark has another name
    (scratch / ".DS_Store").write_text("a file")
    (scratch / "best").symlink_to(elsewhere)
    (scratch / "00-00000000000").symlink_to(elsewhere)
    (scratch / "nothing").symlink_to(stopped.parent / "nowhere")
    own = {"00-00000002", BEFORE, NEWEST}
    foreign = {name: each for name, each in digests_of(scratch).items() if name.parts[0] not in own}
    before = foreign, digests_of(elsewhere)
    train_tiny(stopped, resume=True)
    assert_equal_runs(stopped, undisturbed)
    foreign = {name: each for name, each in digests_of(scratch).items() if name.parts[0] not in own}
    assert (foreign, digests_of(elsewhere)) == before
    assert own & set(checkpoints_of(stopped)) == {BEFORE, NEWEST}
    assert warnings_in(caplog) == []


def test_what_cannot_be_removed_stays_with_a_warning(undisturbed, tmp_path, monkeypatch, caplog):
    def refuse(folder, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    train_tiny(tmp_path / "run")
    assert_equal_runs(tmp_path / "run", undisturbed)
    assert [
        " could not be removed ([Errno 13] Permission denied" in line for line in warnings_in(caplog)
    ] == [True] * 2
    monkeypatch.undo()
    train_tiny(tmp_path / "run", resume=True)  # and goes as soon as it can
    assert checkpoints_of(tmp_path / "run") == [BEFORE, NEWEST]


def test_a_file_of_someone_keeps_a_checkpoint(stopped, caplog):
    (stopped / "checkpoints" / "00-00000002" / "notes.txt").write_text("the best so far")
    train_tiny(stopped, resume=True)
    assert (stopped / "checkpoints" / "00-00000002" / "notes.txt").read_text() == "the best so far"
    (line,) = warnings_in(caplog)
    assert "00-00000002 stays: this run did not write notes.txt in it; move that away" in line


def test_a_name_that_is_taken_is_left_alone(undisturbed, stopped, caplog):
    taken = stopped / "checkpoints" / NEWEST
    taken.symlink_to(stopped.parent / "nowhere")
    train_tiny(stopped, resume=True)
    assert_equal_runs(stopped, undisturbed)
    assert taken.readlink() == stopped.parent / "nowhere"
    (line,) = warnings_in(caplog)
    assert f"{NEWEST} is in the way of a checkpoint of this run, and none is saved here; move it away" in line
    taken.unlink()
    train_tiny(stopped, resume=True)
    assert checkpoints_of(stopped) == [BEFORE, NEWEST]


def test_the_previous_checkpoints_stay_until_a_newer_one_is_verified(stopped, monkeypatch, caplog):
    from sparsifiner.training import checkpoints  # noqa: PLC0415, versions before this one have none

    seal = checkpoints.seal

    def seal_what_the_disk_then_loses(folder, *arguments):
        seal(folder, *arguments)
        damage(folder / "model.safetensors", zeroed)

    monkeypatch.setattr(checkpoints, "seal", seal_what_the_disk_then_loses)
    assert checkpoints_of(stopped) == ["00-00000002", BEFORE]
    train_tiny(stopped, resume=True)
    assert checkpoints_of(stopped) == ["00-00000002", BEFORE, NEWEST]
    (line,) = warnings_in(caplog)
    assert f"{NEWEST} was written, but is damaged: model.safetensors has changed" in line


def test_runs_that_share_a_disk_leave_each_other_alone(undisturbed, stopped, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(undisturbed, other)
    scratch = tmp_path / "scratch"
    (stopped / "checkpoints").rename(scratch)
    shutil.rmtree(other / "checkpoints")
    for folder in (stopped, other):
        (folder / "checkpoints").symlink_to(scratch)
    before = digests_of(tmp_path / "scratch"), digests_of(other)
    with pytest.raises(ValueError, match="holds checkpoints of other runs only; put those of this run back"):
        train_tiny(other, resume=True)
    assert (digests_of(tmp_path / "scratch"), digests_of(other)) == before
    train_tiny(stopped, resume=True)
    assert_equal_runs(stopped, undisturbed)


def test_checkpoints_out_of_reach_are_an_error(copy):
    (copy / "checkpoints").rename(copy.parent / "scratch")
    (copy / "checkpoints").symlink_to(copy.parent / "unmounted")
    before = digests_of(copy)
    with pytest.raises(ValueError, match="checkpoints is no folder, nor a link to one that is there"):
        train_tiny(copy, resume=True)
    assert digests_of(copy) == before


def test_a_run_may_begin_with_a_link_to_another_disk(undisturbed, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "thesis.tex").write_text("years")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    train_tiny(tmp_path / "run")
    assert_equal_runs(tmp_path / "run", undisturbed)
    assert checkpoints_of(tmp_path / "run") == [BEFORE, NEWEST, "thesis.tex"]


def test_a_copy_without_hidden_files_goes_on(undisturbed, stopped, tmp_path):
    (stopped / ".run").unlink()
    train_tiny(stopped, resume=True)
    assert_equal_runs(stopped, undisturbed)
    assert checkpoints_of(stopped) == [BEFORE, NEWEST]


def test_damaged_settings_are_named(copy):
    (copy / "config.yaml").write_bytes(b"stages: [\xff")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged .*; put a copy back"):
        train_tiny(copy, resume=True)


def test_all_processes_load_what_the_main_one_chose(stopped, monkeypatch):
    chosen = stopped / "checkpoints" / "00-00000002"  # there is a newer one

    def from_the_main_process(told):
        told[:] = [None, "0" * 32, chosen]

    monkeypatch.setattr(processes, "broadcast_object_list", from_the_main_process)
    other = SimpleNamespace(is_main_process=False)
    run = processes.begin_together(other, stopped, {}, {}, resume=True)
    assert run.checkpoint == chosen
    assert not run.writes


def test_a_later_stage_goes_on_from_its_checkpoint(tmp_path):
    two = {"stages": [Stage("classify", 1), Stage("classify", 1, lr=1e-3)]}
    train_tiny(tmp_path / "alone", **two)
    assert checkpoints_of(tmp_path / "alone") == ["01-00000001", "01-00000002"]
    shutil.copytree(tmp_path / "alone", tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "01-00000002" / "progress.pt", flipped)
    train_tiny(tmp_path / "run", resume=True, **two)
    assert_equal_runs(tmp_path / "run", tmp_path / "alone")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("someone's")
    with pytest.raises(OSError, match=r"output='.*file/run' cannot be written \(.*\); give another --output"):
        train_tiny(tmp_path / "file" / "run")
    assert os.listdir(tmp_path) == ["file"]
