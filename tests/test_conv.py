"""Convolutions against SciPy's correlation, a loop over the taps and its adjoint in float64, and PyTorch's conv3d."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend
from scipy import ndimage, signal  # type: ignore[import-untyped]

from dilformer_jax.ops import conv, conv_cpu, platforms

BATCH, CHANNELS, OUTPUTS = 2, 2, 3
# Kernel, dilation, volume: dense, dilated and axis-wise; odd, even and anisotropic volumes, some thinner than the
# reach.
DENSE = [
    ((3, 3, 3), 1, (7, 6, 5)),
    ((3, 3, 3), 2, (5, 8, 7)),
    ((3, 3, 3), 3, (4, 7, 2)),
    ((1, 1, 1), 2, (2, 3, 4)),
    ((3, 1, 1), 1, (4, 3, 2)),
    ((3, 1, 1), 2, (5, 2, 3)),
    ((1, 3, 1), 2, (2, 7, 4)),
    ((1, 1, 3), 1, (3, 2, 6)),
    ((5, 3, 1), 1, (6, 5, 4)),
]
DEPTHWISE = [((3, 3, 3), 1, (7, 6, 5)), ((3, 3, 3), 3, (4, 8, 5)), ((1, 5, 3), 2, (2, 9, 6))]
# Kernel size and volume, at stride 2; where the first tap stands before voxel 2i, and how far the volume is padded.
HALVING = [(2, (4, 6, 2)), (3, (6, 4, 8)), (4, (6, 2, 4))]
HALVING_PADDING = {2: (0, 0), 3: (1, 0), 4: (1, 1)}


@pytest.fixture(params=["small", "large"])
def forms(request, monkeypatch):
    """Those that small volumes have on the CPU, and those of large ones."""
    if request.param == "large":
        monkeypatch.setattr(conv_cpu, "SMALL", 0)


@pytest.fixture
def as_accelerator(monkeypatch):
    """The forms that GPU and TPU get, run on this machine whatever it is."""
    monkeypatch.setattr(platforms, "by_platform", lambda *operands, cpu, default: default(*operands))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def answers(function: Callable, *operands: np.ndarray) -> tuple[np.ndarray, ...]:
    """Value and the gradients of Σ value · cotangent, with respect to the image and the kernel."""
    x, kernel, cotangent = (jnp.asarray(operand, jnp.float32) for operand in operands)

    @jax.jit
    def both(x, kernel, cotangent):
        value, pull = jax.vjp(function, x, kernel)
        return value, *pull(cotangent)

    return tuple(np.asarray(answer) for answer in both(x, kernel, cotangent))


def by_taps(x, kernel, cotangent, *, stride=1, dilation=1, padding=None, depthwise=False):
    """Σ over taps of (the window each tap sees) · (its weight), and the adjoint of that sum."""
    sizes = kernel.shape[:3]
    padding = [(dilation * (size // 2),) * 2 for size in sizes] if padding is None else padding
    image = np.pad(x, ((0, 0), *padding, (0, 0)))
    value, to_image, to_kernel = np.zeros_like(cotangent), np.zeros_like(image), np.zeros_like(kernel)
    for tap in itertools.product(*map(range, sizes)):
        seen = (
            slice(None),
            *(
                slice(t * dilation, t * dilation + stride * (n - 1) + 1, stride)
                for t, n in zip(tap, cotangent.shape[1:4], strict=True)
            ),
        )
        if depthwise:
            value += image[seen] * kernel[tap]
            to_image[seen] += cotangent * kernel[tap]
            to_kernel[tap] = (image[seen] * cotangent).sum((0, 1, 2, 3))
        else:
            value += image[seen] @ kernel[tap]
            to_image[seen] += cotangent @ kernel[tap].T
            to_kernel[tap] = np.tensordot(image[seen], cotangent, ((0, 1, 2, 3), (0, 1, 2, 3)))
    inner = tuple(slice(before, before + n) for (before, _), n in zip(padding, x.shape[1:4], strict=True))
    return value, to_image[:, *inner], to_kernel


def by_scipy(x, kernel, dilation):
    """`scipy.ndimage.correlate` for each pair of channels, the kernel spread out with zeros between its taps."""
    spread = np.zeros([dilation * (size - 1) + 1 for size in kernel.shape[:3]] + list(kernel.shape[3:]))
    spread[::dilation, ::dilation, ::dilation] = kernel
    value = np.zeros((*x.shape[:4], kernel.shape[4]))
    for b, c, o in np.ndindex(x.shape[0], *kernel.shape[3:]):
        value[b, ..., o] += ndimage.correlate(x[b, ..., c], spread[..., c, o], mode="constant")
    return value


def by_torch(x, kernel, cotangent, **options):
    """Value and gradients by PyTorch's conv3d and autograd, in float64; channels last as the others."""
    torch = pytest.importorskip("torch")
    first = lambda array, order: torch.tensor(np.transpose(array, order).copy(), requires_grad=True)
    image, weight = first(x, (0, 4, 1, 2, 3)), first(kernel, (4, 3, 0, 1, 2))
    value = torch.nn.functional.conv3d(image, weight, **options)
    value.backward(torch.tensor(np.transpose(cotangent, (0, 4, 1, 2, 3)).copy()))
    last = lambda tensor, order: np.transpose(tensor.detach().numpy(), order)
    return last(value, (0, 2, 3, 4, 1)), last(image.grad, (0, 2, 3, 4, 1)), last(weight.grad, (2, 3, 4, 1, 0))


