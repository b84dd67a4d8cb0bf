"""SGD, AdamW and Muon, clipping, an exponential moving average (EMA) of the weights, the one-cycle schedule."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn


class OptimizerWithEMA:
    """An optimiser of a model, with gradient clipping, and the EMA of the model's weights and buffers.

    Not `torch.optim.swa_utils.AveragedModel`: each of its updates reads a counter on the CPU (PyTorch 2.15), which a
    CUDA graph cannot. Here decay and learning rate are tensors on a GPU, so that they change between replays.

    Args:
        model: trained in place.
        ema_model: a network of the same architecture; it is overwritten with the averaged weights.
        optimizer: of the model's parameters, such as `sgd` or `adamw` return; its learning rate is set at each step,
            in each group times the group's ``lr_factor``, where it has one.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.ema_model, self.optimizer = model, ema_model.eval(), optimizer
        ema_model.load_state_dict(model.state_dict())
        self.lerp_weight: float | Tensor = 0.0  # 1 - decay
        device = next(model.parameters()).device
        if device.type == "cuda":
            self.lerp_weight = torch.zeros((), device=device)
            for group in self.optimizer.param_groups:
                group["lr"] = torch.zeros((), device=device)

    def step(self, loss: Tensor, *, learning_rate: float, gradient_clip: float, ema_decay: float) -> None:
        """Compute the gradients of a loss, clip them, and update the weights and their average.

        Args:
            loss: of the model, a scalar.
            learning_rate: of this step.
            gradient_clip: maximum norm of the gradient of all parameters together.
            ema_decay: of the averaged weights, 0 to 1.
        """
        self.set_hyperparameters(learning_rate=learning_rate, ema_decay=ema_decay)
        self.backward_and_update(loss, gradient_clip=gradient_clip)

    def set_hyperparameters(self, *, learning_rate: float, ema_decay: float) -> None:
        """Set the learning rate and the EMA's decay of the next step.

        On a GPU they are written into tensors in its memory, where a replayed CUDA graph reads them.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = _filled(group["lr"], learning_rate * group.get("lr_factor", 1.0))
        self.lerp_weight = _filled(self.lerp_weight, 1 - ema_decay)

    def backward_and_update(self, loss: Tensor, *, gradient_clip: float) -> None:
        """Do what `step` does after `set_hyperparameters`. It never synchronises with a GPU."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip)
        self.optimizer.step()
        averages = (*self.ema_model.parameters(), *self.ema_model.buffers())
        currents = (*self.model.parameters(), *self.model.buffers())
        with torch.no_grad():
            # not torch._foreach_lerp_: on a CPU it is this loop (9 of 70 µs faster for nin_digits), and on a GPU it
            # copies the weight to the CPU, which a capture forbids
            for average, current in zip(averages, currents, strict=True):
                average.lerp_(current, self.lerp_weight) if average.is_floating_point() else average.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, their averages and the optimiser's state of each parameter, by name."""
        # one flat mapping by parameter names, as safetensors stores it; an optimiser's own counts parameters
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.ema_model.state_dict().items()}
        for name, p in self.model.named_parameters():
            state = {k: v for k, v in self.optimizer.state[p].items() if isinstance(v, Tensor)}
            tensors |= {f"optimizer.{k}.{name}": v for k, v in state.items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `state_dict` returned; what came after it is forgotten."""
        self.optimizer.state.clear()
        for network, prefix in ((self.model, "model."), (self.ema_model, "average.")):
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        parameters = dict(self.model.named_parameters())
        for key, value in tensors.items():
            if key.startswith("momentum."):  # state files from before AdamW was added
                key = "optimizer.momentum_buffer." + key.removeprefix("momentum.")
            if not key.startswith("optimizer."):
                continue
            kind, name = key.removeprefix("optimizer.").split(".", 1)
            p = parameters[name]
            # in the parameter's memory format; AdamW's step count is a scalar
            buffer = torch.empty_like(p) if value.shape == p.shape else torch.empty_like(value, device=p.device)
            self.optimizer.state[p][kind] = buffer.copy_(value)


def _filled(setting: float | Tensor, value: float) -> float | Tensor:
    """Return the value; a setting that is a tensor is kept and filled with it."""
    return setting.fill_(value) if isinstance(setting, Tensor) else value


def sgd(
    model: nn.Module,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    slower: Iterable[nn.Parameter] = (),
    slower_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """Return stochastic gradient descent with Nesterov momentum.

    Args:
        model: whose parameters it updates.
        learning_rate: at the first step.
        momentum: of the gradients.
        weight_decay: per step, on weights, not on biases and gains (one-dimensional).
        slower: parameters of the model whose learning rate is lower.
        slower_rate: factor of their learning rate.
    """
    groups = _parameter_groups(model, weight_decay, slower, slower_rate)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=True)


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    slower: Iterable[nn.Parameter] = (),
    slower_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """Return Adam with decoupled weight decay.

    Args:
        model: whose parameters it updates.
        learning_rate: at the first step.
        betas: decay of the running averages of the gradient and of its square.
        weight_decay: times the learning rate per step, on weights, not on biases and gains (one-dimensional).
        slower: parameters of the model whose learning rate is lower.
        slower_rate: factor of their learning rate.

    Source:
        Loshchilov, Hutter: Decoupled weight decay regularization, 2017, arXiv 1711.05101.
    """
    groups = _parameter_groups(model, weight_decay, slower, slower_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


class Muon(torch.optim.SGD):
    """Muon for weights whose length changes nothing, and SGD for all other parameters.

    A weight W (C_out, …) of a layer that divides each filter by its length is a matrix of C_out rows. Its step is the
    momentum U S Vᵀ with S left out, so that rare directions are learned as fast as frequent ones, and the learning rate
    is the part of the weight that is exchanged: ``W ← W - γ √C_out · O / ‖O‖`` with O ≈ U Vᵀ, then
    ``W ← √C_out · W / ‖W‖``. The length being fixed, it needs no weight decay.

    Not `torch.optim.Muon` (PyTorch 2.15): it takes no filters and leaves the length to the weight decay, on which the
    size of the steps depends here.

    Args:
        groups: of parameters, as `torch.optim.SGD` takes them. One with ``orthogonal_momentum`` holds weights for Muon,
            and the momentum of their gradients, in Nesterov's form.
        lr: at the first step.
        momentum: of the gradients of the others.
        dtype: in which the directions are computed; five digits are not needed.

    Source:
        Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein: Muon, 2024, https://kellerjordan.github.io/posts/muon
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, dtype: torch.dtype = torch.float32
    ) -> None:
        # SGD takes the step along what `step` puts in the place of the gradient
        plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        groups = [{**group, **plain} if "orthogonal_momentum" in group else group for group in groups]
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; the gradients of Muon's are replaced by the direction of the step.

        Args:
            closure: must be None, as there is one gradient a step.
        """
        if closure is not None:
            raise ValueError("closure must be None")
        groups = [group for group in self.param_groups if "orthogonal_momentum" in group]
        updated = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
        for p, group in updated:
            p.grad = self._direction(p, group["orthogonal_momentum"])
        super().step()
        for p, _ in updated:
            p.mul_(math.sqrt(len(p)) / p.norm())

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Return the step's direction, as long as the weight, in the weight's memory format."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"].mul_(momentum).add_(p.grad)
        rows = orthogonalise(p.grad.add(average, alpha=momentum).flatten(1), dtype=self.dtype)
        # about 1 or more, and 0 where the layer has no gradient yet
        length = math.sqrt(len(p)) / rows.norm().clamp(min=1e-6)
        return torch.empty_like(p).copy_((rows * length).view_as(p))


# The coefficients of the polynomial in `orthogonalise`: steep at 0, so that five steps bring singular values of 1 % to
# about 1; they do not converge to 1, but stay between 0.7 and 1.2, which is as good.
ORTHOGONALISING = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, *, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Return about U Vᵀ of a matrix U S Vᵀ: each singular value of 1 % of the matrix's norm or more becomes about 1.

    Newton and Schulz's iteration ``X ← (a + b X Xᵀ + c (X Xᵀ)²) X``.

    Args:
        matrix: (m, n), floating point.
        steps: of the iteration.
        dtype: to multiply in, such as bfloat16; if not given, the matrix's.

    Returns:
        (m, n), of the matrix's dtype; zeros for zeros.

    Source:
        As `Muon`.

    Example:
        >>> torch.linalg.svdvals(orthogonalise(torch.diag(torch.tensor([5.0, 1.0, 0.1])))).round()
        tensor([1., 1., 1.])
    """
    if len(matrix) > matrix.shape[1]:  # X Xᵀ of the shorter side
        return orthogonalise(matrix.T, steps=steps, dtype=dtype).T
    a, b, c = ORTHOGONALISING
    # of values below 1e-20 the norm has no digits left in float32, and they stay small
    x = (matrix / (matrix.norm() + 1e-20)).to(dtype or matrix.dtype)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrix.dtype)


