"""Distill ``vgg19_slim``, the embedded loss network, from VGG-19.

What counts is not the features but that training against them gives the same pictures: besides the features, the
student matches differences between Gram matrices (what the style loss measures) and the gradients that they send to the
pixels. Beside the photos it sees a pool of pictures that it is itself pulling, a step at a time, towards other photos'
styles, so that it is right where an optimizer will go, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from fastnst.checkpoint import STATE_NAME, load_training_state, restore, save_training_state, snapshot
from fastnst.config import Config
from fastnst.data import DataConfig, PhotoStream, keep_photos, list_photos, load_validation, training_batches
from fastnst.files import atomic_write, remove_leftovers
from fastnst.loss_network import SLIM_HEADS, LossNetwork, LossNetworkConfig, load_loss_network
from fastnst.losses import gram_matrix
from fastnst.run import find_run, hold
from fastnst.runtime import autocast, resolve_precision
from fastnst.schedule import LearningRate, learning_rate_at

SLIM_NAME = "vgg19_slim.safetensors"
_EXACT_LAYERS = ("relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_2", "relu3_3", "relu3_4")
_INITIAL_PHOTOS = 24
_STUDENT_STD = (0.25, 0.25, 0.25)  # photos then come in at about unit size
_PULL_LAYERS = ("relu1_2", "relu2_2", "relu3_3")  # where pixel gradients are taken: Johnson et al.'s, as deep as the teacher is exact
_DEEP_LAYERS = {"relu4_1": "conv41_aux", "relu5_1": "conv51_aux"}


class TeacherConfig(Config):
    """Weight files: VGG-19 itself as deep as it goes, and a narrow one whose 1x1 maps stand in for the deepest layers."""

    vgg19: Path
    deep: Path | None = None


class DistillLoop(Config):
    """How long, how fast, and how much each term weighs; each term is a relative squared error, about 1 at the start."""

    steps: int = Field(12_000, ge=1, le=10**9)
    batch_size: int = Field(4, ge=2, le=4096, description="photos per step; as many pulled pictures come beside them")
    learning_rate: LearningRate = LearningRate(initial=3e-4, warmup_steps=50, decay="cosine")
    feature_weight: float = Field(1.0, ge=0)
    gram_weight: float = Field(1.0, ge=0)
    gradient_weight: float = Field(0.0, ge=0, description="matches pixel gradients of the style loss; doubles the cost of a step")
    pull_rate: float = Field(0.03, ge=0, description="how far a pulled picture moves in a step, of [0, 1]")
    pull_steps: int = Field(20, ge=1, description="after so many a pulled picture makes room for a photo")
    seed: int = Field(0, ge=0, lt=2**63)
    log_every: int = Field(20, ge=1)
    validate_every: int = Field(500, ge=1)
    save_every: int = Field(500, ge=1)


class DistillConfig(Config):
    """Everything that decides a distillation."""

    teacher: TeacherConfig
    data: DataConfig
    distill: DistillLoop = DistillLoop()


@dataclass(frozen=True)
class DistillProgress:
    """Reported after every step; ``losses`` and ``validation`` where they are due."""

    step: int
    steps: int
    losses: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


class DeepTeacher(nn.Module):
    """VGG-19 with a quarter of the filters (Wang et al. 2020); 1x1 maps approximate the normalised VGG-19's channels."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({key.replace(".", "_"): value for key, value in weights.items()}).requires_grad_(False)

    def _conv(self, x: Tensor, name: str, padding: int) -> Tensor:
        x = F.pad(x, [padding] * 4, mode="reflect") if padding else x
        return F.conv2d(x, self.weights[f"{name}_weight"], self.weights[f"{name}_bias"])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """RGB in [0, 1] -> features at relu4_1 and relu5_1 with VGG-19's channel counts, mean activation about 1."""
        found, x = {}, self._conv(images, "conv0", 0)
        for block, count in enumerate((2, 2, 4, 4, 1), start=1):
            for conv in range(1, count + 1):
                x = torch.relu(self._conv(x, f"conv{block}{conv}", 1))
                if f"conv{block}{conv}_aux" in _DEEP_LAYERS.values():
                    found[f"relu{block}_{conv}"] = torch.relu(self._conv(x, f"conv{block}{conv}_aux", 0))
            x = F.max_pool2d(x, 2) if block < 5 else x
        return found


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|^2 / |t|^2 over the whole batch."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)


