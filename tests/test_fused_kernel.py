"""Kernels for NVIDIA GPUs where there is none: translated, as a pass of the network asks for them, and not started."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
import triton.language as tl
from test_fused_norm import DEVICE

from fastnst.fused_kernel import can_compile_ahead, compile_ahead, kernel
from fastnst.fused_norm import FusedNorm

ahead = pytest.mark.skipif(not can_compile_ahead(), reason="needs Triton 3.6 or later")

TRANSLATE = """
import sys, threading
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # of GPUs that are not here, numbered by what they can do
    current = 75
    get_current_device = lambda self: self.current
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", self.current, 32)

    def launcher_cls(self, src, metadata):
        launched.append((src.fn.__name__, threading.current_thread().name.split("_")[0]))
        raise RuntimeError("it cannot be built")  # which is nothing: it is tried again when it is needed

driver.set_active(Driver())
compile_one, computing, where, launched = triton.compiler.compile, False, set(), []

def compile(*given, **options):
    where.add((threading.current_thread().name.split("_")[0], computing))
    return compile_one(*given, **options)

triton.compiler.compile = compile

from fastnst import fused_adam, fused_distances, fused_features, fused_norm, fused_pixels, fused_weights
from fastnst.engine import load_network
from fastnst.fused_kernel import Kernel, _ahead, can_compile_ahead, compile_ahead, kernel
from fastnst.fused_network import fused_layers
from fastnst.loss_network import load_loss_network
from fastnst.losses import LossConfig
from fastnst.model import NetworkConfig
from fastnst.network import TransformNetwork
from fastnst.nvidia import NvidiaPass

layers = {"relu1_2": 3, "relu2_2": 8}
loss_network = load_loss_network(LossConfig(network="vgg16", weights="random", content_layers={"relu2_2": 1.0}, style_layers={"relu1_2": 1.0}), list(layers))
network = TransformNetwork(NetworkConfig(width=24, residual_blocks=1))
network.to(memory_format=torch.channels_last)
optimizer = fused_adam.FusedAdam(list(network.parameters()))
stylize = NvidiaPass(load_network(sys.argv[1]), torch.device("cpu"), torch.float16)

def compute():
    global computing
    computing = True
    for pixels, x in (("uint8", torch.zeros(1, 48, 64, 3, dtype=torch.uint8)), ("float", torch.zeros(1, 3, 47, 61))):
        stylize(x, pixels)
    photos = torch.zeros(2, 3, 64, 64)
    total = torch.zeros(())
    features = fused_features.fused_features(loss_network, fused_layers(network, photos, torch.bfloat16), layers, torch.bfloat16)
    targets = fused_features.fused_features(loss_network, photos, {"relu2_2": 8}, torch.bfloat16)
    for layer, found in features.items():
        gram = torch.zeros(1, found.shape[1], found.shape[1])
        total = total + sum(each for each in fused_distances.mean_squares(found, targets.get(layer), gram) if each is not None)
    total.backward()
    odd = torch.zeros(1, 48, 8, 8, dtype=torch.bfloat16, requires_grad=True)  # channels that are no power of two
    fused_features._Reflect.apply(odd).sum().backward()
    sum(each.sum() for each in fused_features._MaxPool.apply(odd)).backward()
    for _ in range(2):
        optimizer.step()
    computing = False

kernels = {name: each for module in (fused_adam, fused_distances, fused_features, fused_norm, fused_pixels, fused_weights) for name, each in vars(module).items() if isinstance(each, Kernel)}
for Driver.current in (75, 90):
    if can_compile_ahead():
        compile_ahead(compute)
    else:  # one by one
        _ahead.set(set())
        with torch.autograd.set_multithreading_enabled(False):
            compute()
    for name, each in kernels.items():
        made = list(each.jit.device_caches[Driver.current][0].values())
        assert made, name
        for one in made:
            assert f"sm_{Driver.current}" in one.asm["ptx"]
            if name in ("_apply", "_fold", "_back", "_pool", "_pool_back"):
                assert "ld.global.b16" not in one.asm["ptx"], name  # 16 bytes at once, not 2

if can_compile_ahead():
    assert where == {("compiling", False)}  # by threads, once all were known: those of gradients, too
    assert set(launched) == {(name, "compiling") for name in kernels}

    @kernel
    def broken(x, FEW: tl.constexpr):
        tl.static_assert(FEW > 4, "got too few")

    compile_ahead(lambda: broken[(1,)](torch.zeros(4), FEW=4))
    for _ in range(2):
        try:
            broken[(1,)](torch.zeros(4), FEW=4)
        except triton.CompilationError as error:
            assert "got too few" in str(error)
        else:
            raise AssertionError("it was started")
print("translated")
"""


def test_all_kernels_translate_for_gpus_that_are_not_here(tmp_path):
    """Interpreted they could do what a GPU cannot: for one of 2018 and one of 2022, as inference and training start them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    model = REPOSITORY / "checkpoints" / "wave" / "model.safetensors"
    (tmp_path / "translate.py").write_text(TRANSLATE)
    done = subprocess.run([sys.executable, tmp_path / "translate.py", model], env=environment, capture_output=True, text=True)
    assert done.stdout == "translated\n", done.stderr


@kernel
def _double(x, out, NUMBERS: tl.constexpr):
    at = tl.arange(0, NUMBERS)
    tl.store(out + at, 2 * tl.load(x + at))


def test_a_kernel_is_started_with_its_options():
    x = torch.arange(8.0, device=DEVICE)
    out = torch.zeros_like(x)
    _double[(1,)](x, out, NUMBERS=4)
    assert out.tolist() == [0, 2, 4, 6, 0, 0, 0, 0]


@ahead
def test_what_is_compiled_ahead_is_not_started_and_everything_is_afterwards():
    x = torch.randn(1, 8, 4, 4, device=DEVICE)
    out, ones, calls = torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE), []

    def compute():
        _double[(1,)](torch.ones_like(out), out, NUMBERS=8)
        leaf = x.clone().requires_grad_()
        FusedNorm.apply(leaf, ones, ones, None, True, 1, "reflect", 1, 1, 0)[0].sum().backward()
        calls.append(leaf.grad.shape)

    compile_ahead(compute)
    assert calls == [x.shape] and not out.any()
    compute()
    assert out.tolist() == [2] * 8


@ahead
def test_an_error_ahead_is_raised_and_leaves_nothing_behind():
    out = torch.zeros(8, device=DEVICE)

    def compute():
        _double[(1,)](out + 1, out, NUMBERS=8)
        raise ValueError("no such photo")

    with pytest.raises(ValueError, match="no such photo"):
        compile_ahead(compute)
    assert not out.any()
    _double[(1,)](out + 1, out, NUMBERS=8)
    assert out.all() and torch.autograd.is_multithreading_enabled()


@pytest.mark.parametrize("mode", [None, lambda executor: pytest.fail("it would fail here")], ids=["3.4", "3.5"])
def test_a_triton_that_cannot_compile_ahead_computes_nothing_there(monkeypatch, mode):
    monkeypatch.setattr(triton, "AsyncCompileMode", mode, raising=False)
    compile_ahead(lambda: pytest.fail("it has no use"))
