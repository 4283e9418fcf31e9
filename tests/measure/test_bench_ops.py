"""The benchmark of operations: refuses wrong backends, compares with the fastest, keeps all rows."""

import csv
import functools
import json
import multiprocessing
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from sparsifiner.files import write_aside
from sparsifiner.measure import rivals
from sparsifiner.measure.bench_ops import BACKWARD, EVERYTHING, FORWARD, OpsBenchmark, benchmark_operations
from sparsifiner.measure.parity import ParityError
from sparsifiner.measure.records import append_rows, command_of, provenance
from sparsifiner.measure.results import open_results, save_results
from sparsifiner.ops.sparse_attention import torch_backend

APPENDS = 40
TINY = {
    "grid": [4, 6],
    "batch_size": 2,
    "heads": 2,
    "head_dim": 16,
    "dtype": "fp32",
    "keep": [0.5, 0.3],
    "tile": 2,
    "summary": 2,
    "prefix": 1,
    "device": "cpu",
    "runs": 2,
    "warmup": 0,
}


def measure(**options):
    return [row for rows in benchmark_operations(OpsBenchmark(**{**TINY, **options})) for row in rows]


def append_one_by_one(file, part):
    for row in range(APPENDS):
        append_rows(file, [{"part": part, "row": row}])


@pytest.fixture(scope="module")
def rows():
    return measure(backward=True)


def test_every_part_has_a_row_for_each_grid(rows):
    parts = {(row["part"], row["measure"]) for row in rows if row["tokens"] == 17}
    whole = (EVERYTHING, "dense: sdpa", "dense: matmul", "flex attention", "masked dense")
    both = {(part, passes) for part in whole for passes in (FORWARD, BACKWARD)}
    assert parts == both | {("select", FORWARD), ("attend", FORWARD)}
    assert {(row["tokens"], row["keep"], row["budget"]) for row in rows} == {(17, 0.5, 9), (37, 0.3, 12)}


def test_ratios_are_of_medians_to_the_fastest_dense_path(rows):
    for passes in (FORWARD, BACKWARD):
        own = {row["part"]: row for row in rows if row["tokens"] == 17 and row["measure"] == passes}
        dense = {name: row["median_ms"] for name, row in own.items() if name.startswith("dense")}
        fastest = min(dense, key=dense.get)
        for row in own.values():
            assert row["baseline"] == fastest
        everything = own[EVERYTHING]
        assert everything["ratio"] == dense[fastest] / everything["median_ms"]
        assert own[fastest]["ratio"] == 1


def test_rows_say_where_they_come_from(rows):
    for row in rows:
        assert row["device"].endswith("threads")
        assert row["torch"] == torch.__version__
        assert (row["dtype"], row["batch"], row["runs"]) == ("fp32", 2, 2)
        assert row["command"].startswith("sparsifiner bench ops --grid 4 6 --batch-size 2 --keep 0.5 0.3")
        assert row["parity_error"] <= row["parity_budget"]
        assert row["memory_bytes"] is row["memory_share"] is None  # the CPU counts none
    left_out = {row["part"] for row in rows if row["left_out"]}
    assert left_out == {"flex attention"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "options", [{"scorer": "lowrank"}, {"tile": 1, "summary": "none"}, {"summary": "auto"}]
)
def test_other_settings_pass_their_check(dtype, options):
    assert measure(dtype=dtype, grid=4, keep=0.4, backward=True, **options)


class TestParity:
    def check(self, match, **options):
        timed = []
        with pytest.raises(ParityError, match=match):
            timed += benchmark_operations(OpsBenchmark(**{**TINY, "backend": "torch", **options}))
        assert not timed

    def test_a_wrong_output_is_refused(self, monkeypatch):
        right = torch_backend.sparse_attention
        monkeypatch.setattr(torch_backend, "sparse_attention", lambda *args: 1.01 * right(*args))
        self.check(r"the output differs from the reference by 1\.00e-02 .* nothing was timed")

    def test_a_wrong_head_of_many_is_refused(self, monkeypatch):
        right = torch_backend.sparse_attention

        def wrong(*args):
            out = right(*args).clone()
            out[-1, -1] += 1
            return out

        monkeypatch.setattr(torch_backend, "sparse_attention", wrong)
        self.check("the output differs")

    def test_a_wrong_gradient_is_refused(self, monkeypatch):
        right = torch_backend.sparse_attention

        def wrong(q, k, v, *rest):
            v.requires_grad and v.register_hook(lambda gradient: 1.1 * gradient)
            return right(q, k, v, *rest)

        monkeypatch.setattr(torch_backend, "sparse_attention", wrong)
        self.check("the gradient of v differs", backward=True)

    def test_nan_is_refused(self, monkeypatch):
        right = torch_backend.sparse_attention
        monkeypatch.setattr(torch_backend, "sparse_attention", lambda *args: torch.nan * right(*args))
        self.check("the output differs")

    def test_a_wrong_selection_is_refused(self, monkeypatch):
        def first_keys(scores, budget):
            return torch.arange(budget, dtype=torch.int32).expand(*scores.shape[:-1], budget)

        monkeypatch.setattr("sparsifiner.ops.select.torch_backend.select_topk", first_keys)
        self.check("of the keys that the reference lists")


