"""Function transforms, second derivatives and compilers, as the dense model takes them."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import sparsifiner
from sparsifiner import ToMe
from sparsifiner.models.linformer import linformer


def make_model(*, fused=True, depth=2, **options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    set_fused_attn(fused)
    try:
        return VisionTransformer(depth=depth, **sizes, **options).eval()
    finally:
        set_fused_attn(True)


def make_images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


SETTINGS = [
    {"keep": 0.3, "tile": 2},
    {"keep": 0.3, "tile": 2, "backend": "torch"},
    {"keep": 0.3, "tile": 2, "backend": "reference"},
    {"keep": 0.3, "preset": "paper"},
]


def loss(model, parameters, images):
    return functional_call(model, parameters, (images,)).logsumexp(1).sum()


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained", "ignore:There is a performance drop")
def test_gradients_of_transforms_are_those_of_autograd(options):
    model, images = sparsifiner.sparsify(make_model(), **options), make_images()
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    model(images).logsumexp(1).sum().backward()
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    by_grad = grad(lambda inner: loss(model, inner, images))(parameters)
    (by_vjp,) = vjp(lambda inner: loss(model, inner, images), parameters)[1](torch.ones(()))
    for name, gradient in expected.items():
        tolerance = 1e-4 * gradient.abs().max() + 1e-7
        assert (by_grad[name] - gradient).abs().max() <= tolerance, name
        assert (by_vjp[name] - gradient).abs().max() <= tolerance, name
    row = torch.autograd.functional.jacobian(lambda image: model(image[None])[0], images[0])
    by_jacrev = jacrev(lambda image: model(image[None])[0])(images[0])
    assert (by_jacrev - row).abs().max() < 1e-4 * row.abs().max()


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained", "ignore:There is a performance drop")
def test_gradients_of_each_sample_are_those_of_it_alone(options):
    model, images = sparsifiner.sparsify(make_model(), **options), make_images()
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    together = vmap(grad(lambda inner, image: loss(model, inner, image[None])), (None, 0))(parameters, images)
    for index, image in enumerate(images):
        alone = grad(lambda inner, image: loss(model, inner, image[None]))(parameters, image)
        for name, gradient in alone.items():
            tolerance = 1e-4 * gradient.abs().max() + 1e-7
            assert (together[name][index] - gradient).abs().max() <= tolerance, name


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.filterwarnings("ignore:the low-rank scorer is untrained")
def test_models_made_without_fused_attention_can_be_differentiated_twice(options):
    model, images = sparsifiner.sparsify(make_model(fused=False), **options), make_images().requires_grad_()
    value = model(images).logsumexp(1).sum()
    (gradient,) = torch.autograd.grad(value, images, create_graph=True)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    (curvature,) = torch.autograd.grad((gradient * direction).sum(), images)
    # which keys are listed changes nowhere near this point but by chance: fp64 and a short step
    exact, point = model.double(), images.detach().double()

    def gradient_at(step):
        moved = (point + step * direction).requires_grad_()
        return torch.autograd.grad(exact(moved).logsumexp(1).sum(), moved)[0]

    expected = (gradient_at(1e-6) - gradient_at(-1e-6)) / 2e-6
    assert (curvature - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("tokens", [None, ToMe(4)])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_models_made_without_fused_attention_compute_the_same_without_fused_kernels(
    monkeypatch, tokens, keep
):
    options = {"keep": keep, "tile": 2, "tokens": tokens, "backend": "torch"}
    images = make_images()
    expected = sparsifiner.sparsify(make_model(), **options)(images)
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    model = sparsifiner.sparsify(make_model(fused=False), **options)
    assert (model(images) - expected).abs().max() < 1e-5
    assert linformer(make_model(fused=False), keep=0.3)(images).shape == (2, 5)


def test_forward_mode_follows_models_made_without_fused_attention():
    model, images = sparsifiner.sparsify(make_model(fused=False), keep=0.3, tile=2), make_images()
    direction = torch.ones_like(images)
    _, tangent = jvp(model, (images,), (direction,))
    _, expected = torch.autograd.functional.jvp(model, images, direction)
    assert (tangent - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{}, {"backend": "torch"}, {"backend": "reference"}, {"tokens": ToMe(4)}, {"keep": 1.0}]
)
@pytest.mark.parametrize("gradients", [False, True])
def test_torchscript_is_refused_in_one_line(options, gradients):
    model = sparsifiner.sparsify(make_model(), **{"keep": 0.3, "tile": 2, **options})
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(RuntimeError, match=r"^torch\.jit\.trace: TorchScript is"),
    ):
        torch.jit.trace(model, make_images())


@pytest.mark.parametrize(
    ("options", "gradients", "most"),
    [({}, False, 3), ({"backend": "torch"}, False, 5), ({"share": 2}, False, 5), ({}, True, 5)],
)
def test_blocks_compiled_one_by_one_have_few_graphs(options, gradients, most):
    torch.compiler.reset()
    sizes = {"depth": 10, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("deit_tiny_patch16_224", **sizes).eval()
    sparsifiner.sparsify(model, keep=0.1, tile=4, **options)
    images, counter = torch.randn(1, 3, 224, 224), CompileCounter()
    with torch.set_grad_enabled(gradients):
        expected = model(images)
        for block in model.blocks:
            block.compile(backend=counter)
        assert (model(images) - expected).abs().max() < 1e-5
    assert 1 < counter.frame_count <= most


@torch.no_grad()
def test_a_model_compiled_as_a_whole_has_one_graph():
    torch.compiler.reset()
    model, counter = sparsifiner.sparsify(make_model(depth=4), keep=0.1, tile=2), CompileCounter()
    images = make_images()
    assert (torch.compile(model, backend=counter)(images) - model(images)).abs().max() < 1e-5
    assert counter.frame_count == 1


@torch.no_grad()
def test_blocks_compiled_one_by_one_keep_their_own_shares_at_another_size():
    torch.compiler.reset()
    model = make_model(depth=8, dynamic_img_size=True)
    sparsifiner.sparsify(model, keep=0.2, tile=2, tokens=ToMe(4))
    images = torch.randn(1, 3, 96, 96)
    expected = model(images)
    for block in model.blocks[4:7]:
        block.compile(backend="eager")
    assert (model(images) - expected).abs().max() < 1e-6
