"""Muon: momentum, made orthogonal, as the step of a matrix.

    M  =  mu M + (1 - mu) G                      momentum;  U = mu M + (1 - mu) G  (Nesterov)
    O  =  U V^T  of the update's SVD             by an odd polynomial iterated on X = U / ||U||_F
    W  =  (1 - lr wd) W  -  lr scale O

    Quintic        one polynomial five times      Jordan 2024, kellerjordan.github.io/posts/muon
    PolarExpress   five, each the best for its turn    Amsel et al. 2025, arXiv 2505.16932

Matrices of one shape, tall ones transposed, go through the iteration as one batch: a stack of
experts (E, F, D) is E matrices, and a fused pair of maps (2F, D) is two. Batches are cut into pieces
that stay in the CPU's cache. Oracle: `torch.optim.Muon` on each matrix by itself.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from open_mythos.config import Config
from open_mythos.train.roles import Blocks

Stack = Float[Tensor, "n r c"]
CACHED_BYTES = 2**19  # of X per product on a CPU: three such buffers stay in a core's second-level cache
DEVICE_BYTES = 2**28


class Quintic(Config):
    """X <- a X + b (X X^T) X + c (X X^T)^2 X: singular values end between about 0.7 and 1.2."""

    steps: int = 5

    def turns(self) -> list[tuple[float, float, float]]:
        return [(3.4445, -4.7750, 2.0315)] * self.steps

    @property
    def margin(self) -> float:
        return 1.0


class PolarExpress(Config):
    """Closer to orthogonal for the same five turns; X starts a little below norm 1 for bf16's sake."""

    def turns(self) -> list[tuple[float, float, float]]:
        return [
            (8.1566, -22.4833, 15.8788),
            (4.0429, -2.8089, 0.5000),
            (3.8917, -2.7725, 0.5061),
            (3.2858, -2.3681, 0.4645),
            (2.3465, -1.7098, 0.4232),
        ]

    @property
    def margin(self) -> float:
        return 1.02


class Muon(Config):
    """Choices for the matrices.

    scale        "aspect": sqrt(max(1, rows/columns)); "rms": 0.2 sqrt(max(rows, columns)), which
                 gives steps the size of AdamW's (Liu et al. 2025, arXiv 2502.16982)
    warmup       steps over which momentum climbs linearly from `momentum_start`
    cautious     decay only where it agrees with the step's direction (Chen et al. 2025, arXiv 2510.12402)
    precision    of the polynomial; "auto" is bf16 where the hardware multiplies it fast
    """

    lr: float = 0.02
    momentum: float = 0.95
    momentum_start: float = 0.85
    warmup: int = 0
    nesterov: bool = True
    weight_decay: float = 0.0
    cautious: bool = False
    scale: Literal["aspect", "rms"] = "aspect"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    polynomial: Quintic | PolarExpress = Quintic()

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"a learning rate is not negative, got Muon.lr={self.lr}")

    def momentum_at(self, step: int) -> float:
        """Momentum of update number `step`, counted from 0."""
        progress = min(1.0, step / self.warmup) if self.warmup else 1.0
        return self.momentum_start + progress * (self.momentum - self.momentum_start)

    def build(self, matrices: Sequence[tuple[nn.Parameter, Blocks]]) -> "BatchedMuon":
        return BatchedMuon(self, matrices)


