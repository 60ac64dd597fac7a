"""The gradient of the objective over a batch of photos, which a training step follows; on a GPU recorded once and then replayed."""

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastnst.fused import triton_works
from fastnst.objective import Cut, Objective
from fastnst.ranks import Ranks
from fastnst.recording import Recording, can_record
from fastnst.runtime import in_one_line, is_out_of_memory

_LONG = 8  # seconds: a pass whose kernels are there already takes 2 to 4 to be recorded


class Gradient:
    """Forward and backward of ``objective`` over batches of ``batch_size`` photos, counted over all ``ranks``, in ``accumulate`` parts.

    ``clip``: the largest norm of the whole gradient. ``record``: a GPU of one process records a pass for each shape of photos and cut, so that
    it waits for no Python; not with batch norm, whose running means recording would move, nor for ``mean_covariance``, whose eigenvalues
    wait for the GPU. Where recording fails it goes on without, and tells ``say``.
    """

    def __init__(
        self,
        objective: Objective,
        batch_size: int,
        accumulate: int = 1,
        clip: float | None = None,
        ranks: Ranks = Ranks(),
        record: bool = True,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.objective, self._batch_size, self._accumulate, self._clip, self._ranks, self._say = objective, batch_size, accumulate, clip, ranks, say
        self._parameters = list(objective.network.parameters())
        self._records = record and can_record(objective.device) and ranks.size == 1
        self._records &= not list(objective.network.buffers()) and objective.loss.config.statistics == "gram"
        self._recordings: dict[Any, Recording] = {}
        self._names: list[str] = []
        self._apart: Any = None  # an `Aside`

    def __call__(self, photos: Tensor, cut: Cut | None = None) -> tuple[list[str], Tensor]:
        """This rank's uint8 ``(N, 3, S, S)``, on any device; leaves the gradient of the whole batch in the network.

        Returns names and numbers, still on the device: the terms of the loss, what the output looks like, the gradient's norm. They
        are this rank's part of the batch's means: their sum over the ranks is what they say.
        """
        recording = self._recording(photos, cut) if self._records else None
        if recording is None:
            numbers = self._measure(photos, cut)[0]
            return self._names, numbers
        numbers, *gradients = recording(photos, *((cut.top, cut.left) if cut else ()))
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
        return self._names, numbers.clone()  # which the next pass overwrites

    def _recording(self, photos: Tensor, cut: Cut | None) -> Recording | None:
        kind = (photos.shape, cut and (cut.side, cut.share))
        if kind not in self._recordings:
            device, beside = self.objective.device, next(iter(self._recordings.values()), None)
            place = () if cut is None else (cut.top, cut.left)

            def measure(photos: Tensor, *place: Tensor) -> list[Tensor]:
                return self._measure(photos, cut and Cut(*place, cut.side, cut.share))

            began = time.monotonic()
            try:
                self._recordings[kind] = Recording(measure, photos.to(device), *(each.to(device) for each in place), beside=beside)
            except Exception as error:  # libraries and compilers raise many kinds
                self._records, why = False, "no memory for it" if is_out_of_memory(error) else in_one_line(error)
            if not self._records:  # here the error no longer holds the activations
                self.forget()
                self._say(f"a CUDA graph failed, going on slower without ({why})")
            elif (seconds := time.monotonic() - began) > _LONG:
                self._say(f"the first step of its kind took {seconds:.0f} s, in which kernels were compiled for this GPU; they are kept for the next training")
        return self._recordings.get(kind)

    def _aside(self) -> AbstractContextManager:
        """Only where a pass is recorded, as it holds more memory, and is no faster where kernels are launched one by one."""
        if not self._records or not getattr(self.objective.network, "fused", False) or not triton_works(self.objective.device):
            return contextlib.nullcontext()
        from fastnst.fused_network import Aside, weights_aside

        if self._apart is None:  # one for all passes: libraries keep memory for each stream
            self._apart = Aside(self.objective.device)
        return weights_aside(self.objective.network, self._apart)

    def forget(self) -> None:
        """Give back the memory of what was recorded; it is recorded anew when it is next needed."""
        self._recordings.clear()
        self.objective.network.zero_grad(set_to_none=True)
        with contextlib.suppress(RuntimeError):  # of torch before 2.13, after a recording that failed
            torch.cuda.empty_cache()

    def _measure(self, photos: Tensor, cut: Cut | None) -> list[Tensor]:
        """The numbers, and the parameters' gradients."""
        network = self.objective.network
        network.zero_grad(set_to_none=True)
        parts = photos.tensor_split(min(self._accumulate, len(photos)))
        sums = 0
        for index, part in enumerate(parts):
            share = len(part) / self._batch_size
            with self._ranks.averaging(network, now=index == len(parts) - 1), self._aside():
                terms, stylized = self.objective(part, cut)
                with self.objective.side.beside():  # small work, which the way back does not wait for
                    self.objective.comparing.wait()
                    seen = stylized.detach().float().clamp(0, 1)
                    numbers = terms.scalars() | {"output/contrast": seen.std(dim=(2, 3)).mean(), "output/brightness": seen.mean()}
                    sums = sums + share * torch.stack(list(numbers.values()))
                terms.pull(share * self._ranks.size)  # averaged over the ranks, each photo then weighs the same
            for stream in (self.objective.side, self.objective.comparing):
                stream.wait()
        norm = nn.utils.get_total_norm(parameter.grad for parameter in self._parameters if parameter.grad is not None)
        if self._clip is not None:  # torch multiplies all of the gradient, whether it is too large or not
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        self._names = [*numbers, "train/gradient_norm"]
        return [torch.cat([sums, norm[None] * (len(photos) / self._batch_size)]), *(parameter.grad for parameter in self._parameters)]
