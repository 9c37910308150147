"""Optimizers that torch does not have: AdamW with small states, and Muon for hidden matrices with AdamW for the rest.

Both work on a rank's own shard (DTensor) as on a whole parameter, and keep only plain tensors in their state, so that
checkpoints move between strategies and numbers of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

BLOCK = 256
"""Most elements that share a scale (torchao's default)."""
_SMALLEST_BLOCK = 64
"""Smaller blocks would spend more on scales: 4 bytes per 64 elements are 6% of the state."""
_SMALLEST = 4096
"""Parameters with fewer elements keep fp32 states, as in bitsandbytes and torchao."""
STATES = ("8bit", "bfloat16", "float32")
"""Types of the moments of `LowMemoryAdamW`."""
_CODES, _SCALE = ".codes", ".scale"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_TO_STEP = 1_000_003
"""A prime: no two parameters of neighbouring steps get the same seed."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: https://kellerjordan.github.io/posts/muon/"""


class LowMemoryAdamW(Optimizer):
    """AdamW that computes in fp32 and stores its moments in fewer bits.

    Bytes per parameter of the moments: 2 (plus 8 per block) with `states=8bit`, 4 with bfloat16, 8 with float32.
    Parameters in bf16 (`trainer.precision=bf16-true`) lose small updates when they are rounded to nearest: an update
    below 2^-9 of the weight has no effect. `stochastic_rounding` keeps them on average, `master_weights` exactly.

    The 8-bit format is that of Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861) with torchao's functions. It is
    used for parameters of at least two dimensions and 4,096 elements whose rows divide into blocks of 64 to 256
    elements. A block never crosses a row, so that the state can be sharded over any number of ranks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        states: Literal["8bit", "bfloat16", "float32"] = "8bit",
        stochastic_rounding: bool = True,
        master_weights: bool = False,
    ) -> None:
        _require_positive(lr=lr, eps=eps, weight_decay=weight_decay)
        _require_shares(**{f"betas[{index}]": beta for index, beta in enumerate(betas)})
        if states not in STATES:
            raise ValueError(f"states={states}: choose one of {', '.join(STATES)}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.states = states
        self.stochastic_rounding = stochastic_rounding
        self.master_weights = master_weights

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        with _compile_limit(self.param_groups):
            for group in self.param_groups:
                for parameter in group["params"]:
                    number += 1
                    if parameter.grad is not None:
                        self._update(parameter, group, number)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            self._start(parameter, state)
        state["step"] += 1
        step = int(state["step"])
        local = _local(parameter)
        beta1, beta2 = group["betas"]
        scalars = [
            torch.tensor(value, dtype=torch.float32)
            for value in (
                1 - group["lr"] * group["weight_decay"],
                group["lr"] / (1 - beta1**step),
                1 / math.sqrt(1 - beta2**step),
                group["eps"],
            )
        ]
        parts = {key: _local(value) for key, value in state.items() if key != "step"}
        noise = self._noise(local, parts, step * _TO_STEP + number)
        update = _compiled() if local.device.type == "cuda" else adamw_update
        maps = quantization_maps(local.device) if "exp_avg.codes" in parts else None
        assert parameter.grad is not None
        update(local, _local(parameter.grad), parts, maps, noise, scalars, beta1, beta2)

    def _start(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.tensor(0.0)
        for key in _MOMENTS:
            if self.states == "8bit" and is_quantized(parameter):
                rows = parameter.shape[0]
                blocks = parameter.numel() // rows // block_of(parameter)
                codes = torch.zeros_like(_local(parameter), dtype=torch.uint8)
                scale = torch.zeros(codes.shape[0], blocks, device=codes.device)
                state[key + _CODES] = _like(parameter, codes, parameter.shape)
                state[key + _SCALE] = _like(parameter, scale, torch.Size([rows, blocks]))
            else:
                dtype = torch.bfloat16 if self.states == "bfloat16" else torch.float32
                state[key] = torch.zeros_like(parameter, dtype=dtype)
        if self.master_weights and parameter.dtype != torch.float32:
            state["master"] = parameter.detach().float()

    def _noise(self, weight: torch.Tensor, parts: dict[str, torch.Tensor], seed: int) -> list[torch.Tensor | None]:
        """Return 16 random bits per element for the weight and for each moment in bf16; None where none are needed.

        They depend only on the step and the parameter. So a resumed run draws the same, and the copies of a parameter
        on several ranks (ddp) stay equal.
        """
        rounded = [self.stochastic_rounding and weight.dtype == torch.bfloat16 and "master" not in parts]
        rounded += [key in parts and parts[key].dtype == torch.bfloat16 for key in _MOMENTS]
        if not any(rounded):
            return [None, None, None]
        generator = torch.Generator(weight.device).manual_seed(seed)
        return [
            torch.randint(0, 1 << 16, weight.shape, generator=generator, device=weight.device, dtype=torch.int32)
            if wanted
            else None
            for wanted in rounded
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. torch would convert codes and scales to the dtype of the parameter."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        present = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, present, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key != "step":
                    self.state[parameter][key] = value.to(parameter.device, copy=True)


def _require_positive(**values: float) -> None:
    """Raise ValueError for a negative value."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}={value}: must be at least 0")


