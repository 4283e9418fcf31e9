"""`python -m tests.stress.kills --kills 40`: kills training at random moments, and meddles in between.

Each run is killed a few times (SIGKILL). Before it resumes, files of others appear among its checkpoints,
these move to another disk and a link stays, or the newest of them is damaged. In the end the run must have
left the same weights and measurements, to the bit, as one that was left alone, every file of others must be
as it was, and the output must tell of each fall-back.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

import sparsifiner
from sparsifiner.data import open_images
from sparsifiner.scorers import LowRank
from sparsifiner.training import Recipe, Stage, loop, train
from sparsifiner.training.checkpoints import named_checkpoints
from sparsifiner.training.seal import find_damage
from tests.processes import clean_processes
from tests.training.damages import DAMAGES, damage
from tests.training.runs import assert_equal_runs, digests_of

_MOST_KILLS = 6  # of one run
_FOREIGN = ("file", "folder", "link", "copy", "unfinished")
_FILES = (
    "model.safetensors", "optimizer.bin", "progress.pt", "random_states_0.pkl", "run.txt", "manifest.json",
)  # fmt: skip


def train_small(folder, workers):
    """The paper's scorer alone, then with the backbone: 18 steps, a checkpoint after every second one."""
    warnings.filterwarnings("ignore", "the low-rank scorer is untrained")
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=10, drop_path_rate=0.2
    )
    sparsifiner.sparsify(model, preset="paper", keep=0.5, scorer=LowRank(basis=8, coef_topk=4))
    stages = [Stage("reconstruct", 1, lr=3e-3), Stage("joint", 2, lr=1e-3)]
    train(
        model,
        open_images("digits", "train", limit=48),
        open_images("digits", limit=8),
        Recipe(stages, batch_size=8, log_every=2, checkpoint_every=2, ema_decay=0.9, workers=workers),
        folder,
        resume=folder.exists(),
        device="cpu",
        progress=False,
    )


def train_logged(folder, workers, log, reports):
    """In a process of its own: all that it says goes to a file."""
    torch.set_num_threads(1)  # as of the run that is left alone
    if not reports:
        loop.write_training_report = lambda file, records: None
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    logging.basicConfig(stream=os.fdopen(2, "w"), format="%(message)s", level=logging.WARNING, force=True)
    train_small(folder, workers)


