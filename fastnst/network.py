"""The image-transformation network f_W of Johnson et al. 2016: RGB in [0, 1] -> RGB in [0, 1], same size.

c9s1-32, d64, d128, R128 x 5, u64, u32, c9s1-3, with a norm and ReLU after every convolution but the last
(instance norm: Ulyanov et al. 2016). Differs from the paper in the defaults: reflection padding before every
convolution instead of once at the start, and nearest upsampling + convolution instead of transposed convolution,
which draws checkerboards (Odena et al. 2016).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnst import wide
from fastnst.fused import on_device, triton_works
from fastnst.model import NetworkConfig
from fastnst.winograd import Conv3x3


class TransformNetwork(nn.Module):
    """The network that ``config`` describes.

    ``stem: half`` is lean: the first layer sees 10x10 pixels at every second one, the last gives 2x2 pixels by sub-pixel
    convolution, and nothing is computed at full resolution in between. ``padding: start`` is Johnson's: reflection padding of the whole
    image once, none inside the blocks (each of which then shaves 2 px off its skip), zeros elsewhere. ``output``: ``tanh`` is 0.5 + 150/255 tanh, ``sigmoid`` is itself,
    ``linear`` is the bare convolution in units of 1/255, as pytorch/examples has it; what leaves [0, 1] is the
    caller's to clamp, so that the loss still sees it. ``output_scale`` decides how far Adam moves the picture in a step: in the
    published networks (1) tanh saturates in the first steps and leaves white blotches for a thousand more; at 1/8 the
    validation loss after 200 steps was below theirs after 750 (our measurement, half the width, wave).
    """

    fused = True  # while training, on NVIDIA GPUs and on CPUs; may be set to False
    aside = None  # an `Aside` where gradients of fused weights go their own way

    def __init__(self, config: NetworkConfig = NetworkConfig()) -> None:
        super().__init__()
        self.config = config
        w = config.width
        layers: list[nn.Module] = []  # their order is known to `steps_of`, and to `fold` and `_plan` in `stages`, too
        if config.padding == "start":
            layers.append(nn.ReflectionPad2d(config.start_padding))
        if config.stem == "full":
            layers += [*_conv_block(config, 3, w, 9), *_conv_block(config, w, 2 * w, 3, stride=2)]
        else:
            layers += _conv_block(config, 3, 2 * w, 10, stride=2)
        layers += [
            *_conv_block(config, 2 * w, 4 * w, 3, stride=2),
            *(ResidualBlock(config, 4 * w) for _ in range(config.residual_blocks)),
            *_upsampling_block(config, 4 * w, 2 * w),
        ]
        if config.stem == "full":
            layers += [*_upsampling_block(config, 2 * w, w), _conv(config, w, 3, 9, kind=LastConv)]
        else:
            layers += _subpixel(config, 2 * w, 3, 5)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 3, H, W)`` in [0, 1], any H and W from 1 up -> the same shape, about [0, 1], not clamped."""
        height, width = images.shape[-2:]
        short = [self.config.missing(width), self.config.missing(height)]
        if any(short):
            images = F.pad(images, (0, short[0], 0, short[1]), mode="replicate")
        x = self._layers_of(images)
        x = x[..., :height, :width]  # strides round sizes up to a multiple of 4
        x = x * self.config.output_scale if self.config.output_scale != 1 else x
        if self.config.output == "tanh":
            return 0.5 + 150 / 255 * torch.tanh(x)
        return torch.sigmoid(x) if self.config.output == "sigmoid" else x / 255

    def _layers_of(self, images: Tensor) -> Tensor:
        """What ``layers`` give, as it is found fastest where it is trained."""
        if not (self.fused and self.training) or images.requires_grad or torch.compiler.is_compiling():
            return self.layers(images)
        if images.is_cuda and triton_works(images.device):
            from fastnst.fused_network import can_fuse, fused_layers

            if can_fuse(self.config):
                dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
                with torch.autocast("cuda", enabled=False), on_device(images.device):
                    return fused_layers(self, images.float(), dtype)
        if images.device.type == "cpu" and images.dtype == torch.float32 and self.config.norm == "instance":
            from fastnst.cpu_network import cpu_layers

            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            with torch.autocast("cpu", enabled=False):
                return cpu_layers(self, images, dtype)
        return self.layers(images)


class LastConv(nn.Conv2d):
    """c9s1-3. While training it makes four pixels at once, as a 10x10 convolution of stride 2 to 12 channels: the same sums, and three
    channels leave most of a processor's width idle (2.7 times as fast there and back on the CPU, our measurement)."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.training:
            return super()._conv_forward(x, weight, bias)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return wide.convolved_by_fours(x, weight, bias, self.padding[0] if self.padding_mode == "zeros" else 0)


def plainly(network: nn.Module) -> nn.Module:
    """Let all convolutions be torch's, as they are written; for comparisons. Gives the network."""
    for module in network.modules():
        if hasattr(module, "fused"):
            module.fused = False
        elif isinstance(module, LastConv):
            module.eval()
        elif isinstance(module, Conv3x3):
            module.natively = False
    return network


class ResidualBlock(nn.Module):
    """x + norm(conv(ReLU(norm(conv(x))))), no ReLU after the sum (He et al. 2016 as modified by Gross & Wilber)."""

    def __init__(self, config: NetworkConfig, channels: int) -> None:
        super().__init__()
        self.shave = 2 if config.padding == "start" else 0
        padded = config.padding != "start"
        self.layers = nn.Sequential(
            _conv(config, channels, channels, 3, padded=padded),
            _norm(config, channels),
            nn.ReLU(inplace=True),
            _conv(config, channels, channels, 3, padded=padded),
            _norm(config, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        s = self.shave
        skip = x[..., s:-s, s:-s] if s else x
        return skip + self.layers(x)


def _conv(config: NetworkConfig, inputs: int, outputs: int, kernel: int, stride: int = 1, padded: bool = True, kind: type = nn.Conv2d) -> nn.Conv2d:
    mode = "zeros" if config.padding == "start" else config.padding
    kind = Conv3x3 if (kernel, stride, kind) == (3, 1, nn.Conv2d) else kind
    return kind(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2 if padded else 0, padding_mode=mode)


def _norm(config: NetworkConfig, channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True) if config.norm == "instance" else nn.BatchNorm2d(channels)


def _conv_block(config: NetworkConfig, inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [_conv(config, inputs, outputs, kernel, stride), _norm(config, outputs), nn.ReLU(inplace=True)]


def _upsampling_block(config: NetworkConfig, inputs: int, outputs: int) -> list[nn.Module]:
    """Twice the height and width."""
    if config.upsampling == "nearest":
        up: list[nn.Module] = [nn.Upsample(scale_factor=2, mode="nearest"), _conv(config, inputs, outputs, 3)]
    elif config.upsampling == "bilinear":  # padded by replication, as the interpolation itself is
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")
        up = [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), conv]
    elif config.upsampling == "transposed":
        up = [nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)]
    else:
        up = _subpixel(config, inputs, outputs, 3)
    return [*up, _norm(config, outputs), nn.ReLU(inplace=True)]


def _subpixel(config: NetworkConfig, inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Convolution and pixel shuffle; all four sub-pixels start equal: no checkerboard at step 0 (Aitken et al. 2017)."""
    conv = _conv(config, inputs, 4 * outputs, kernel)
    with torch.no_grad():
        conv.weight.copy_(conv.weight[::4].repeat_interleave(4, dim=0))
        conv.bias.copy_(conv.bias[::4].repeat_interleave(4, dim=0))
    return [conv, nn.PixelShuffle(2)]
