"""3x3 convolutions of training through native.c: torch's, forward and back."""

import copy
import ctypes
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from conftest import PAIRS_ALONE
from torch import nn

from fastnst import native_library, winograd
from fastnst.native_library import Activation, Packed
from fastnst.network import plainly
from fastnst.stages import Stage
from fastnst.winograd import Conv3x3

pytestmark = pytest.mark.usefixtures("native_however_small")
SMALL = {name: getattr(winograd, name) for name in ("_SMALLEST", "_LEAST_WORK")}


@pytest.fixture
def convolved(monkeypatch):
    """How often a convolution was native."""
    calls, convolve = [], winograd._convolve
    monkeypatch.setattr(winograd, "_convolve", lambda *args: calls.append(args) or convolve(*args))
    return calls


@pytest.mark.parametrize("inputs, outputs", [(16, 16), (24, 40), (64, 16)])
def test_kernels_that_change_are_packed_as_those_that_stay(inputs, outputs):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(outputs, inputs, 3, 3)).astype(np.float32)
    there, expected = Packed.of_kernels(weight, False, 2), Packed.of(Stage(weight), False, False)
    assert np.allclose(there.weight, expected.weight, atol=1e-6)
    if native_library.multiplies_pairs():  # but for what is rounded to the other side
        pairs, alike = (packed.weight.view(np.uint16).astype(np.uint32) for packed in (Packed.of_kernels(weight, False, 2, half=True), Packed.of(Stage(weight), False, False, half=True)))
        assert np.allclose(*((bits << 16).view(np.float32) for bits in (pairs, alike)), rtol=2**-7, atol=1e-6)
    assert (there.outputs, there.channels, there.kind) == (expected.outputs, expected.channels, expected.kind)
    back, turned = Packed.of_kernels(weight, True, 1), weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    assert np.allclose(back.weight, Packed.of(Stage(np.ascontiguousarray(turned)), False, False).weight, atol=1e-6)
    assert back.channels == inputs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("padding, mode", [(0, "zeros"), (1, "zeros"), (1, "reflect"), (1, "replicate")])
@pytest.mark.parametrize("inputs, outputs", [(16, 24), (64, 16), (32, 40)])
def test_results_and_gradients_are_torchs(convolved, layout, frozen, padding, mode, inputs, outputs):
    torch.manual_seed(0)
    ours = Conv3x3(inputs, outputs, 3, padding=padding, padding_mode=mode).to(memory_format=layout)
    theirs = nn.Conv2d(inputs, outputs, 3, padding=padding, padding_mode=mode).double()
    theirs.load_state_dict(ours.state_dict())
    ours.requires_grad_(not frozen)
    x = torch.randn(2, inputs, 13, 18).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().double().requires_grad_()
    out, expected = ours(x), theirs(y)
    assert len(convolved) == 1 and out.is_contiguous(memory_format=layout)
    towards = torch.randn_like(expected)
    out.backward(towards.float())
    expected.backward(towards)
    assert len(convolved) == 2

    def apart(a, b):
        return float((a - b).detach().abs().max() / b.detach().abs().max())

    assert apart(out, expected) < 2e-5 and apart(x.grad, y.grad) < 2e-5
    if not frozen:
        assert apart(ours.weight.grad, theirs.weight.grad) < 1e-5 and apart(ours.bias.grad, theirs.bias.grad) < 1e-5


# Less than a tile; tiles that stick out; more tiles (24 x 24) than are transformed at once (512); channels that fill no block.
@pytest.mark.parametrize("images, inputs, outputs, height, width, padding", [(1, 32, 32, 3, 3, 0), (3, 40, 56, 14, 9, 1), (2, 32, 48, 7, 12, 2), (1, 32, 32, 142, 142, 0)])
def test_the_weights_gradient_is_torchs(images, inputs, outputs, height, width, padding):
    torch.manual_seed(0)
    x, towards = torch.randn(images, height, width, inputs), torch.randn(images, height + 2 * padding - 2, width + 2 * padding - 2, outputs)
    expected = torch.nn.grad.conv2d_weight(x.double().permute(0, 3, 1, 2), (outputs, inputs, 3, 3), towards.double().permute(0, 3, 1, 2), padding=padding)
    found = [native_library.weight_gradient(x.numpy(), towards.numpy(), outputs, inputs, padding, threads) for threads in (1, 3)]
    assert np.array_equal(*found)
    assert np.abs(found[0].transpose(0, 3, 1, 2) - expected.numpy()).max() < 3e-5 * expected.abs().max()  # 1.1e-5 at 142 px, 2e-6 to 6e-6 else


