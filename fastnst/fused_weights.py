"""A network's weights as an NVIDIA GPU takes them, all in one kernel of Triton, and their gradients in another: by torch's own steps some 200 of them,
each of which takes longer to start than to run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastnst.fused_kernel import kernel

_ROWS, _TURNS = 256, 4  # numbers that a program makes, and terms that it adds to each at a time; one that copies makes their product
_LAST = torch.channels_last

Layout = Callable[[Tensor], Tensor]


class _Sums:
    """A sparse matrix by rows: number ``i`` is the sum of ``coefficient[j] x`` the number at ``source[j]``, j from ``start[i]`` to ``start[i + 1]``.

    ``stretches`` of rows: how many, and where the numbers lie that they are copies of, in order, of which nothing is looked up; or None.
    """

    def __init__(self, stretches: Sequence[tuple[int, int | None]], row: Tensor, source: Tensor, coefficient: Tensor) -> None:
        rows, order = sum(count for count, _ in stretches), torch.argsort(row, stable=True)
        self._source, self._coefficient = source[order].contiguous(), coefficient[order].float().contiguous()
        self._start = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
        self._start[1:] = torch.bincount(row, minlength=rows).cumsum(0)
        programs, begin = [], 0
        for count, copied in stretches:
            step = _ROWS if copied is None else _ROWS * _TURNS
            programs += [(begin + at, min(step, count - at), copied is not None, (copied or 0) + at) for at in range(0, count, step)]
            begin += count
        self._programs = torch.tensor(programs, dtype=torch.int64, device=row.device)

    def __call__(self, numbers: Tensor, out: Tensor) -> Tensor:
        tables = self._programs, self._start, self._source, self._coefficient
        _add_up[(len(self._programs),)](numbers, *tables, out, ROWS=_ROWS, TURNS=_TURNS, num_warps=4)
        return out


class WeightLayouts:
    """What ``layouts`` make of ``kernels``, ``(O, I, k, k)`` float32, each a sum of its numbers, or None for those as they are: in ``dtype``, channels-last. They are
    kept where they lie.

    ``without_effect``: parameters whose effect norms remove; their gradients are zeros.
    """

    def __init__(self, kernels: Sequence[Tensor], layouts: Sequence[Layout | None], without_effect: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.parameters, self.dtype, self._which = [*kernels, *without_effect], dtype, _which((*kernels, *without_effect))
        device, self.shapes = kernels[0].device, []
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        rows, sources, addresses, coefficients, forward, back = [nothing], [nothing], [nothing], [nothing.double()], [], []
        made = before = 0
        for kernel, layout in zip(kernels, layouts):
            away = (kernel.data_ptr() - kernels[0].data_ptr()) // kernel.element_size()  # from the first, wherever it lies
            if layout is None and kernel.is_contiguous(memory_format=_LAST):
                shape, copied, copied_back = kernel.shape, away, made
            else:
                with torch.no_grad(), torch.inference_mode(False):
                    shape, row, source, coefficient = _sources(kernel.detach(), layout or torch.clone)
                copied = copied_back = None
                for numbers, value in ((rows, row + made), (sources, source + before), (addresses, source + away), (coefficients, coefficient)):
                    numbers.append(value)
            self.shapes.append(shape)
            forward.append((shape.numel(), copied))
            back.append((kernel.numel(), copied_back))
            made, before = made + shape.numel(), before + kernel.numel()
        row, source, coefficient = torch.cat(rows), torch.cat(sources), torch.cat(coefficients)
        self._count, self._in_all = made, before + sum(each.numel() for each in without_effect)
        self._forward = _Sums(forward, row, torch.cat(addresses), coefficient)
        self._back = _Sums([*back, *((each.numel(), None) for each in without_effect)], source, row, coefficient)

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters, and lie where they lay."""
        return self._which == _which(parameters)

    def lay_out(self) -> list[Tensor]:
        out = self._forward(self.parameters[0], torch.empty(self._count, dtype=self.dtype, device=self.parameters[0].device))
        return [_in_memory(part, shape) for part, shape in zip(out.split([shape.numel() for shape in self.shapes]), self.shapes)]

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Of the parameters, from those of what was made of them."""
        device = self.parameters[0].device
        flat = [
            torch.zeros(shape.numel(), dtype=self.dtype, device=device) if one is None else one.contiguous(memory_format=_LAST).permute(0, 2, 3, 1).reshape(-1)
            for one, shape in zip(gradients, self.shapes)
        ]
        out = self._back(torch.cat(flat), torch.empty(self._in_all, dtype=torch.float32, device=device))
        return [part.as_strided(each.shape, each.stride()) for part, each in zip(out.split([each.numel() for each in self.parameters]), self.parameters)]


def _which(parameters: Sequence[Tensor]) -> list[tuple]:
    return [(id(parameter), parameter.data_ptr(), parameter.stride()) for parameter in parameters]


class LaidOut(torch.autograd.Function):
    """``layouts.lay_out()``, with gradients of ``layouts.parameters``."""

    @staticmethod
    def forward(ctx: Any, layouts: WeightLayouts, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.layouts = layouts
        ctx.set_materialize_grads(False)
        return tuple(layouts.lay_out())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None):
        return None, *ctx.layouts.gradients(gradients)


def _in_memory(flat: Tensor, shape: torch.Size) -> Tensor:
    """``flat`` as channels-last of ``shape``."""
    outputs, inputs, height, width = shape
    return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


def _sources(kernel: Tensor, layout: Layout) -> tuple[torch.Size, Tensor, Tensor, Tensor]:
    """The shape of ``layout``'s result; the places in memory, as channels-last, of its numbers that are not 0, those in the memory of ``kernel`` of what they
    are sums of, and by how much it counts. A layout adds up taps of one kernel at most; these are told apart by trying each alone."""
    places = torch.empty_like(kernel, dtype=torch.float64)
    places.copy_(torch.as_strided(torch.arange(1, kernel.numel() + 1, dtype=torch.float64, device=kernel.device), kernel.shape, kernel.stride()))
    taps = torch.ones_like(places)[None]
    if _adds_up(places, layout):
        taps = torch.eye(places[0, 0].numel(), dtype=places.dtype, device=places.device).view(-1, 1, 1, *places.shape[2:]).expand(-1, *places.shape)
    rows, sources, coefficients = [], [], []
    for tap in taps:
        counts = layout(tap)
        shape = counts.shape
        counts, where = (each.permute(0, 2, 3, 1).reshape(-1) for each in (counts, layout(tap * places)))
        row = (counts.abs() > 1e-12).nonzero()[:, 0]
        rows.append(row)
        sources.append((where[row] / counts[row]).round().long() - 1)
        coefficients.append(counts[row])
    return shape, torch.cat(rows), torch.cat(sources), torch.cat(coefficients)


def _adds_up(places: Tensor, layout: Layout) -> bool:
    """Whether a number of what ``layout`` gives is of more than one: then the mean of squares is not the square of the mean."""
    unlike = (places * 0.6180339887) % 1 + 1
    counts, mean, square = layout(torch.ones_like(places)), layout(unlike), layout(unlike.square())
    return not torch.allclose(mean.square(), counts * square, rtol=1e-9, atol=0)


@kernel
def _add_up(numbers, programs, start, source, coefficient, out, ROWS: tl.constexpr, TURNS: tl.constexpr):
    program = programs + tl.program_id(0) * 4
    begin, count, copied, place = tl.load(program), tl.load(program + 1), tl.load(program + 2), tl.load(program + 3)
    if copied:
        at = tl.arange(0, ROWS * TURNS)
        if (count == ROWS * TURNS) & ((place | begin) % 16 == 0):  # in steps of 16 bytes
            value = tl.load(numbers + tl.multiple_of(place, 16) + at)
            tl.store(out + tl.multiple_of(begin, 16) + at, value.to(out.dtype.element_ty))
        else:
            value = tl.load(numbers + place + at, mask=at < count, other=0)
            tl.store(out + begin + at, value.to(out.dtype.element_ty), mask=at < count)
    else:
        row, turn = tl.arange(0, ROWS), tl.arange(0, TURNS)[None, :]
        first, end = tl.load(start + begin + row, mask=row < count, other=0), tl.load(start + begin + row + 1, mask=row < count, other=0)
        total = tl.zeros([ROWS], tl.float32)
        for behind in range(0, tl.max(end - first, 0), TURNS):
            at = first[:, None] + behind + turn
            here = at < end[:, None]
            value = tl.load(numbers + tl.load(source + at, mask=here, other=0), mask=here, other=0).to(tl.float32)
            total += tl.sum(value * tl.load(coefficient + at, mask=here, other=0), 1)
        tl.store(out + begin + row, total.to(out.dtype.element_ty), mask=row < count)