def assert_answers(got, *expected):
    for answer in expected:
        for name, ours, theirs in zip(("value", "to image", "to kernel"), got, answer, strict=True):
            assert ours.shape == theirs.shape, name
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max(), err_msg=name)


def dense_operands(kernel, volume):
    return (
        numbers(BATCH, *volume, CHANNELS),
        numbers(*kernel, CHANNELS, OUTPUTS, seed=1),
        numbers(BATCH, *volume, OUTPUTS, seed=2),
    )


def of_one_channel(operands):
    x, kernel, cotangent = operands
    return x[..., :1], kernel[..., :1, :], cotangent


def depthwise_operands(kernel, volume, channels=3):
    return numbers(2, *volume, channels), numbers(*kernel, channels, seed=1), numbers(2, *volume, channels, seed=2)


def halving_operands(size, volume):
    halved = tuple(n // 2 for n in volume)
    return (
        numbers(BATCH, *volume, CHANNELS),
        numbers(size, size, size, CHANNELS, OUTPUTS, seed=1),
        numbers(BATCH, *halved, OUTPUTS, seed=2),
    )


@pytest.mark.parametrize(("kernel", "dilation", "volume"), DENSE)
def test_conv_of_stride_one(kernel, dilation, volume, forms):
    x, weights, _ = operands = dense_operands(kernel, volume)
    got = answers(lambda x, k: conv.conv(x, k, dilation=dilation), *operands)
    expected = by_taps(*operands, dilation=dilation)
    np.testing.assert_allclose(expected[0], by_scipy(x, weights, dilation), atol=1e-12)
    assert_answers(got, expected)


@pytest.mark.parametrize(("kernel", "dilation", "volume"), DEPTHWISE)
def test_depthwise(kernel, dilation, volume):
    operands = depthwise_operands(kernel, volume)
    got = answers(lambda x, k: conv.depthwise(x, k, dilation=dilation), *operands)
    expected = by_taps(*operands, dilation=dilation, depthwise=True)
    diagonal = operands[1][..., None] * np.eye(3)
    np.testing.assert_allclose(expected[0], by_scipy(operands[0], diagonal, dilation), atol=1e-12)
    assert_answers(got, expected)


@pytest.mark.parametrize(("size", "volume"), HALVING)
def test_conv_of_stride_two(size, volume, forms):
    x, kernel, cotangent = operands = halving_operands(size, volume)
    got = answers(lambda x, k: conv.conv(x, k, stride=2), *operands)
    padding = (HALVING_PADDING[size],) * 3
    expected = by_taps(*operands, stride=2, padding=padding)
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    for b, o in np.ndindex(BATCH, OUTPUTS):
        everywhere = signal.correlate(padded[b], kernel[..., o], mode="valid", method="direct")[..., 0]
        np.testing.assert_allclose(expected[0][b, ..., o], everywhere[::2, ::2, ::2], atol=1e-12)
    assert_answers(got, expected)


def test_conv_of_stride_two_halves_a_ramp():
    """The mean under a kernel shows where it stands: sizes 2 and 4 between voxels 2i and 2i+1, size 3 on voxel 2i."""
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None], (1, 8, 8, 8, 1))
    mean = lambda size: conv.conv(ramp, jnp.full((size,) * 3 + (1, 1), size**-3.0), stride=2)[0, 1:3, 1, 1, 0]
    means = np.array(jax.jit(lambda: [mean(size) for size in (2, 3, 4)])())
    np.testing.assert_allclose(means, np.array([[2.5, 4.5], [2.0, 4.0], [2.5, 4.5]]), atol=1e-5)


