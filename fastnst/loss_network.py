"""The loss network phi: a frozen, pretrained VGG or SqueezeNet that turns an image into features by layer name.

Guards two conventions: it takes RGB in [0, 1] and alone knows mean and std, and a stored feature is never overwritten
by a later layer. Topologies and parameter names are torchvision's, so its weight files load as they are.
"""

import difflib
import math
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastnst.config import Config
from fastnst.fused import on_device, triton_works
from fastnst.native_features import Rectified, can_rectify
from fastnst.native_library import native_library
from fastnst.runtime import first_line
from fastnst.winograd import Conv3x3

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Filters of each convolution by block; a 2x2 pooling follows each block (Simonyan & Zisserman 2014, D and E).
_VGG_BLOCKS = {
    "vgg16": ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
    "vgg19": ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)),
    # Ours: VGG-19 to relu5_1 in half of the filters or fewer, distilled (`fastnst.distill`).
    "vgg19_slim": ((32, 2), (64, 2), (128, 4), (128, 4), (128, 1)),
}
DOWNLOADS = ("imagenet", "imagenet_features")  # torchvision's weights
# 1x1 convolutions that turn the slim filters at a layer into VGG-19's channels there, so that features, Grams and weights mean the same.
SLIM_HEADS = {
    "relu1_1": 64, "relu1_2": 64, "relu2_1": 128, "relu2_2": 128, "relu3_1": 256, "relu3_2": 256, "relu3_3": 256, "relu3_4": 256,
    "relu4_1": 512, "relu5_1": 512,
}  # fmt: skip
SLIM_WEIGHTS = Path(__file__).with_name("vgg19_slim.safetensors")
# Kernel and filters of the first convolution; then (squeeze, expand) of each fire, or None for a pooling (Iandola et al. 2016).
_SQUEEZENETS = {
    "squeezenet1_0": ((7, 96), ((16, 64), (16, 64), (32, 128), None, (32, 128), (48, 192), (48, 192), (64, 256), None, (64, 256))),
    "squeezenet1_1": ((3, 64), ((16, 64), (16, 64), None, (32, 128), (32, 128), None, (48, 192), (48, 192), (64, 256), (64, 256))),
}
LossNetworkName = Literal["vgg16", "vgg19", "squeezenet1_0", "squeezenet1_1", "vgg19_slim"]
Triple = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]


class LossNetworkConfig(Config):
    """Which loss network, with which weights.

    ``weights``: ``auto``, which is ``embedded`` for vgg19_slim (inside this package), ``imagenet_features`` for vgg16 (the
    original Caffe weights, as torchvision keeps them) and ``imagenet`` (torchvision's download) for the others; ``random`` (no
    download; for trying the pipeline, not for pictures); or the path of a ``.pth`` or ``.safetensors`` state dict, whole or cut
    off. ``mean`` and ``std`` are of RGB in [0, 1]; left out, they come from the weights: torchvision's own, the safetensors
    metadata, else ImageNet's. ``padding``: ``zeros``, as the networks were trained, makes an edge around every picture that is not
    mean gray at its border, and a network that lowers the loss learns to fade its outer pixels; ``reflect`` makes none.
    """

    network: LossNetworkName = "vgg16"
    weights: str = Field("auto", min_length=1)
    mean: Triple | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    pooling: Literal["max", "average"] = "max"
    padding: Literal["zeros", "reflect"] = "zeros"

    @model_validator(mode="after")
    def _weights_exist_for_network(self):
        only = {"imagenet_features": ("vgg16",), "embedded": ("vgg19_slim",), "imagenet": ("vgg16", "vgg19", "squeezenet1_0", "squeezenet1_1")}
        if self.network not in only.get(self.weights, (self.network,)):
            raise ValueError(f"weights: {self.weights} exist for {', '.join(only[self.weights])}, not for {self.network}; use weights: auto or a path")
        return self

    @property
    def resolved_weights(self) -> str:
        """``weights`` with ``auto`` spelled out."""
        if self.weights != "auto":
            return self.weights
        return {"vgg16": "imagenet_features", "vgg19_slim": "embedded"}.get(self.network, "imagenet")


class Fire(nn.Module):
    """SqueezeNet's block: 1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def _topology(network: str, pooling: str = "max") -> list[tuple[str, nn.Module]]:
    """``[(layer name, module), ...]`` in torchvision's order: the position is the index in ``features``."""
    pool = nn.MaxPool2d if pooling == "max" else nn.AvgPool2d
    layers: list[tuple[str, nn.Module]] = []
    channels = 3
    if network in _VGG_BLOCKS:
        for block, (filters, count) in enumerate(_VGG_BLOCKS[network], start=1):
            for conv in range(1, count + 1):
                layers += [(f"conv{block}_{conv}", Conv3x3(channels, filters, 3, padding=1)), (f"relu{block}_{conv}", nn.ReLU())]
                channels = filters
            layers.append((f"pool{block}", pool(2, 2)))
        return layers[:-1] if network == "vgg19_slim" else layers  # the slim one ends with relu5_1
    (kernel, channels_out), rest = _SQUEEZENETS[network]
    layers += [("conv1", nn.Conv2d(3, channels_out, kernel, stride=2)), ("relu1", nn.ReLU()), ("pool1", pool(3, 2, ceil_mode=True))]
    channels, fires, pools = channels_out, 1, 1
    for fire in rest:
        if fire is None:
            pools += 1
            layers.append((f"pool{pools}", pool(3, 2, ceil_mode=True)))
        else:
            fires += 1
            layers.append((f"fire{fires}", Fire(channels, *fire)))
            channels = 2 * fire[1]
    return layers


