"""The benchmark of operations: refuses wrong backends, compares with the fastest, keeps all rows."""

import csv
import functools
import json
import multiprocessing
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from sparsifiner.config import make_config
from sparsifiner.files import write_aside
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.measure import rivals
from sparsifiner.measure.bench_ops import BACKWARD, EVERYTHING, FORWARD, OpsBenchmark, benchmark_operations
from sparsifiner.measure.parity import ParityError
from sparsifiner.measure.records import append_rows, command_of, provenance
from sparsifiner.measure.results import open_results, save_results
from sparsifiner.ops.sparse_attention import torch_backend
from sparsifiner.scorers import Impact

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
    blocks = ("blocks of 4x4 keys", "blocks of 8x8 keys")
    whole = (EVERYTHING, "dense: sdpa", "dense: matmul", "flex attention", "masked dense", *blocks)
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
    assert left_out == {"flex attention", "blocks of 4x4 keys", "blocks of 8x8 keys"}


def test_keys_are_chosen_by_the_scorer_of_the_preset():
    assert OpsBenchmark().cases()[0].config.scorer == make_config("fast").scorer
    assert OpsBenchmark(pool=2).cases()[0].config.scorer == Impact(pool=2)


def test_the_distance_to_dense_stands_beside_what_chose_keys():
    rows = {row["part"]: row for row in measure(grid=12, keep=0.4, tile=4, summary=4)}
    chose = ("attend", EVERYTHING, "blocks of 4x4 keys", "blocks of 8x8 keys")
    assert {part for part, row in rows.items() if "relative_l2" in row} == set(chose)
    assert rows[EVERYTHING]["relative_l2"] == rows["attend"]["relative_l2"]
    for part in chose:
        assert 0 < rows[part]["relative_l2"] < 1
    # of 58 keys besides the prefix 3.6 blocks of 16, and most of one of 64 where all are whole
    assert rows["blocks of 4x4 keys"]["key_visits"] == pytest.approx((1 + 4 * 16 + 9) / 145)


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

    def test_block_lists_name_the_blocks_of_the_largest_means(self):
        layout = TokenLayout((4, 6), prefix=1)
        q, k = torch.randn(2, 1, 2, 25, 8).unbind()
        lists = rivals.block_lists(q, k, layout, tile=2, side=4, budget=17)
        assert lists.indices.shape == (1, 2, 6, 17)  # 1 block and the prefix
        patches = torch.arange(24).view(4, 6)
        blocks = [(patches[:, :4], 0), (patches[:, 4:], 1)]
        means = torch.stack([k[:, :, 1 + block.flatten()].mean(2) for block, _ in blocks], 2)
        query = q[:, :, 1 + patches[:2, 2:4].flatten()].mean(2)  # of the second tile
        best = (query[:, :, None] * means).sum(-1).argmax(-1)[0]
        for head in (0, 1):
            expected = [0, *(1 + blocks[best[head]][0].flatten()).tolist()]
            assert lists.indices[0, head, 1].tolist() == expected + [-1] * (17 - len(expected))

    def test_blocks_that_are_larger_than_lists_are_refused(self):
        q = torch.randn(1, 2, 64, 8)
        with pytest.raises(ValueError, match="a list of 6 keys has no room for a block of 4x4"):
            rivals.block_lists(q, q, TokenLayout((8, 8)), tile=2, side=4, budget=6)

    def test_the_distance_to_dense_is_none_of_dense(self):
        q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
        dense = rivals.matmul_attention(q, k, v)
        assert rivals.distance_to_dense(dense, (q, k, v)) < 1e-6
        assert rivals.distance_to_dense(0 * dense, (q, k, v)) == 1

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
            ({"scorer": "pooled", "pool": 2}, "pool=2 is an option of scorer='impact', not of 'pooled'"),
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
