"""Mask recall against the dense attention under the mask."""

import pytest
import torch

import sparsifiner
from sparsifiner.measure import recall
from sparsifiner.measure.recall import mask_recall
from sparsifiner.tracing import trace_projections
from tests.models import make_images, make_model

pytestmark = pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")

SIZE = (80, 48)  # 5 x 3 patches of 16


def make_sparse(**options):
    return sparsifiner.sparsify(make_model("deit distilled", img_size=SIZE), preset="paper", **options)


@pytest.mark.parametrize(("tile", "keep"), [(1, 0.3), (3, 0.3), (3, [0.2, 0.5])])
@pytest.mark.parametrize("chunk_elements", [2**24, 1, 3000])
def test_is_the_attention_under_the_mask(tile, keep, chunk_elements, monkeypatch):
    monkeypatch.setattr(recall, "_CHUNK_ELEMENTS", chunk_elements)
    model = make_sparse(tile=tile, keep=keep)
    images = make_images(SIZE, batch=3)
    with sparsifiner.trace(model) as traces, trace_projections(model) as projections, torch.no_grad():
        model(images)
    expected = []
    for layer, (q, k) in enumerate(projections):
        attention = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)
        mask = traces[layer].connectivity.to_mask()
        expected.append((attention * mask)[:, :, 2:].sum(-1).mean().item())
    assert all(0.1 < share < 0.95 for share in expected)
    assert mask_recall(model, [(images, None)]) == pytest.approx(expected, abs=1e-6)
    batches = [(images[:1], None), (images[1:], None)]
    assert mask_recall(model, batches) == pytest.approx(expected, abs=1e-6)


def test_is_one_where_layers_stay_dense():
    first, second = mask_recall(make_sparse(keep=[1.0, 0.3]), [(make_images(SIZE), None)])
    assert first == pytest.approx(1, abs=1e-6)
    assert second < 0.95


def test_is_empty_for_dense_models():
    assert mask_recall(make_model("deit", img_size=SIZE), [(make_images(SIZE), None)]) == []


def test_needs_an_image():
    with pytest.raises(ValueError, match="no image"):
        mask_recall(make_sparse(), [])


def test_projections_of_dense_and_sparse_models_are_those_of_their_layers():
    images = make_images(SIZE)
    dense = make_model("qk norm", img_size=SIZE)
    sparse = sparsifiner.sparsify(make_model("qk norm", img_size=SIZE), keep=1.0)
    sparse.load_state_dict(dense.state_dict())
    found = []
    for model in (dense, sparse):
        seen = []
        handle = model.blocks[1].norm1.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out)
        )
        with trace_projections(model) as projections:
            model(images)
            model(images)
        handle.remove()
        assert len(projections) == 2
        assert not any(tensor.requires_grad for layer in projections for tensor in layer)
        layer = sparse.blocks[1].attn
        q, k, _ = layer.project(seen[-1])
        assert torch.equal(projections[1][0], q)
        assert torch.equal(projections[1][1], k)
        found.append(projections)
        assert not model.blocks[0].attn.qkv._forward_hooks
    assert torch.allclose(found[0][0][0], found[1][0][0])
