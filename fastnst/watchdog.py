"""What the numbers of a training say of its health. Knows only numbers: who acts on them is the training's to decide."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

WINDOW = 20  # steps that are averaged before a run is judged: single batches differ by a factor of two
PATIENCE = 500  # steps after which the loss must have fallen; sound runs have more than halved it by then (wave: 29.7 to 2.4 times 1e5)
EXPLODED = 5.0  # times the lowest mean so far
STUCK = 0.99  # of the untrained network's total on validation
SLOWER = 0.3  # of the rate after a rollback: three of them reach from 1e-3 to 3e-5

_FINER = "lower train.learning_rate.initial, give train.learning_rate.warmup_steps or train.clip_gradient"


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a run and what to change; ``from_start``: no state of the run is worth going back to."""

    what: str
    advice: str
    from_start: bool = False


@dataclass
class Watchdog:
    """The numbers of a run that its judgment needs; part of the training state, so that a resumed run is judged as an uninterrupted one.

    ``rate`` multiplies the learning rate. The best step is that of the lowest total on validation, the first total that of the untrained network. ``recent`` holds loss,
    contrast and brightness of the last ``WINDOW`` steps.
    """

    rate: float = 1.0
    rollbacks: int = 0
    best_step: int = 0
    best_total: float = math.inf
    first_loss: float = math.inf
    first_total: float = math.inf
    lowest_mean: float = math.inf
    most_contrast: float = 0.0
    recent: list[list[float]] = field(default_factory=list)

    def watch(self, step: int, rows: list[dict[str, float]], flat: float = 0.01) -> Trouble | None:
        """Take in the numbers of the steps up to ``step`` and judge them.

        ``rows``: for each step ``loss/total`` and its parts, ``train/gradient_norm``, and of the stylized pictures, in [0, 1],
        ``output/contrast`` (standard deviation) and ``output/brightness`` (mean). ``flat``: contrast below which nothing is
        to be seen in a picture.
        """
        for at, row in enumerate(rows, step - len(rows) + 1):
            watched = {"loss": row["loss/total"], "gradient": row["train/gradient_norm"], "output": row["output/contrast"]}
            if not all(map(math.isfinite, watched.values())):
                kind = next(name for name, value in watched.items() if not math.isfinite(value))
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name.startswith("loss/") or kind in name)
                return Trouble(f"the {kind} is not finite at step {at}: {numbers}", f"{_FINER}, or lower the weights of loss")
            self.first_loss = row["loss/total"] if math.isinf(self.first_loss) else self.first_loss
            self.recent = [*self.recent[1 - WINDOW :], [row["loss/total"], row["output/contrast"], row["output/brightness"]]]
            if len(self.recent) == WINDOW:
                loss, contrast, brightness = _mean(self.recent)
                if contrast < flat and self.most_contrast > 5 * flat:
                    return Trouble(f"the output has gone {_color(brightness)} at step {at}: contrast {contrast:.2g}, was {self.most_contrast:.2g}", _FINER)
                if loss > EXPLODED * self._lowest:
                    begun = math.isfinite(self.lowest_mean)
                    was = f"was {self._lowest:.4g} (means of {WINDOW} steps)" if begun else f"the mean of {WINDOW} steps, was {self._lowest:.4g} untrained"
                    return Trouble(f"the loss has exploded at step {at}: {loss:.4g}, {was}", _FINER, from_start=not begun)
                self.lowest_mean = min(self.lowest_mean, loss)
                self.most_contrast = max(self.most_contrast, contrast)
        return None

    def suspicious(self, last: dict[str, float], flat: float = 0.01) -> bool:
        """Whether the ``last`` step looks bad already, though not for long enough to call it trouble: not to be saved."""
        return last["loss/total"] > EXPLODED * self._lowest or (last["output/contrast"] < flat and self.most_contrast > 5 * flat)

    @property
    def _lowest(self) -> float:
        """What an explosion is measured by: the lowest mean, or, before there is one, the loss of the untrained network."""
        return self.lowest_mean if math.isfinite(self.lowest_mean) else self.first_loss

    def is_best(self, step: int, total: float) -> bool:
        """Whether ``total`` on validation is the lowest so far; it is remembered then."""
        if not total < self.best_total:  # so that a NaN is never the best
            return False
        self.best_step, self.best_total = step, total
        return True

    def stuck(self, step: int, warmup: int = 0) -> Trouble | None:
        """Whether nothing has been learned by ``step``, by the totals of the same photos each time: those of batches are up to a factor of two apart."""
        if step < PATIENCE + warmup or not STUCK * self.first_total <= self.best_total < math.inf:
            return None
        advice = "lower train.learning_rate.initial, or raise it where it is below 1e-4; look whether loss weights are 0"
        return Trouble(f"the loss is stuck: by step {step} its best on validation is {self.best_total:.4g}, and was {self.first_total:.4g} untrained", advice, from_start=True)

    def rolled_back(self, state: dict[str, Any]) -> "Watchdog":
        """This one after going back to an earlier ``state`` of it, with a lower rate; what was counted and found best stands."""
        kept = {"rate": self.rate * SLOWER, "rollbacks": self.rollbacks + 1} | {name: getattr(self, name) for name in ("best_step", "best_total", "first_total")}
        return Watchdog.of(state | kept)

    def state(self) -> dict[str, Any]:
        """Plain numbers, from which ``of`` makes the same again."""
        return asdict(replace(self, recent=[list(row) for row in self.recent]))

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Watchdog":
        """By a ``state``, also of an older fastnst, which had others."""
        return cls(**{each.name: state[each.name] for each in fields(cls) if each.name in state})


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows)]


def _color(brightness: float) -> str:
    return "black" if brightness < 0.05 else "white" if brightness > 0.95 else "flat"