def test_every_form_equals_pytorch():
    for kernel, dilation, volume in DENSE:
        operands = dense_operands(kernel, volume)
        padding = tuple(dilation * (size // 2) for size in kernel)
        theirs = by_torch(*operands, padding=padding, dilation=dilation)
        assert_answers(by_taps(*operands, dilation=dilation), theirs)
    for kernel, dilation, volume in DEPTHWISE:
        x, weights, cotangent = depthwise_operands(kernel, volume)
        padding = tuple(dilation * (size // 2) for size in kernel)
        value, to_image, to_kernel = by_torch(
            x, weights[..., None, :], cotangent, padding=padding, dilation=dilation, groups=3
        )
        mine = by_taps(x, weights, cotangent, dilation=dilation, depthwise=True)
        assert_answers(mine, (value, to_image, to_kernel[..., 0, :]))
    for size, volume in HALVING:
        # VoxelMorph's stride-2 convolution: PyTorch's `padding=1`.
        operands = halving_operands(size, volume)
        theirs = by_torch(*operands, stride=2, padding={2: 0, 3: 1, 4: 1}[size])
        assert_answers(by_taps(*operands, stride=2, padding=(HALVING_PADDING[size],) * 3), theirs)


def test_the_accelerators_forms(as_accelerator):
    """With their own gradient rules; one program of several layers, so that it compiles once."""
    forms: list[tuple[Callable, tuple, dict[str, Any]]] = [
        (lambda x, k: conv.conv(x, k), dense_operands((3, 3, 3), (4, 5, 6)), {}),
        (lambda x, k: conv.conv(x, k, dilation=2), dense_operands((3, 3, 3), (5, 4, 6)), {"dilation": 2}),
        (lambda x, k: conv.conv(x, k), dense_operands((3, 1, 1), (4, 3, 2)), {}),
        (lambda x, k: conv.conv(x, k), of_one_channel(dense_operands((3, 3, 3), (4, 5, 6))), {}),
        (
            lambda x, k: conv.conv(x, k, dilation=2),
            of_one_channel(dense_operands((3, 1, 3), (4, 5, 6))),
            {"dilation": 2},
        ),
        (
            lambda x, k: conv.conv(x, k),
            (numbers(2, 3, 4, 2, 2), numbers(3, 3, 3, 2, 9, seed=1), numbers(2, 3, 4, 2, 9, seed=2)),
            {},
        ),
        (
            lambda x, k: conv.depthwise(x, k, dilation=2),
            depthwise_operands((3, 3, 3), (4, 5, 6)),
            {"dilation": 2, "depthwise": True},
        ),
        *(
            (
                lambda x, k: conv.conv(x, k, stride=2),
                halving_operands(size, volume),
                {"stride": 2, "padding": (HALVING_PADDING[size],) * 3},
            )
            for size, volume in HALVING
        ),
    ]
    operands = [[jnp.asarray(operand, jnp.float32) for operand in each] for _, each, _ in forms]

    def every(operands):
        for (function, _, _), (x, kernel, cotangent) in zip(forms, operands, strict=True):
            value, pull = jax.vjp(function, x, kernel)
            yield value, *pull(cotangent)

    got = jax.jit(lambda operands: list(every(operands)))(operands)
    for answer, (_, each, options) in zip(got, forms, strict=True):
        assert_answers([np.asarray(part) for part in answer], by_taps(*each, **options))


@pytest.mark.parametrize("found", [("cpu",), ("cpu", "cuda")], ids=" and ".join)
def test_each_platform_is_lowered_to_its_form(found, monkeypatch):
    """One traced function: 3-D convolutions on the GPU and TPU, forward and gradient, and none of them on the CPU.

    Unless it is asked for, a machine with nothing but CPUs traces their form alone.
    """
    monkeypatch.setattr(backend, "backends", lambda: dict.fromkeys(found))
    x, kernel, cotangent = (jnp.asarray(operand, jnp.float32) for operand in dense_operands((3, 3, 3), (4, 4, 4)))
    channelwise = kernel[..., 0]

    @jax.jit
    def both(x, kernel, cotangent, channelwise):
        function = lambda x, k, d: conv.conv(conv.depthwise(x, d), k, dilation=2)
        return jax.vjp(function, x, kernel, channelwise)[1](cotangent)

    @jax.jit
    def halved(x, kernel):
        return jax.grad(lambda x, k: conv.conv(x, k, stride=2).sum(), (0, 1))(x, kernel)

    def convolutions(traced, platform, axes):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return len(re.findall(rf"stablehlo\.convolution\(.*dim_numbers = \[\w, {axes}, \w\]x", text))

    operands = (x, kernel, cotangent, channelwise[..., :2])
    with platforms.every():
        asked = ((both.trace(*operands), 2), (halved.trace(x, kernel), 2))
    for traced, count in asked:
        assert convolutions(traced, "cpu", "0, 1, 2") == 0 < convolutions(traced, "cpu", "0, 1")
        for platform in ("cuda", "tpu"):
            assert convolutions(traced, platform, "0, 1, 2") >= count
    jax.clear_caches()
    unasked = both.trace(*operands)
    assert convolutions(unasked, "cpu", "0, 1, 2") == 0 < convolutions(unasked, "cpu", "0, 1")
    assert (convolutions(unasked, "tpu", "0, 1, 2") >= 2) is ("cuda" in found)


@pytest.mark.parametrize("form", ["cpu", "accelerator"])
def test_pointwise_is_a_product_of_features_beside_each_other(form, request):
    if form == "accelerator":
        request.getfixturevalue("as_accelerator")
    first, second = numbers(2, 3, 2, 4, 3), numbers(2, 3, 2, 4, 2, seed=1)
    kernel, cotangent = numbers(5, 4, seed=2), numbers(2, 3, 2, 4, 4, seed=3)
    given = [jnp.asarray(x, jnp.float32) for x in (first, second, kernel, cotangent)]

    @jax.jit
    def both(first, second, kernel, cotangent):
        value, pull = jax.vjp(lambda *x: conv.pointwise(x[:2], x[2]), first, second, kernel)
        return value, *pull(cotangent)

    value, *gradients = map(np.asarray, both(*given))
    np.testing.assert_allclose(value, np.concatenate([first, second], axis=-1) @ kernel, rtol=1e-5, atol=1e-5)
    to_first, to_second = np.split(cotangent @ kernel.T, [3], axis=-1)
    beside = np.concatenate([first, second], axis=-1).reshape(-1, 5)
    for ours, theirs in zip(gradients, (to_first, to_second, beside.T @ cotangent.reshape(-1, 4)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_long_volume_is_convolved_a_part_at_a_time(monkeypatch):
    """Three steps of the loop over the depth, the last of which ends beyond the volume."""
    kernel, volume = (3, 3, 3), (11, 4, 3)
    operands = dense_operands(kernel, volume)
    monkeypatch.setattr(conv_cpu, "SMALL", 0)
    monkeypatch.setattr(conv_cpu, "STEP", 4 * BATCH * 4 * 3 * CHANNELS)
    assert_answers(answers(conv.conv, *operands), by_taps(*operands))


def test_coarse_numbers_are_convolved_as_themselves(forms):
    """bfloat16 in and out; a kernel's gradient, a sum over the volume, is as good as its last rounding."""
    operands = dense_operands((3, 3, 3), (6, 5, 4))
    coarse = [jnp.asarray(operand, jnp.bfloat16) for operand in operands]
    value, pull = jax.vjp(conv.conv, *coarse[:2])
    found = value, *pull(coarse[2])
    assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
    for ours, theirs in zip(found, by_taps(*(np.asarray(x, np.float64) for x in coarse)), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=0, atol=0.02 * np.abs(theirs).max())


def test_conv_refuses_what_it_cannot_centre(unchecked):
    x = jnp.zeros((1, 4, 6, 8, 2))
    with pytest.raises(ValueError, match=r"odd kernel sizes, got \(3, 2, 3\)"):
        conv.conv(x, jnp.zeros((3, 2, 3, 2, 3)))
    with pytest.raises(ValueError, match="got stride 3, dilation 1"):
        conv.conv(x, jnp.zeros((3, 3, 3, 2, 3)), stride=3)
    with pytest.raises(ValueError, match="got stride 2, dilation 2"):
        conv.conv(x, jnp.zeros((3, 3, 3, 2, 3)), stride=2, dilation=2)
    with pytest.raises(ValueError, match=r"got \(2, 3, 3\)"):
        conv.conv(x, jnp.zeros((2, 3, 3, 2, 3)), stride=2)
    with pytest.raises(ValueError, match=r"got a volume of \(4, 5, 8\)"):
        conv.conv(x[:, :, :5], jnp.zeros((3, 3, 3, 2, 3)), stride=2)
    with pytest.raises(ValueError, match=r"odd kernel sizes, got \(3, 3, 4\)"):
        conv.depthwise(x, jnp.zeros((3, 3, 4, 2)))