class TestRivals:
    def test_dense_paths_agree(self):
        q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
        paths = rivals.dense_paths(torch.device("cpu"))
        results = [path(q, k, v) for path in paths.values()]
        assert len(results) == 2
        torch.testing.assert_close(*results)
        masked = rivals.masked_dense_attention(torch.zeros(2, 2, 9, 9, dtype=torch.bool))
        torch.testing.assert_close(masked(q, k, v), results[0])

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize("tokens", [256, 1000])
    def test_random_blocks_have_the_density(self, tokens):
        blocks, density = rivals.random_blocks(tokens, 0.4, torch.Generator().manual_seed(0))
        side = -(-tokens // 128)
        assert density == round(0.4 * side) / side
        mask = blocks.to_dense()
        assert mask.shape[-2:] == (side, side)
        assert (mask.sum(-1) == density * side).all()
        q, k, v = torch.randn(3, 1, 2, tokens, 16).unbind()
        pairs = mask[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)[:tokens, :tokens]
        expected = rivals.masked_dense_attention(~pairs)(q, k, v)
        torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks), expected)

    def test_squares_that_are_too_large_are_not_made(self, monkeypatch):
        monkeypatch.setitem(rivals.LARGEST_SQUARE, "cpu", 100)
        rows = {row["part"]: row for row in measure(grid=4, keep=0.5)}
        for part in ("masked dense", "dense: matmul"):
            assert "[B, H, N, N] = [2, 2, 17, 17] has" in rows[part]["left_out"]
        assert rows[EVERYTHING]["baseline"] == "dense: sdpa"


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"batch_size": [1, 2, 3]},
                "batch_size has 3 entries, but grid has 2; give one number, or one per grid",
            ),
            ({"keep": [0.1, 1.5]}, "keep must lie in"),
            ({"grid": []}, "grid must hold at least one number"),
            ({"grid": 0}, "grid must be at least 1, got 0"),
            ({"runs": 1}, "runs must be at least 2, got 1"),
            ({"dtype": "fp8"}, "dtype='fp8' is unknown; choose one of bf16, fp16, fp32"),
            ({"tile": 0}, "tile must be at least 1"),
            ({"backend": "abacus"}, "backend='abacus' is unknown"),
        ],
    )
    def test_impossible_ones_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            OpsBenchmark(**{**TINY, **options})

    def test_counts_are_whole_numbers(self):
        with pytest.raises(TypeError, match=r"heads must be a whole number of at least 1, got 1\.5"):
            OpsBenchmark(heads=1.5)

    def test_the_command_names_what_is_not_the_default(self):
        settings = OpsBenchmark(grid=[16, 32], summary="none", backward=True, threads=2)
        words = "sparsifiner bench ops --grid 16 32 --summary none --backward --threads 2"
        assert command_of("bench ops", settings) == words


class TestResults:
    def test_rows_are_added_and_files_parse(self, rows, tmp_path):
        first = [row for row in rows if row["tokens"] == 17]
        second = [row for row in rows if row["tokens"] != 17]
        open_results(tmp_path / "new")
        save_results(tmp_path / "new", first)
        save_results(tmp_path / "new", second)
        kept = json.loads((tmp_path / "new" / "results.json").read_text())
        assert kept == [*first, *second]
        with (tmp_path / "new" / "results.csv").open() as stream:
            table = list(csv.DictReader(stream))
        assert [row["part"] for row in table] == [row["part"] for row in kept]
        assert float(table[0]["median_ms"]) == kept[0]["median_ms"]
        picture = ElementTree.parse(tmp_path / "new" / "break_even_ops.svg").getroot()
        assert picture.tag.endswith("svg")
        assert {path.name for path in (tmp_path / "new").iterdir()} == {
            *("results.json", ".results.json.lock", "results.csv", "break_even_ops.svg")
        }

    def test_no_row_of_two_writers_is_lost(self, tmp_path):
        file = tmp_path / "results.json"
        # processes that start anew bring no locks or threads of this one along
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            pool.map(functools.partial(append_one_by_one, file), ["a", "b"], chunksize=1)
        rows = json.loads(file.read_text())
        for part in ("a", "b"):
            assert [row["row"] for row in rows if row["part"] == part] == list(range(APPENDS))
        assert len(rows) == 2 * APPENDS
        assert not list(tmp_path.glob("*.unfinished"))

    def test_a_file_that_cannot_be_written_leaves_no_other(self, tmp_path):
        def write(aside):
            aside.write_text("half")
            raise OSError("no space left")

        with pytest.raises(OSError, match="no space"):
            write_aside(tmp_path / "results.json", write)
        assert not list(tmp_path.iterdir())

    def test_other_files_are_not_overwritten(self, tmp_path):
        file = tmp_path / "results.json"
        for text, message in (("[{", "cannot be read"), ("{}", "holds no list")):
            file.write_text(text)
            with pytest.raises(ValueError, match=message):
                append_rows(file, [{"part": "a"}])
            with pytest.raises(ValueError, match=message):
                open_results(tmp_path)
            assert file.read_text() == text

    def test_the_commit_may_be_given(self, monkeypatch):
        monkeypatch.setenv("COMMIT", "abc")
        assert provenance("cpu")["commit"] == "abc"