def _require_shares(**values: float) -> None:
    """Raise ValueError for a value outside of [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: must be at least 0 and below 1")


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether a parameter gets 8-bit states: the same on all ranks, whatever shard they hold."""
    return parameter.dim() >= 2 and parameter.numel() >= _SMALLEST and block_of(parameter) >= _SMALLEST_BLOCK


def block_of(parameter: torch.Tensor) -> int:
    """Return the number of elements that share a scale: a divisor of the elements of a row."""
    return math.gcd(parameter.numel() // parameter.shape[0], BLOCK)


@cache
def quantization_maps(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the 256 codes, for signed and for unsigned tensors."""
    from torchao.optim.quant_utils import create_dynamic_map

    signed, unsigned = (torch.tensor(create_dynamic_map(signed=signed), device=device) for signed in (True, False))
    return signed, unsigned


def adamw_update(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    parts: dict[str, torch.Tensor],
    maps: tuple[torch.Tensor, torch.Tensor] | None,
    noise: list[torch.Tensor | None],
    scalars: list[torch.Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """Update one parameter and its state in place, in fp32 arithmetic (Loshchilov and Hutter 2019, algorithm 2).

    Args:
        weight: The parameter, or this rank's shard of it.
        gradient: Its gradient.
        parts: The state without its step.
        maps: Values of the 8-bit codes, for the first and the second moment; None without 8-bit states.
        noise: Random bits for the weight and the two moments, or None to round to nearest.
        scalars: Factor of weight decay, step size, inverse root of the second bias correction, epsilon. As tensors, so
            that a compiled function is not compiled again when they change.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
    """
    if weight.numel() == 0:
        return
    decay, step_size, correction, epsilon = scalars
    master = parts.get("master")
    values = (weight if master is None else master).float()
    gradient = gradient.float()
    first = _read(parts, "exp_avg", maps and maps[0]).lerp(gradient, 1 - beta1)
    second = _read(parts, "exp_avg_sq", maps and maps[1]).lerp(gradient * gradient, 1 - beta2)
    values = values * decay - step_size * (first / (second.sqrt() * correction + epsilon))
    _write(parts, "exp_avg", first, maps and maps[0], noise[1])
    _write(parts, "exp_avg_sq", second, maps and maps[1], noise[2])
    if master is not None:
        master.copy_(values)
    _store(weight, values, noise[0])


@cache
def _compiled() -> Callable[..., None]:
    """Return the update in one kernel per parameter, without temporary tensors of its size."""
    return torch.compile(adamw_update)


def _compile_limit(groups: list[dict[str, Any]]) -> AbstractContextManager[Any]:
    """Each kind of parameter is compiled once or twice. Above torch's limit of 8 the others would not be."""
    if not any(parameter.is_cuda for group in groups for parameter in group["params"]):
        return nullcontext()
    limit: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=64)
    return limit


def _read(parts: dict[str, torch.Tensor], key: str, values: torch.Tensor | None) -> torch.Tensor:
    if key in parts:
        return parts[key].float()
    from torchao.optim.quant_utils import dequant_with_qmap

    whole: torch.Tensor = dequant_with_qmap(parts[key + _CODES], values, parts[key + _SCALE].view(-1))
    return whole


def _write(
    parts: dict[str, torch.Tensor],
    key: str,
    moment: torch.Tensor,
    values: torch.Tensor | None,
    noise: torch.Tensor | None,
) -> None:
    if key in parts:
        _store(parts[key], moment, noise)
        return
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    block = moment.numel() // parts[key + _SCALE].numel()
    scaled, scale = scale_tensor(moment.contiguous(), block)
    parts[key + _CODES].copy_(quantize_8bit_with_qmap(scaled, values))
    parts[key + _SCALE].copy_(scale.view(parts[key + _SCALE].shape))


def _store(into: torch.Tensor, values: torch.Tensor, noise: torch.Tensor | None) -> None:
    into.copy_(values if noise is None else round_stochastically(values, noise))


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean right.

    Args:
        values: fp32.
        noise: int32, uniform in [0, 2^16), same shape.

    Returns:
        fp32 whose low 16 bits are 0, which bf16 holds exactly. Infinity and NaN are unchanged.
    """
    rounded = ((values.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _like(parameter: torch.Tensor, local: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return `local` as the shard of a tensor of `shape` that is sharded by rows as the parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


class Muon(Optimizer):
    """Muon for the groups with `muon: true`, AdamW for the others, at one learning rate.

    The update of a matrix is its momentum with all singular values moved near 1, scaled to the size of an AdamW update
    (Liu et al. 2025, https://arxiv.org/abs/2502.16982, equation 4), so that the learning rate and weight decay of AdamW
    can be kept. The momentum is the only state of a matrix: 4 bytes per parameter instead of 8.

    The orthogonalization needs whole matrices: with sharded parameters each rank gathers one update at a time, computes
    the whole, and keeps its shard.
    """

    splits_matrices = True
    """`trainer/train/optimization.py` puts the hidden matrices into groups with `muon: true`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        _require_positive(lr=lr, eps=eps, weight_decay=weight_decay, ns_steps=ns_steps)
        _require_shares(momentum=momentum, **{f"betas[{index}]": beta for index, beta in enumerate(betas)})
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "muon": False,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["muon"] and any(parameter.dim() != 2 for parameter in group["params"]):
                raise ValueError("a group with muon=True has a parameter that is not a matrix")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["muon"]:
                    self._orthogonal_step(parameter, group)
                else:
                    self._adamw_step(parameter, group)
        return loss

    def _orthogonal_step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradient, buffer = _local(parameter.grad), _local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        if isinstance(parameter, DTensor):
            direction = _like(parameter, direction, parameter.shape).full_tensor()  # type: ignore[attr-defined]
        update = orthogonalized(direction, group["ns_steps"])
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every rank has the whole update and takes its own shard; nothing is sent
            update = distribute_tensor(
                update, parameter.device_mesh, parameter.placements, src_data_rank=None
            ).to_local()
        local = _local(parameter)
        local.mul_(1 - group["lr"] * group["weight_decay"])
        local.add_(update.to(local.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))

    def _adamw_step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update({key: torch.zeros_like(parameter, dtype=torch.float32) for key in _MOMENTS})
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        scalars = (
            1 - group["lr"] * group["weight_decay"],
            group["lr"] / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step),
            group["eps"],
        )
        parts = {key: _local(state[key]) for key in _MOMENTS}
        assert parameter.grad is not None
        adamw_update(
            _local(parameter),
            _local(parameter.grad),
            parts,
            None,
            [None, None, None],
            [torch.tensor(value, dtype=torch.float32) for value in scalars],
            beta1,
            beta2,
        )


def orthogonalized(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the matrix with all singular values moved near 1, in bf16, by Newton-Schulz iterations."""
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
