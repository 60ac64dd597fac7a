"""Adam, as every published recipe has it, without what torch's own class brings along."""

from typing import Any

import torch
from torch import Tensor, nn

_UNSUPPORTED = {"weight_decay": 0, "decoupled_weight_decay": False, "amsgrad": False, "maximize": False, "capturable": False, "differentiable": False}  # of torch's


class Adam:
    """Adam (Kingma and Ba 2015) in torch's fused kernel; its state is that of ``torch.optim.Adam``: each of the two loads the other's.

    Torch's own class imports torch's compiler at its first step: 2 to 4 s and 100 MB of every training.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, **_UNSUPPORTED, "foreach": None, "fused": True}
        self.param_groups: list[dict[str, Any]] = [{"params": parameters, **settings}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """By the gradients of those parameters that have one."""
        (group,) = self.param_groups
        stepped = [parameter for parameter, gradient in zip(group["params"], self._gradients()) if gradient is not None]
        if not stepped:
            return
        for parameter in stepped:
            if parameter not in self.state:
                zeros = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **zeros}
        means, squares, steps = ([self.state[parameter][name] for parameter in stepped] for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        (beta1, beta2), gradients = group["betas"], [parameter.grad for parameter in stepped]
        choices = {"weight_decay": 0.0, "eps": group["eps"], "amsgrad": False, "maximize": False}
        torch._fused_adam_(stepped, gradients, means, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2, **choices)

    def _gradients(self) -> list[Tensor | None]:
        """In the order of memory of their parameters, as kernels take for granted."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and not same_order(parameter.grad, parameter):
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        return [parameter.grad for parameter in self.param_groups[0]["params"]]

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.optim.Adam`` gives; the tensors are those that are stepped."""
        (group,) = self.param_groups
        state = {index: dict(self.state[parameter]) for index, parameter in enumerate(group["params"]) if parameter in self.state}
        return {"state": state, "param_groups": [group | {"params": list(range(len(group["params"])))}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes copies, laid out as the weights. Raises ``KeyError`` or ``ValueError`` where it is another optimizer's."""
        (own,), (group,) = self.param_groups, state["param_groups"]
        if len(group["params"]) != len(own["params"]):
            raise ValueError(f"got the state of {len(group['params'])} parameters, need that of {len(own['params'])}")
        if asked := [name for name in _UNSUPPORTED if group.get(name)]:
            raise ValueError(f"got an Adam with {', '.join(asked)}, need one without")
        loaded = {}
        for index, its in state["state"].items():
            if index not in range(len(own["params"])):
                raise ValueError(f"got the state of a parameter {index}, need 0 to {len(own['params']) - 1}")
            parameter, found = own["params"][index], {name: its[name] for name in ("exp_avg", "exp_avg_sq")}
            if wrong := [moment.shape for moment in found.values() if moment.shape != parameter.shape]:
                raise ValueError(f"got moments of {tuple(wrong[0])} for a parameter of {tuple(parameter.shape)}")
            moments = {name: torch.empty_like(parameter, requires_grad=False).copy_(moment) for name, moment in found.items()}
            loaded[parameter] = {"step": torch.as_tensor(its["step"], dtype=torch.float32).to(parameter.device, copy=True), **moments}
        own.update({name: group[name] for name in ("lr", "betas", "eps")})
        self.state = loaded


def same_order(one: Tensor, other: Tensor) -> bool:
    """Whether numbers at the same place of both lie at the same place of memory."""
    if one.stride() == other.stride():
        return True
    return all(side == 1 or a == b for side, a, b in zip(other.shape, one.stride(), other.stride()))