@pytest.mark.skipif(native_library.native_library() is None or not native_library.native_library().fastnst_halves(), reason="this CPU, or its compiler, has no vectors of bfloat16")
@pytest.mark.parametrize("inputs, outputs, padding", [(40, 56, 1), (32, 48, 0)])
def test_the_weights_gradient_of_bfloat16_is_that_of_the_same_numbers(inputs, outputs, padding):
    torch.manual_seed(0)
    x, towards = torch.randn(2, 14, 9, inputs).bfloat16(), torch.randn(2, 12 + 2 * padding, 7 + 2 * padding, outputs).bfloat16()
    found = native_library.weight_gradient(x.view(torch.int16).numpy(), towards.view(torch.int16).numpy(), outputs, inputs, padding, 2)
    assert np.array_equal(found, native_library.weight_gradient(x.float().numpy(), towards.float().numpy(), outputs, inputs, padding, 2))


@pytest.mark.parametrize(
    "channels, side, natively",
    [(128, 27, False), (128, 28, True), (512, 24, False), (512, 25, True), (64, 39, False), (64, 40, True)],  # 27 x 27 x 128 = 93,312; 24 x 24 = 576; 39 x 39 x 64 = 97,344
)
def test_small_ones_are_torchs(convolved, monkeypatch, channels, side, natively):
    for name, value in SMALL.items():
        monkeypatch.setattr(winograd, name, value)
    with torch.no_grad():
        Conv3x3(channels, channels, 3, padding=1)(torch.randn(1, channels, side, side))
        winograd.convolved(torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last), torch.randn(channels, channels, 3, 3), None, 1)
    assert len(convolved) == 2 * natively


def test_no_photos_at_all_have_a_gradient_of_zeros():
    conv = Conv3x3(32, 32, 3)
    conv(torch.zeros(0, 32, 8, 8)).sum().backward()
    assert conv.weight.grad.shape == conv.weight.shape and not conv.weight.grad.any()


def test_the_weights_gradient_is_filtered_where_that_pays(monkeypatch):
    asked, weigh = [], winograd.weight_gradient
    monkeypatch.setattr(winograd, "weight_gradient", lambda *given: asked.append(given) or weigh(*given))
    for inputs, outputs in ((32, 32), (16, 64)):
        before = winograd.operations
        Conv3x3(inputs, outputs, 3)(torch.randn(2, inputs, 14, 8, requires_grad=True)).sum().backward()
    assert len(asked) == 1
    # 2 x 1 tiles of 6x6, two times the 64 products of each, of 2 images: there, back to the 14x8 input (of 16x10, 3 x 2 tiles; 3.11 by the area), not to the weights.
    back = max(16, 2 * native_library.native_library().fastnst_lanes())  # to so many channels, zeros that fill a block included
    assert winograd.operations - before == 2 * round(2 * 64 / 36 * 16 * 64 * 12 * 6) + 2 * round(2 * 64 / 36 * back * 64 * 14 * 8)


@PAIRS_ALONE
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("padding, mode", [(0, "zeros"), (1, "zeros"), (1, "reflect")])
@pytest.mark.parametrize("inputs, outputs", [(32, 40), (64, 32)])
def test_bfloat16_is_near(convolved, layout, frozen, padding, mode, inputs, outputs):
    """Forward and back, some 1 % of the deviation from float64: V and U are rounded to 8 bits, and the transforms make that five times as much."""
    torch.manual_seed(0)
    ours = Conv3x3(inputs, outputs, 3, padding=padding, padding_mode=mode).requires_grad_(not frozen)
    theirs = nn.Conv2d(inputs, outputs, 3, padding=padding, padding_mode=mode).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, inputs, 13, 18).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(x), theirs(y)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last) and len(convolved) == 1
    towards = torch.randn_like(expected)
    out.backward(towards.bfloat16())
    expected.backward(towards)
    assert len(convolved) == 2 and x.grad.dtype == torch.float32

    def apart(a, b):
        return float((a - b).detach().square().mean().sqrt() / b.detach().std())

    assert 0.002 < apart(out, expected) < 0.015 and 0.002 < apart(x.grad, y.grad) < 0.015
    if not frozen:
        assert ours.weight.grad.dtype == torch.float32
        assert apart(ours.weight.grad, theirs.weight.grad) < 0.01 and apart(ours.bias.grad, theirs.bias.grad) < 0.01