def muon(
    model: nn.Module,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    matrices: Iterable[nn.Parameter],
    sgd_factor: float,
    dtype: torch.dtype = torch.float32,
    slower: Iterable[nn.Parameter] = (),
    slower_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """Return Muon for some weights of a model, and SGD with Nesterov momentum for its other parameters.

    Args:
        model: whose parameters it updates.
        learning_rate: at the first step: the part of a weight that is exchanged.
        momentum: of the gradients.
        weight_decay: per step, on those of SGD's parameters that are weights.
        matrices: weights of the model whose length changes nothing, see `Muon`.
        sgd_factor: SGD's learning rate in times of Muon's.
        dtype: in which Muon's directions are computed, such as the training's.
        slower: parameters of the model whose learning rate is lower.
        slower_rate: factor of their learning rate.
    """
    own = {id(p) for p in matrices}
    groups = []
    for group in _parameter_groups(model, weight_decay, slower, slower_rate):
        of_muon = [p for p in group["params"] if id(p) in own]
        of_sgd = [p for p in group["params"] if id(p) not in own]
        groups.append({**group, "params": of_muon, "orthogonal_momentum": momentum})
        groups.append({**group, "params": of_sgd, "lr_factor": group["lr_factor"] * sgd_factor})
    return Muon([group for group in groups if group["params"]], lr=learning_rate, momentum=momentum, dtype=dtype)


def _parameter_groups(
    model: nn.Module, weight_decay: float, slower: Iterable[nn.Parameter], slower_rate: float
) -> list[dict[str, Any]]:
    """Return the parameters with weight decay and those without, the slower ones apart, as an optimiser takes them."""
    slow = {id(p) for p in slower} if slower_rate != 1 else set()
    groups = []
    for factor, is_slow in ((1.0, False), (slower_rate, True)):
        of_rate = [p for p in model.parameters() if (id(p) in slow) == is_slow]
        for decay, is_weight in ((weight_decay, True), (0.0, False)):
            group = [p for p in of_rate if (p.dim() > 1) == is_weight]
            groups.append({"params": group, "weight_decay": decay, "lr_factor": factor})
    return [group for group in groups if group["params"]]


def ema_decay_at_step(decay: float, step: int) -> float:
    """Return the EMA's decay at a step, counted from 0, with the warm-up of TensorFlow's EMA.

    Without the warm-up the average would hold the random initial weights for the first hundreds of steps.
    """
    return min(decay, (1 + step) / (10 + step))


# A function of the step, not a torch.optim.lr_scheduler: those keep a count of their own, which would have to be saved,
# and OneCycleLR refuses steps behind the last one.
def one_cycle_learning_rate(
    step: int, steps: int, *, peak: float, warmup: float, schedule: Literal["cosine", "triangle"] = "cosine"
) -> float:
    """Return a step's learning rate on the one-cycle schedule: linear warm-up, then cosine or linear decay to zero.

    Args:
        step: which one, from 0.
        steps: in the whole training; behind them it stays at zero.
        peak: the maximum.
        warmup: fraction of all steps in which it rises.
        schedule: how it falls, along a cosine or in a straight line ("triangle").

    Source:
        Smith, Topin: Super-Convergence, 2017, arXiv 1708.07120.

    Example:
        >>> rates = [one_cycle_learning_rate(step, 6, peak=1.0, warmup=0.5, schedule="triangle") for step in range(7)]
        >>> [round(rate, 2) for rate in rates]
        [0.25, 0.5, 0.75, 1.0, 0.67, 0.33, 0.0]
    """
    rise = max(1.0, warmup * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    progress = min(1.0, (step - rise) / max(1.0, steps - rise))
    return peak * (1 - progress if schedule == "triangle" else 0.5 * (1 + math.cos(math.pi * progress)))