def layer_index(network: str, layer: str) -> int:
    """The position of ``layer`` in torchvision's ``features``; ``features.N`` names it directly.

    Raises ``ValueError`` naming the nearest known layer.
    """
    with torch.device("meta"):  # the names alone: no memory, no initialization
        names = [name for name, _ in _topology(network)]
    if network == "vgg19_slim" and layer not in SLIM_HEADS:
        near = difflib.get_close_matches(layer, SLIM_HEADS, n=1, cutoff=0)
        raise ValueError(f"vgg19_slim has no layer {layer!r}; nearest: {near[0]}; it has {', '.join(SLIM_HEADS)}")
    if layer in names:
        return names.index(layer)
    prefix, _, number = layer.partition(".")
    if prefix == "features" and number.isdigit() and int(number) < len(names):
        return int(number)
    near = difflib.get_close_matches(layer, names, n=1, cutoff=0)
    raise ValueError(f"{network} has no layer {layer!r}; nearest: {near[0]}; it has {', '.join(names)} (or features.0 ... features.{len(names) - 1})")


class LossNetwork(nn.Module):
    """Frozen features of ``network`` at ``layers``, computed only as deep as the deepest of them.

    ``mean`` and ``std`` are of RGB in [0, 1]. Weights start at random (He et al. 2015); ``load_loss_network`` fills them in.
    """

    # Use our own code: on a CPU between convolutions, on an NVIDIA GPU in half precision. May be set to False; not used where a module of it has hooks.
    fused = True

    def __init__(self, network: str, layers: Iterable[str], mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, pooling: str = "max", padding: str = "zeros") -> None:
        super().__init__()
        self.network = network
        self._index = {layer: layer_index(network, layer) for layer in layers}
        if not self._index:
            raise ValueError("a loss network needs at least one layer")
        self.features = nn.Sequential(*(module for _, module in _topology(network, pooling)[: max(self._index.values()) + 1]))
        self._reflects = padding == "reflect"
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d) and any(module.padding):
                module.padding_mode = padding
        for index, module in enumerate(self.features):
            if isinstance(module, nn.ReLU):  # in place saves memory, but not over a convolution that is asked for
                module.inplace = index - 1 not in self._index.values()
        self.heads = nn.ModuleDict()
        if network == "vgg19_slim":
            self.heads.update({layer: nn.Conv2d(self.features[index - 1].out_channels, SLIM_HEADS[layer], 1) for layer, index in self._index.items()})
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, layers: Iterable[str] | None = None, each: Callable[[str, Tensor], None] = lambda layer, features: None) -> dict[str, Tensor]:
        """``(N, 3, H, W)`` RGB in [0, 1] -> ``{layer: (N, C, H', W')}`` for ``layers``, by default all that it was built for.

        ``each`` is called with a layer and its features as soon as they are there, before what lies deeper is computed.
        """
        wanted = {layer: self._index[layer] for layer in (self._index if layers is None else layers)}
        fused = self.fused and not torch.compiler.is_compiling() and not any(_has_hooks(module) for module in self.features.modules())
        if fused and self._fuses(images):
            from fastnst.fused_features import fused_features

            dtype = torch.get_autocast_dtype("cuda")

            def as_outside(layer: str, features: Tensor) -> None:
                with torch.autocast("cuda", dtype):
                    each(layer, features)

            with torch.autocast("cuda", enabled=False), on_device(images.device):
                return fused_features(self, images, wanted, dtype, as_outside)
        found: dict[str, Tensor] = {}
        x, pooled = (images - self.mean) / self.std, None
        if self.fused and self._wants_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        modules = self.features[: max(wanted.values(), default=-1) + 1]
        for index, (module, following) in enumerate(zip(modules, [*modules[1:], None])):
            try:
                if pooled is not None:
                    x, pooled = pooled, None
                elif fused and isinstance(module, nn.ReLU) and can_rectify(x):
                    x, pooled = Rectified.apply(x, isinstance(following, nn.MaxPool2d) and following.kernel_size == 2 and min(x.shape[2:]) > 1)
                else:
                    x = module(x)
            except RuntimeError as error:
                if min(x.shape[-2:]) > 8:
                    raise
                raise ValueError(
                    f"an image of {images.shape[3]}x{images.shape[2]} pixels is too small for {max(wanted, key=wanted.get)} of {self.network}; "
                    f"enlarge it, or use shallower layers{', or loss.padding: zeros' if self._reflects else ''}"
                ) from error
            for layer in (layer for layer, place in wanted.items() if place == index):
                found[layer] = torch.relu(self.heads[layer](x)) if layer in self.heads else x
                each(layer, found[layer])
        return {layer: found[layer] for layer in wanted}

    def _wants_channels_last(self, x: Tensor) -> bool:
        """Whether a CPU convolves faster so: natively, 1.3 times there and back, and in bfloat16; there are no norms, which would copy it back."""
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return x.device.type == "cpu"
        return not torch.compiler.is_compiling() and isinstance(self.features[0], Conv3x3) and native_library() is not None

    def _fuses(self, images: Tensor) -> bool:
        if not (images.is_cuda and torch.is_autocast_enabled("cuda") and triton_works(images.device)):
            return False
        from fastnst.fused_features import can_fuse

        return can_fuse(self) and min(images.shape[-2:]) >= 32


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def load_loss_network(config: LossNetworkConfig, layers: Iterable[str], asked_by: str = "loss.weights") -> LossNetwork:
    """A ``LossNetwork`` with the weights that ``config`` names, as the key or flag ``asked_by`` has it.

    Raises ``FileNotFoundError`` for a missing file, ``ValueError`` for a file that is no state dict of tensors or lacks a
    layer that is needed, and ``OSError`` with advice where a download is impossible.
    """
    layers = list(layers)
    weights = config.resolved_weights
    if weights == "random":
        state, mean, std = None, None, None
    elif weights in DOWNLOADS:
        state, mean, std = _download(config.network, weights, asked_by)
    else:
        state, mean, std = _read_state(SLIM_WEIGHTS if weights == "embedded" else Path(weights).expanduser(), asked_by)
    network = LossNetwork(config.network, layers, config.mean or mean or IMAGENET_MEAN, config.std or std or IMAGENET_STD, config.pooling, config.padding)
    if state is None:
        generator = torch.Generator().manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(module.bias)
    else:
        _fill(network, state, weights)
    return network