@pytest.mark.parametrize("frozen", [True, False])
def test_weights_that_have_changed_are_used(frozen):
    torch.manual_seed(0)
    conv = Conv3x3(16, 16, 3).requires_grad_(not frozen)
    x = torch.randn(1, 16, 8, 8)
    first = conv(x)
    assert (conv._packed_forward is not None) == frozen
    with torch.no_grad():
        conv.weight.mul_(2)
        conv.bias.zero_()
    second = conv(x)
    expected = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double())
    assert float((second - expected).detach().abs().max()) < 1e-5 * float(expected.detach().abs().max()) and not torch.allclose(first, second)
    copied = copy.deepcopy(conv)
    assert torch.equal(copied(x), second)


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"groups": 2}])
def test_others_are_torchs_own(convolved, options):
    conv, x = Conv3x3(16, 16, 3, **options), torch.randn(1, 16, 9, 9)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, **options)) and not convolved


def test_so_are_other_types_few_channels_and_all_where_nothing_was_compiled(convolved, monkeypatch):
    x = torch.randn(1, 16, 9, 9)
    Conv3x3(16, 16, 3).double()(x.double())
    Conv3x3(8, 16, 3)(x[:, :8])
    Conv3x3(3, 16, 3)(x[:, :3])  # torch takes a third of the time
    Conv3x3(20, 20, 3)(torch.randn(1, 20, 9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        Conv3x3(24, 24, 3)(torch.randn(1, 24, 9, 9))  # pairs pay from 32 on
        monkeypatch.setattr(winograd, "multiplies_pairs", lambda: False)
        Conv3x3(32, 32, 3)(torch.randn(1, 32, 9, 9))
    monkeypatch.setattr(winograd, "native_library", lambda: None)
    Conv3x3(16, 16, 3)(x)
    assert not convolved
    with pytest.raises(RuntimeError, match="smaller|size"):
        monkeypatch.setattr(winograd, "native_library", native_library.native_library)
        Conv3x3(16, 16, 3)(x[..., :2])


def test_a_trained_network_that_is_evaluated_is_torchs_own(convolved):
    conv, x = Conv3x3(16, 16, 3), torch.randn(1, 16, 9, 9)
    assert torch.equal(conv.eval()(x), nn.functional.conv2d(x, conv.weight, conv.bias)) and not convolved
    conv.requires_grad_(False)(x)
    assert len(convolved) == 1


def test_a_gradient_of_a_gradient_is_torchs():
    torch.manual_seed(0)
    ours = nn.Sequential(Conv3x3(16, 16, 3, padding=1), nn.Tanh(), Conv3x3(16, 16, 3, padding=1))
    theirs = plainly(copy.deepcopy(ours))
    found = []
    for network in (ours, theirs):
        x = torch.ones(1, 16, 8, 8).cumsum(3).div(8).requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).pow(2).sum(), x, create_graph=True)
        (gradient.pow(2).sum() + network(x).sum()).backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for mine, other in zip(*found):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_weights_that_stand_in_for_its_own_and_biases_that_change(convolved):
    conv, x = Conv3x3(16, 16, 3), torch.randn(1, 16, 8, 8, requires_grad=True)
    weight, bias = torch.randn(16, 16, 3, 3, requires_grad=True), torch.randn(16)
    torch.func.functional_call(conv, {"weight": weight, "bias": bias}, x).sum().backward()
    (expected,) = torch.autograd.grad(nn.functional.conv2d(x, weight, bias).sum(), x)
    assert torch.allclose(x.grad, expected, atol=1e-4)
    conv.weight.requires_grad_(False)
    first = conv(x)
    first.sum().backward()
    assert torch.allclose(conv.bias.grad, torch.full((16,), 36.0))  # 6x6 positions
    with torch.no_grad():
        conv.bias.add_(1)
    assert torch.allclose(conv(x), first + 1, atol=1e-5)
    with torch.inference_mode():
        made = Conv3x3(16, 16, 3).requires_grad_(False)
        assert torch.allclose(made(x), nn.functional.conv2d(x, made.weight, made.bias), atol=1e-4)
    assert len(convolved) == 6