def gram_difference_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``relative_error`` of G_i - G_j over all pairs of neighbours in the batch: the error of the style loss's argument."""
    student_gram, teacher_gram = gram_matrix(student, "hw"), gram_matrix(teacher, "hw")
    return relative_error(student_gram - student_gram.roll(1, 0), teacher_gram - teacher_gram.roll(1, 0))


def style_gradient(features: dict[str, Tensor], images: Tensor, targets: dict[str, Tensor], create_graph: bool = False) -> Tensor:
    """Gradient with respect to ``images`` of the relative Gram distance to ``targets``, layers weighing the same."""
    distance = sum(relative_error(gram_matrix(features[layer], "hw"), target) for layer, target in targets.items())
    return torch.autograd.grad(distance, images, create_graph=create_graph)[0]


def distill(
    config: DistillConfig,
    run_dir: str | Path,
    device: torch.device = torch.device("cpu"),
    report: Callable[[DistillProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train the student until ``config.distill.steps``, resuming what ``run_dir`` holds; returns the weight file's path.

    A resumed run starts with a fresh pool of pulled pictures, so it is like the uninterrupted one, not equal to it.
    """
    loop, run_dir = config.distill, Path(run_dir)
    prolongs = set() if loop.learning_rate.decay == "cosine" else {"distill.steps"}  # every rate of a cosine depends on how many there are
    watched = {f"distill.{key}" for key in ("log_every", "validate_every", "save_every")}
    resuming = find_run(config, run_dir, {"data.workers", "data.cache", "data.cache_gb", *watched, *prolongs})
    photos = list_photos(config.data)
    validation, _ = load_validation(photos.validation, config.data)
    if len(validation) < 2:
        raise ValueError(f"data.validation: got {len(validation)} held-out photo, need 2 or more to compare; give a folder or more photos")
    teacher = load_loss_network(LossNetworkConfig(network="vgg19", weights=str(config.teacher.vgg19)), _EXACT_LAYERS, "teacher.vgg19").to(device)
    deep = None if config.teacher.deep is None else DeepTeacher(load_file(config.teacher.deep)).to(device)
    layers = [layer for layer in SLIM_HEADS if layer in _EXACT_LAYERS or deep is not None]
    stream = PhotoStream(photos.train, config.data, loop.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loop.seed)
        student = LossNetwork("vgg19_slim", layers, tuple(teacher.mean.flatten().tolist()), _STUDENT_STD).to(device).requires_grad_()
        some = torch.stack([stream[index][0] for index in range(_INITIAL_PHOTOS)]).to(device).float().div(255)
        units = initialize_from_teacher(student, teacher, deep, some)
    if deep is not None:  # the layers whose teacher is an approximation learn from the others, but do not bend them
        student.features[student._index["relu4_1"] - 1].register_forward_pre_hook(lambda module, inputs: inputs[0].detach())
    optimizer = torch.optim.Adam(student.parameters())
    step = 0
    if resuming:
        state = load_training_state(run_dir / STATE_NAME, device)
        restore(run_dir / STATE_NAME, state, student, optimizer)
        step = state["step"]

    precision = resolve_precision("auto", device)
    stream.cache = keep_photos(photos.train, config.data, (loop.steps - step) * loop.batch_size / len(photos.train), should_stop=should_stop)
    loading = training_batches(stream, step * loop.batch_size, loop.batch_size, max(0, loop.steps - step))
    pulled: Tensor | None = None
    window: list[Tensor] = []
    names: list[str] = []
    first = step
    with hold(run_dir, config), loading as batches, SummaryWriter(str(run_dir), purge_step=step + 1 if resuming else None) as board:
        remove_leftovers(run_dir / SLIM_NAME)
        while True:
            stopping = step >= loop.steps or should_stop()
            saving = step > first and (step % loop.save_every == 0 or stopping)
            if window and (step % loop.log_every == 0 or saving):  # ahead of saving, so that nothing that is not finite is saved
                losses = dict(zip(names, torch.stack(window).mean(0).tolist()))
                if not math.isfinite(losses["loss/total"]):
                    raise ArithmeticError(f"the loss is not finite near step {step}; lower distill.learning_rate.initial. The last saved state is intact")
                for name, value in losses.items():
                    board.add_scalar(name, value, step)
                report(DistillProgress(step, loop.steps, losses))
                window.clear()
            if step > first and (step % loop.validate_every == 0 or step >= loop.steps):
                found = validate(student, teacher, deep, units, validation, loop.batch_size)
                for name, value in found.items():
                    board.add_scalar(name, value, step)
                report(DistillProgress(step, loop.steps, validation=found))
            if saving:
                save_training_state(run_dir / STATE_NAME, snapshot(student, optimizer, step), {})
                save_slim(run_dir / SLIM_NAME, student, units, step)
            if stopping:
                return run_dir / SLIM_NAME

            photo = next(batches)[0].to(device).contiguous().float().div_(255)
            # A step works on every other layer: half the cost of the loss, and Adam averages over two.
            now = layers[step % 2 :: 2]
            terms = {}
            with autocast(device, precision):
                pulled = _pull(student, photo, pulled, step, loop)
                images = torch.cat([photo, pulled])
                with torch.no_grad():
                    wanted = teach(teacher, deep, images, now, units)
                found = student(images, now)
                terms["feature"] = loop.feature_weight * sum(relative_error(found[layer].float(), wanted[layer].float()) for layer in now) / len(now)
                terms["gram"] = loop.gram_weight * sum(gram_difference_error(found[layer], wanted[layer]) for layer in now) / len(now)
            if loop.gradient_weight:
                terms["gradient"] = loop.gradient_weight * _gradient_error(student, teacher, photo, precision)
            total = sum(terms.values())
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate_at(loop.learning_rate, step, loop.steps)
            optimizer.step()
            step += 1
            names = ["loss/total", *(f"loss/{name}" for name in terms)]
            window.append(torch.stack([total.detach(), *(term.detach() for term in terms.values())]))
            report(DistillProgress(step, loop.steps))


@torch.no_grad()
def validate(
    student: LossNetwork, teacher: LossNetwork, deep: DeepTeacher | None, units: dict[str, float], photos: Tensor, batch_size: int
) -> dict[str, float]:
    """Relative errors of features and of Gram differences at each layer, and 1 - cosine of pixel gradients, on ``photos``."""
    sums: dict[str, float] = {}
    batches = [batch for batch in photos.split(batch_size) if len(batch) > 1]
    for batch in batches:
        images = batch.to(student.mean.device).float().div_(255)
        found, wanted = student(images), teach(teacher, deep, images, list(student.heads), units)
        for layer in found:
            sums[f"validation_feature/{layer}"] = sums.get(f"validation_feature/{layer}", 0) + float(relative_error(found[layer], wanted[layer]))
            sums[f"validation_gram/{layer}"] = sums.get(f"validation_gram/{layer}", 0) + float(gram_difference_error(found[layer], wanted[layer]))
        with torch.enable_grad():
            error = float(_gradient_error(student, teacher, images, torch.float32).detach())
        sums["validation/gradient"] = sums.get("validation/gradient", 0) + error
    return {name: value / len(batches) for name, value in sums.items()}


def save_slim(path: Path, student: LossNetwork, units: dict[str, float], step: int) -> None:
    """Write the weight file that the package embeds, in half precision, its heads in the teacher's units."""
    metadata = {"arch": "vgg19_slim", "step": str(step), "source": "distilled from VGG-19 (Simonyan & Zisserman 2014) by fastnst"}
    metadata |= {key: ",".join(f"{value:.8f}" for value in getattr(student, key).flatten().tolist()) for key in ("mean", "std")}
    with atomic_write(path) as temporary:
        state = {key: value.float() * (units[key.split(".")[1]] if key.startswith("heads.") else 1) for key, value in student.state_dict().items()}
        temporary.write_bytes(save({key: value.half().contiguous() for key, value in state.items()}, metadata))


def teach(teacher: LossNetwork, deep: DeepTeacher | None, images: Tensor, layers: list[str], units: dict[str, float] | None = None) -> dict[str, Tensor]:
    """The teachers' features of RGB in [0, 1] at ``layers``, over ``units`` where given."""
    found = teacher(images, [layer for layer in layers if layer in _EXACT_LAYERS])
    if deep is not None and any(layer in _DEEP_LAYERS for layer in layers):
        found |= {layer: feature for layer, feature in deep(images).items() if layer in layers}
    return found if units is None else {layer: feature / units[layer] for layer, feature in found.items()}


@torch.no_grad()
def initialize_from_teacher(student: LossNetwork, teacher: LossNetwork, deep: DeepTeacher | None, photos: Tensor) -> dict[str, float]:
    """Start the student as the teacher pruned and reconstructed, layer by layer; return the unit of each layer, the teacher's RMS there.

    At each layer the student keeps the teacher's channels from which the others are best predicted, its head is the linear
    prediction of them all (as He et al. 2017, Channel Pruning), and the next convolution is the teacher's applied to that
    prediction. Deeper than the teacher, He initialization. Activations and heads are scaled to about 1, so that Adam treats all
    layers alike; ``save_slim`` gives the heads their units back.
    """
    wanted = teach(teacher, deep, photos, list(student.heads))
    units = {layer: float(feature.square().mean().sqrt()) for layer, feature in wanted.items()}
    x = (photos - student.mean) / student.std
    # The input as the teacher sees it is a linear map of the input as the student sees it.
    prediction, offset = torch.diag((student.std / teacher.std).flatten()), torch.zeros(3, device=x.device)
    layer_at = {student._index[layer]: layer for layer in student.heads}
    for index, module in enumerate(student.features):
        layer = layer_at.get(index + 1) if isinstance(module, nn.Conv2d) else None
        if layer in _EXACT_LAYERS:
            source = teacher.features[index]
            kept = _spanning_channels(wanted[layer], module.out_channels)
            size = wanted[layer][:, kept].square().mean(dim=(0, 2, 3)).sqrt()
            module.weight.copy_(torch.einsum("oikl,ij->ojkl", source.weight[kept], prediction) / size[:, None, None, None])
            module.bias.copy_((source.bias[kept] + source.weight[kept].sum(dim=(2, 3)) @ offset) / size)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
        x = module(x)
        reached = layer_at.get(index)
        if reached is not None:
            prediction, offset = _linear_prediction(x, wanted[reached])
            student.heads[reached].weight.copy_(prediction[:, :, None, None] / units[reached])
            student.heads[reached].bias.copy_(offset / units[reached])
    return units


def _spanning_channels(features: Tensor, count: int) -> Tensor:
    """Indices of ``count`` channels that explain the others best: pivoted Cholesky on their normalized second moments."""
    moments = gram_matrix(features, "hw").mean(0).cpu().double()  # which Apple's GPUs have not
    size = moments.diagonal().clamp(min=1e-12).sqrt()
    residual = moments / (size[:, None] * size[None, :])
    kept: list[int] = []
    for _ in range(count):
        explained = residual.square().sum(0) / residual.diagonal().clamp(min=1e-9)
        explained[kept] = -1
        pivot = int(explained.argmax())
        kept.append(pivot)
        residual = residual - torch.outer(residual[:, pivot], residual[pivot]) / residual[pivot, pivot].clamp(min=1e-9)
    return torch.tensor(sorted(kept), device=features.device)


def _linear_prediction(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over all positions: ``teacher`` = weight ``student`` + offset, slightly ridged."""
    x = torch.cat([student, torch.ones_like(student[:, :1])], dim=1).transpose(0, 1).flatten(1).cpu().double()
    y = teacher.transpose(0, 1).flatten(1).cpu().double()
    moments = x @ x.T / x.shape[1]
    ridge = 1e-5 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    solution = torch.linalg.solve(moments + ridge, x @ y.T / x.shape[1]).T.float().to(student.device)
    return solution[:, :-1], solution[:, -1]


def _pull(student: LossNetwork, photos: Tensor, pulled: Tensor | None, step: int, loop: DistillLoop) -> Tensor:
    """The pool after one sign-gradient step of each picture towards a photo's style; the oldest make room for photos."""
    pulled = photos if pulled is None else pulled
    age = [(step + index * loop.pull_steps // len(photos)) % loop.pull_steps for index in range(len(photos))]
    fresh = torch.tensor([years == 0 for years in age], device=photos.device)[:, None, None, None]
    pulled = torch.where(fresh, photos, pulled).requires_grad_()
    with torch.no_grad():
        targets = {layer: gram_matrix(feature, "hw") for layer, feature in student(photos.roll(1, 0), _PULL_LAYERS).items()}
    gradient = style_gradient(student(pulled, _PULL_LAYERS), pulled, targets)
    return (pulled - loop.pull_rate * gradient.sign()).clamp(0, 1).detach()


def _gradient_error(student: LossNetwork, teacher: LossNetwork, images: Tensor, precision: torch.dtype) -> Tensor:
    """1 - cosine between the pixel gradients that student and teacher send for each picture towards its neighbour's style."""
    pixels = images.detach().requires_grad_()

    def gradient(network: LossNetwork, create_graph: bool) -> Tensor:
        with autocast(images.device, precision):
            features = network(pixels, _PULL_LAYERS)
            targets = {layer: gram_matrix(feature.detach(), "hw").roll(1, 0) for layer, feature in features.items()}
            return style_gradient(features, pixels, targets, create_graph).flatten(1)

    return 1 - F.cosine_similarity(gradient(student, student.features[0].weight.requires_grad and torch.is_grad_enabled()), gradient(teacher, False)).mean()