class BatchedMuon(torch.optim.Optimizer):
    """Muon over (rows, columns) matrices and (stack, rows, columns) of them, sharded or not.

    A sharded matrix is gathered, since its orthogonalisation needs all of it; what is cut along a stack
    stays where it is.
    """

    def __init__(self, config: Muon, matrices: Sequence[tuple[nn.Parameter, Blocks]]) -> None:
        self.config = config
        self.blocks = dict(matrices)
        super().__init__([{"params": list(self.blocks), "steps": 0}], {"lr": config.lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "a closure has no meaning for Muon"
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            momentum = self.config.momentum_at(group["steps"])
            wholes = [_whole(self._direction(p, momentum)) for p in live]
            orthogonalise_(
                [(whole, self.blocks[p]) for p, whole in zip(live, wholes, strict=True)], self.config
            )
            for parameter, whole in zip(live, wholes, strict=True):
                self._descend(parameter, _shard_like(parameter, whole), group["lr"])
            group["steps"] += 1

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum) if self.config.nesterov else average.clone()  # type: ignore[union-attr]

    def _descend(self, parameter: nn.Parameter, update: Tensor, lr: float) -> None:
        decay = lr * self.config.weight_decay
        if decay and self.config.cautious:
            update.addcmul_(
                parameter, (update * parameter >= 0).to(update.dtype), value=self.config.weight_decay
            )
        elif decay:
            parameter.mul_(1 - decay)
        parameter.add_(update, alpha=-lr)


def orthogonalise_(updates: Iterable[tuple[Tensor, Blocks]], config: Muon) -> None:
    """Replace each update (rows, columns) or (stack, rows, columns) by its scaled orthogonal factor."""
    same: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for update, blocks in updates:
        for block in _blocks(update, blocks):
            wide = block if block.shape[-2] <= block.shape[-1] else block.mT
            same[(*wide.shape[-2:], update.device)].append(block)
    for (short, long, device), blocks_of_shape in same.items():
        precision = _precision(config, device)
        wides = [b if b.shape[-2] <= b.shape[-1] else b.mT for b in blocks_of_shape]
        batch = torch.cat([w.reshape(-1, short, long).to(precision) for w in wides])
        factors = _in_pieces(batch, config).split([w.numel() // (short * long) for w in wides])
        for block, wide, factor in zip(blocks_of_shape, wides, factors, strict=True):
            wide.copy_(factor.view(wide.shape)).mul_(_scale(block, config))


def polar_factor(x: Stack, polynomial: Quintic | PolarExpress) -> Stack:
    """Approximately U V^T for each X = U S V^T in a stack of wide matrices, in X's precision."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / (polynomial.margin * norm).clamp_min(1e-7).to(x.dtype)
    for a, b, c in polynomial.turns():
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _in_pieces(batch: Stack, config: Muon) -> Stack:
    limit = CACHED_BYTES if batch.device.type == "cpu" else DEVICE_BYTES
    at_once = max(1, limit // (batch.shape[1] * batch.shape[2] * batch.element_size()))
    for piece in batch.split(at_once):
        piece.copy_(polar_factor(piece, config.polynomial))
    return batch


def _blocks(update: Tensor, blocks: Blocks) -> Sequence[Tensor]:
    """Views of the maps stacked along the rows; equal ones as a single view with one more axis."""
    if isinstance(blocks, int):
        return [update.unflatten(-2, (blocks, update.shape[-2] // blocks))]
    return list(torch.split(update, list(blocks), dim=-2))


def _scale(block: Tensor, config: Muon) -> float:
    rows, columns = block.shape[-2:]
    return (
        math.sqrt(max(1, rows / columns)) if config.scale == "aspect" else 0.2 * math.sqrt(max(rows, columns))
    )


def _precision(config: Muon, device: torch.device) -> torch.dtype:
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        torch.bfloat16
        if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16")
        else torch.float32
    )


def _whole(update: Tensor) -> Tensor:
    """All rows and columns of every matrix that this process works on."""
    if not isinstance(update, DTensor):
        return update
    return update.redistribute(placements=_gathered(update)).to_local()


def _shard_like(parameter: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    there = DTensor.from_local(whole, mesh, _gathered(parameter), run_check=False, shape=shape, stride=stride)
    return there.redistribute(placements=parameter.placements)


def _gathered(tensor: DTensor) -> list[Placement]:
    """Where each matrix is whole: a stack of them may stay cut along the stack."""
    stays = (Shard(0),) if tensor.ndim == 3 else ()
    return [placement if placement in stays else Replicate() for placement in tensor.placements]