@dataclass
class KilledRun:
    """A run, what is done to it, and what it must say.

    Attributes:
        folder: everything of it, also what lies elsewhere.
        draw: decides.
        reports: whether its processes draw reports.
        kills: how many processes were killed.
        linked: whether the checkpoints are behind a link.
        foreign: what others keep among the checkpoints, by name.
        fallbacks: names of checkpoint and file that were damaged, and how far the output was.
    """

    folder: Path
    draw: random.Random
    reports: bool = True
    kills: int = 0
    linked: bool = False
    foreign: dict[str, object] = field(default_factory=dict)
    fallbacks: list[tuple[str, str, int]] = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir()
        self.run, self.log, self.scratch = (self.folder / name for name in ("run", "log", "scratch"))
        self.checkpoints = self.run / "checkpoints"
        self.log.touch()

    def process(self, kill_after=None):
        """Trains until the end, or until it is killed some seconds later; the exit code."""
        context = clean_processes("tests.stress.kills")
        arguments = self.run, self.draw.choice((0, 0, 1)), self.log, self.reports
        process = context.Process(target=train_logged, args=arguments)
        process.start()
        if kill_after is not None:
            process.join(kill_after)
            process.kill()
        process.join()
        self.kills += process.exitcode == -signal.SIGKILL
        return process.exitcode

    def meddle(self):
        """What befalls the folder while nobody trains in it."""
        if not self.checkpoints.is_dir():
            return
        if not self.linked and self.draw.random() < 0.3:
            self.checkpoints.rename(self.scratch)
            self.checkpoints.symlink_to(self.scratch)
            self.linked = True
        if self.draw.random() < 0.7:
            self.add_foreign(self.draw.choice(_FOREIGN))
        intact = [each for each in named_checkpoints(self.checkpoints) if find_damage(each) is None]
        if len(intact) > 1 and self.draw.random() < 0.7:
            name = self.draw.choice(_FILES)
            damage(intact[0] / name, self.draw.choice(DAMAGES))
            self.fallbacks.append((intact[0].name, name, len(self.log.read_text())))

    def add_foreign(self, kind):
        entry = self.checkpoints / f"{kind} {len(self.foreign)}"
        own = named_checkpoints(self.checkpoints)
        if kind == "file":
            entry.write_text("years")
        elif kind == "link":
            elsewhere = self.folder / entry.name
            elsewhere.mkdir()
            (elsewhere / "x.tex").write_text("years")
            # a name that the run may give to a checkpoint, too
            entry = self.checkpoints / f"00-{10**8 + len(self.foreign)}"
            entry.symlink_to(elsewhere)
        elif kind == "copy" and own:
            shutil.copytree(own[0], entry)
        else:
            entry = self.checkpoints / kind if kind == "unfinished" else entry
            entry.mkdir(exist_ok=True)
            (entry / "x.tex").write_text("years")
        self.foreign[entry.name] = None
        self.foreign |= {name: self.contents(name) for name in self.foreign}

    def contents(self, name):
        """What an entry among the checkpoints is and holds, behind a link too."""
        entry = self.checkpoints / name
        if not os.path.lexists(entry):
            return None
        link = os.readlink(entry) if entry.is_symlink() else None
        return link, entry.read_bytes() if entry.is_file() else digests_of(entry.resolve())

    def faults(self, undisturbed):
        """What is not as it must be, at the end."""
        try:
            assert_equal_runs(self.run, undisturbed)
        except AssertionError as error:
            yield f"the result differs: {error}"
        for name, content in self.foreign.items():
            if self.contents(name) != content:
                yield f"{name} was touched"
        said = self.log.read_text()
        for checkpoint, name, start in self.fallbacks:
            lines = [
                line for line in said[start:].splitlines() if f"{checkpoint} is damaged: {name} " in line
            ]
            if not lines or "the run goes on from the one before, " not in lines[0]:
                yield f"nothing was said of {checkpoint}/{name}"
        own = {entry.name for entry in self.checkpoints.iterdir()} - self.foreign.keys()
        if own != {"01-00000010", "01-00000012"}:
            yield f"the checkpoints that are left are {sorted(own)}"
        if self.linked and not self.checkpoints.is_symlink():
            yield "the link to the checkpoints is gone"


def main(arguments=None):
    """Exit code: 0 if every run was as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="processes that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of moments and what is done between them")
    parser.add_argument("--no-reports", action="store_true", help="do not draw them, which takes longest")
    options = parser.parse_args(arguments)
    reports = not options.no_reports
    draw = random.Random(options.seed)
    rows, kills, failed = [], 0, False
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)  # as of the others
        alone, again = (KilledRun(Path(folder) / name, draw, reports) for name in ("alone", "again"))
        train_small(alone.run, workers=0)
        start = time.perf_counter()
        if again.process() != 0:
            print(again.log.read_text())
            return 1
        seconds = time.perf_counter() - start
        while kills < options.kills:
            run = KilledRun(Path(folder) / f"run {len(rows)}", draw, reports)
            wanted = min(draw.randint(1, _MOST_KILLS), options.kills - kills)
            code = None
            while run.kills < wanted and code != 0:
                code = run.process(kill_after=draw.uniform(0, seconds / 2))  # most are killed
                run.meddle()
            code = run.process()
            faults = list(run.faults(alone.run))
            faults += [f"exit code {code}: {run.log.read_text()[-2000:]}"] * (code != 0)
            kills += run.kills
            failed = failed or bool(faults)
            rows.append((run, faults))
            print(
                f"{kills:3} of {options.kills} kills: {'; '.join(faults) or 'equal to the bit'}", flush=True
            )
        print(f"\n{'run':>4}{'kills':>7}{'damaged':>9}{'foreign':>9}{'linked':>8}  result")
        for number, (run, faults) in enumerate(rows):
            figures = f"{run.kills:7}{len(run.fallbacks):9}{len(run.foreign):9}{run.linked!s:>8}"
            print(f"{number:4}{figures}  {'failed' if faults else 'equal'}")
        sums = [sum(run.kills for run, _ in rows), sum(len(run.fallbacks) for run, _ in rows)]
        sums += [sum(len(run.foreign) for run, _ in rows), sum(run.linked for run, _ in rows)]
        print(f" sum{sums[0]:7}{sums[1]:9}{sums[2]:9}{sums[3]:8}  {'failed' if failed else 'all equal'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