def _fill(network: LossNetwork, state: dict[str, Tensor], source: str) -> None:
    names = [name for name, _ in _topology(network.network)]
    for key, parameter in network.state_dict().items():
        part = key.split(".")[1]
        layer = names[int(part)] if part.isdigit() else part
        if key not in state:
            raise ValueError(
                f"{source}: lacks {key} ({layer}), needed for {', '.join(network._index)}; it holds {_extent(state, names)}. "
                f"Choose layers within that, or a fuller weight file of {network.network}"
            )
        if state[key].shape != parameter.shape:
            raise ValueError(
                f"{source}: {key} ({layer}) has shape {tuple(state[key].shape)}, {network.network} needs {tuple(parameter.shape)}; is it another network's file?"
            )
        parameter.copy_(state[key])


def _extent(state: dict[str, Tensor], names: list[str]) -> str:
    held = [int(key.split(".")[1]) for key in state if key.startswith("features.") and key.split(".")[1].isdigit()]
    held = [index for index in held if index < len(names)]
    return f"convolutions up to {names[max(held)]}" if held else f"{len(state)} other tensors, none named features.N.*"


def _read_state(path: Path, asked_by: str) -> tuple[dict[str, Tensor], Triple | None, Triple | None]:
    if not path.is_file():
        raise FileNotFoundError(f"{asked_by}: no file at {path}; give auto, imagenet, imagenet_features (vgg16), embedded (vgg19_slim), random or the path of a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
        return state, _triple(metadata, "mean", path), _triple(metadata, "std", path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        why = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"  # torch then advises to load it as code
        raise ValueError(f"{asked_by}: {path} is not a state dict of tensors, or damaged{why}; need a .pth or .safetensors file, whole pickled modules are not loaded") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds {type(state).__name__}, need a state dict of tensors")
    return state, None, None


def _triple(metadata: dict[str, str], key: str, path: Path) -> Triple | None:
    if key not in metadata:
        return None
    try:
        red, green, blue = (float(part) for part in metadata[key].strip("[]() ").split(","))
        usable = all(math.isfinite(value) and (value > 0 or key == "mean") for value in (red, green, blue))
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{path}: metadata {key} is {metadata[key]!r}, need three {'numbers' if key == 'mean' else 'positive numbers'} such as 0.485,0.456,0.406")
    return red, green, blue


def _download(network: str, name: str, asked_by: str) -> tuple[dict[str, Tensor], Triple, Triple]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(network)["IMAGENET1K_FEATURES" if name == "imagenet_features" else "IMAGENET1K_V1"]
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise OSError(
            f"could not download the {network} weights from {weights.url} ({error}). Fetch that file on a machine with a connection and put it "
            f"in {Path(torch.hub.get_dir()) / 'checkpoints'}, or give its path: {asked_by}=PATH"
        ) from error
    except (EOFError, pickle.UnpicklingError) as error:
        raise OSError(f"{Path(torch.hub.get_dir()) / 'checkpoints' / Path(weights.url).name} is damaged ({error}); remove it and run again") from error
    preprocessing = weights.transforms()
    return state, tuple(preprocessing.mean), tuple(preprocessing.std)
