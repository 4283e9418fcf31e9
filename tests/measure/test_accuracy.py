"""Accuracy and timing against small cases worked out by hand."""

import math

import pytest
import timm
import torch
from torch import nn

from sparsifiner.measure.accuracy import evaluate


class Fixed(nn.Module):
    """Gives the logits of a table, by the number in each image."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images):
        return self.logits[images[:, 0, 0, 0].long()]


LABELS = torch.tensor([0, 1, 2, 0])
IMAGES = torch.arange(4.0).view(4, 1, 1, 1)
MODEL = [[9.0, 0, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5.0]]
DENSE = [[9.0, 0, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0], [5, 1, 2, 3, 4, 0.0]]


def test_accuracy_beside_the_twin():
    batches = [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]
    report = evaluate(Fixed(MODEL), batches, dense=Fixed(DENSE), progress=False)
    assert report.images == 4
    assert report.top1 == 50
    assert report.top5 == 75  # the last image's label is the sixth class
    against = report.against_dense
    assert (against.dense_top1, against.difference, against.agreement) == (100, -50, 50)
    # differences 0, 0, -1, -1: standard deviation sqrt(1/3)
    assert against.interval == pytest.approx(100 * 1.96 * math.sqrt(1 / 3) / 2)
    p, q = (torch.tensor(x, dtype=torch.float64).softmax(1) for x in (DENSE, MODEL))
    assert against.logit_kl == pytest.approx((p * (p / q).log()).sum(1).mean().item())


def test_accuracy_alone():
    report = evaluate(Fixed(DENSE), [(IMAGES, LABELS)], progress=False)
    assert report.top1 == 100
    assert report.to_dict()["against_dense"] is None
    assert report.images_per_second > 0


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no image to evaluate"):
        evaluate(Fixed(DENSE), [], progress=False)


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_patch_tokens_beside_those_of_the_twin(pooling):
    torch.manual_seed(0)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
        "num_classes": 3,
    }
    model, dense = (timm.create_model("deit_tiny_patch16_224", **arguments).eval() for _ in range(2))
    images, labels = torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.int64)
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    same = evaluate(model, batches, dense=model, progress=False).against_dense
    assert same.token_cosine == pytest.approx(1)
    assert same.token_error == 0
    against = evaluate(model, batches, dense=dense, progress=False).against_dense
    with torch.no_grad():
        ours, theirs = (each.forward_features(images)[:, 1:] for each in (model, dense))
        if pooling == "avg":  # whose final norm comes behind the pooling
            ours, theirs = model.fc_norm(ours), dense.fc_norm(theirs)
        ours, theirs = ours.double(), theirs.double()
    cosine = (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
    assert against.token_cosine == pytest.approx(cosine.mean().item())
    error = (ours - theirs).square().sum(-1).sqrt() / theirs.norm(dim=-1)
    assert against.token_error == pytest.approx(error.mean().item())