def test_threads_of_torch_are_those_of_ours_but_in_forked_processes():
    """A team may be smaller than asked for; a forked process, where none of its threads is left, takes its own."""
    library, calls = native_library.native_library(), []
    packed = Packed.of_kernels(np.random.default_rng(0).normal(size=(32, 32, 3, 3)).astype(np.float32), False, 1)
    given, side = Activation.of(np.random.default_rng(1).normal(size=(40, 40, 32)).astype(np.float32)), np.arange(40)

    def convolved(threads):
        output = np.empty((38, 38, 32), np.float32)
        packed.convolve(given, side, side, np.zeros(32, np.float32), output, False, threads)
        return output

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def alone(work, given, count, flags):
        calls.append(count)
        work(given)

    expected = convolved(1)
    try:
        library.fastnst_join(ctypes.cast(alone, ctypes.c_void_p))
        assert np.array_equal(convolved(3), expected) and calls == [3]
        if hasattr(os, "fork"):
            child = os.fork()
            if not child:
                os._exit(int(not np.array_equal(convolved(3), expected) or calls != [3]))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        library.fastnst_join(None)
        native_library._join_threads.cache_clear()
    assert np.array_equal(convolved(3), expected) and calls == [3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="where torch comes with GNU's OpenMP")
@pytest.mark.parametrize("shown", [True, False])
def test_torchs_threads_are_found(monkeypatch, shown):
    joined, load = [], ctypes.CDLL
    library = types.SimpleNamespace(fastnst_join=lambda function: joined.append(function.value))
    monkeypatch.setattr(native_library, "native_library", lambda: library)
    if not shown:  # to the whole process, as torch's for ARM is not
        monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace() if name is None else load(name))
    native_library._join_threads.cache_clear()
    native_library.join_threads()
    native_library._join_threads.cache_clear()
    assert len(joined) == 1 and joined[0]


@pytest.mark.parametrize("half_imported", [types.ModuleType("torch"), None])
def test_torch_that_is_not_there_yet_is_joined_later(monkeypatch, half_imported):
    joined = []
    monkeypatch.setattr(native_library, "_join_threads", lambda: joined.append(1))
    with monkeypatch.context() as another_thread:
        another_thread.setitem(sys.modules, "torch", half_imported)
        native_library.join_threads()
    assert not joined
    native_library.join_threads()
    assert joined


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=PAIRS_ALONE)])
def test_weights_that_come_to_lie_where_others_lay(half):
    conv, x = Conv3x3(32, 32, 3, bias=False).requires_grad_(False), torch.randn(1, 32, 12, 12)
    for _ in range(30):
        weight = torch.randn(32, 32, 3, 3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = torch.func.functional_call(conv, {"weight": weight}, (x,)).float()
        expected = nn.functional.conv2d(x, weight)
        assert float((found - expected).std()) < 0.02 * float(expected.std())
        del weight


def test_what_is_laid_out_is_not_written_with_a_layer():
    conv = Conv3x3(32, 32, 3).requires_grad_(False)
    size = len(pickle.dumps(conv))
    x = torch.randn(1, 32, 9, 9)
    expected = conv(x)
    assert conv._packed_forward is not None and len(pickle.dumps(conv)) == size
    assert torch.equal(copy.deepcopy(conv)(x), expected) and torch.equal(pickle.loads(pickle.dumps(conv))(x), expected)


def test_a_forked_process_joins_no_threads(monkeypatch):
    monkeypatch.setattr(native_library, "_PROCESS", os.getpid() + 1)
    monkeypatch.setattr(native_library, "_join_threads", lambda: pytest.fail("it did"))
    native_library.join_threads()


@pytest.mark.parametrize("channels", [1, 3, 8, 32])
def test_a_wrong_number_of_channels_is_torchs_error(channels):
    with pytest.raises(RuntimeError, match="channels"):
        Conv3x3(16, 24, 3, padding=1)(torch.randn(1, channels, 7, 7))


def test_a_wrong_type_is_torchs_error():
    with pytest.raises(RuntimeError, match="type"):
        Conv3x3(32, 32, 3)(torch.randn(1, 32, 7, 7).bfloat16())


@pytest.mark.parametrize("padding", [(1, 0), "same", "valid", 3])
def test_other_paddings_are_torchs_own(convolved, padding):
    conv, x = Conv3x3(16, 16, 3, padding=padding), torch.randn(1, 16, 9, 9)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, padding=padding)) and not convolved


def test_what_is_no_number_stays_so():
    conv, x = Conv3x3(16, 16, 3).requires_grad_(False), torch.zeros(1, 16, 12, 12)
    x[0, 0, 0, 0] = float("nan")
    assert torch.isnan(conv(x)[0, :, 0, 0]).all()


def test_only_what_is_asked_for_is_computed(convolved):
    conv = Conv3x3(16, 16, 3)
    conv(torch.randn(1, 16, 9, 9)).sum().backward()  # to the weights alone
    assert len(convolved) == 1 and conv.weight.grad is not None
    with torch.no_grad():
        assert not conv(torch.randn(1, 16, 9, 9)).requires_grad
