"""The arrows of DESIGN.md: who may import whom, and what an import costs.

`python -m tests.test_architecture` prints the rooms and their arrows.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "src" / "sparsifiner"

# floors from the bottom; a module belongs to the longest name that it begins with
FLOORS = (
    (
        *("files", "lazy", "device", "eager", "svg", "tuned", "version"),
        *("choices", "checks", "hashed", "ratios", "backend_names"),
    ),
    ("geometry",),
    ("ops",),
    ("scorers", "tokens"),
    ("config", "old_spellings"),
    ("plan",),
    ("standin", "attention"),
    ("blocks", "hosts"),
    ("convert", "models"),
    ("tracing", "macs", "published"),
    ("calibration", "training", "data", "measure", "compare", "viz", "demo"),
    ("cli", "__main__"),
    ("",),  # the package itself, which loads names on first use
)

# what a picture-maker may know of the project: it takes rows and plain values
OF_PICTURES = {"files", "svg"}

# what the product and calibration may need: torch, timm, safetensors, and what these need themselves
LABORATORY = (
    "accelerate",
    "datasets",
    "docstring_parser",
    "jsonargparse",
    "matplotlib",
    "sklearn",
    "tensorboard",
)


def name_of(file):
    parts = list(file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports():
    """Pairs of modules, of which the first imports the second, for types alone or on first use aside."""
    modules = {name_of(file): file for file in SOURCE.rglob("*.py")}
    for name, file in modules.items():
        tree = ast.parse(file.read_text())
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if node in for_types:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sparsifiner":
                module = (node.module or "").removeprefix("sparsifiner").removeprefix(".")
                for alias in node.names:
                    inner = f"{module}.{alias.name}".removeprefix(".")
                    yield name, inner if inner in modules else module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "sparsifiner":
                        yield name, alias.name.removeprefix("sparsifiner").removeprefix(".")


def floor_of(module):
    """Number of the floor, and the name by which it is known there."""
    known = [
        (len(room), floor, room)
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or (room and module.startswith(f"{room}."))
    ]
    assert known, f"{module} stands on no floor; add it to FLOORS and DESIGN.md"
    _, floor, room = max(known)
    return floor, room


def runs_up(importer, imported):
    return floor_of(imported)[0] > floor_of(importer)[0]


def test_arrows_run_down():
    up = {arrow for arrow in imports() if runs_up(*arrow)}
    assert up == set(), "these imports run up; move what is needed down, or hand it in"


def test_picture_makers_take_rows_and_import_nobody():
    arrows = set(imports())
    drawing = {importer for importer, imported in arrows if imported == "svg"}
    drawing |= {
        name_of(file)
        for file in SOURCE.rglob("*.py")
        if "matplotlib" in file.read_text() or "<svg" in file.read_text()
    }
    drawing -= OF_PICTURES
    assert drawing >= {
        "calibration.picture",
        "compare.pareto",
        "measure.break_even",
        "training.report",
        "viz.figures",
    }
    assert {(a, b) for a, b in arrows if a in drawing and b not in OF_PICTURES} == set()


def test_backends_do_not_import_each_other():
    kinds = ("reference", "torch_backend", "cpu_backend", "triton_backend")
    own = {(a, b) for a, b in imports() if a.startswith("ops.") and b.startswith("ops.")}
    ends = {(a.rpartition(".")[2], b.rpartition(".")[2]) for a, b in own}
    assert {(a, b) for a, b in ends if a in kinds and b in kinds and a != b} == set()


def test_files_are_short():
    root = SOURCE.parents[1]
    folders = [root / "src", root / "csrc", root / "benchmarks"]
    files = [file for folder in folders for end in ("py", "cpp", "h") for file in folder.rglob(f"*.{end}")]
    long = {str(file.relative_to(root)) for file in files if len(file.read_text().splitlines()) > 420}
    assert len(files) > 100
    assert long == set()


def run_alone(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_importing_the_package_costs_no_torch():
    done = run_alone(
        "import sys, sparsifiner; assert 'sparsify' in dir(sparsifiner); print('torch' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


OPTIONS = (
    *("BigBird", "DynamicViT", "EViT", "Impact", "LowRank", "Oracle", "Pooled", "Random", "Released"),
    *("SparsifyConfig", "Strided", "ToMe", "Window"),
)


@pytest.mark.parametrize(
    "program",
    [
        "import sparsifiner.config",
        "import sparsifiner.choices",
        "from sparsifiner.scorers import SCORERS; print(SCORERS.read('impact').pool)",
        "from sparsifiner.tokens import TOKENS; print(TOKENS.read('tome').counts(12, 196, 1)[0].attention)",
        f"import sparsifiner; print(*[getattr(sparsifiner, name)() for name in {OPTIONS}])",
        "import sparsifiner; sparsifiner.SparsifyConfig(keep=.2, scorer='released', tile=1, summary=None)",
        "from sparsifiner.config import *; config_from_dict(config_to_dict(make_config('paper', keep=.3)))",
    ],
)
def test_options_cost_neither_torch_nor_timm(program):
    done = run_alone(f"{program}; import sys; print({{'torch', 'timm'}} & set(sys.modules) or 'neither')")
    assert done.stdout.endswith("neither\n"), done.stderr


def test_timm_knows_our_models_once_options_are_used_beside_it():
    done = run_alone("import timm, sparsifiner; sparsifiner.Impact(); print(timm.is_model('lvvit_s'))")
    assert done.stdout == "True\n", done.stderr


def test_the_core_needs_torch_timm_and_safetensors_alone():
    program = f"""
import sys
sys.modules |= dict.fromkeys({LABORATORY!r})  # as if they were missing
import sparsifiner, timm, torch
model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, embed_dim=48, num_heads=3).eval()
sparsifiner.sparsify(model, keep=0.3, tile=2)
images = torch.randn(2, 3, 96, 96)
with torch.no_grad(), sparsifiner.trace(model) as traces:
    model(images)
sparsifiner.calibrate(model, [images], progress=False)
macs = sparsifiner.count_macs(model, (3, 96, 96)).to_dict()
print(len(traces), macs["sparse"]["total"] > 0, timm.is_model("lvvit_s"))
"""
    done = run_alone(program)
    assert done.stdout == "2 True True\n", done.stderr


def test_the_command_line_says_what_it_needs():
    missing = "import sys; sys.modules['jsonargparse'] = None; from sparsifiner.__main__ import main; main()"
    done = run_alone(missing)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "sparsifiner: import of jsonargparse halted; None in sys.modules; "
        "install it with pip install 'sparsifiner[all]'"
    ]


def test_names_that_are_not_there_are_an_attribute_error():
    done = run_alone("import sparsifiner; sparsifiner.sparsifyer")
    assert "AttributeError: module 'sparsifiner' has no attribute 'sparsifyer'" in done.stderr


@pytest.mark.parametrize("room", ["sparsifiner", "sparsifiner.training"])
def test_all_names_load(room):
    package = __import__(room, fromlist=["__all__"])
    for name in package.__all__:
        assert getattr(package, name) is not None


def main():
    arrows = {(floor_of(a)[1], floor_of(b)[1]) for a, b in imports()}
    for floor, rooms in reversed(list(enumerate(FLOORS))):
        for room in rooms:
            targets = sorted(other or "sparsifiner" for own, other in arrows if own == room and other != room)
            print(f"{floor:2} {room or 'sparsifiner':14} -> {', '.join(targets) or 'nobody'}")
    up = sorted((a or "sparsifiner", b or "sparsifiner") for a, b in set(imports()) if runs_up(a, b))
    print(f"{len(up)} arrows that run up:", ", ".join(f"{a} -> {b}" for a, b in up))


if __name__ == "__main__":
    main()
