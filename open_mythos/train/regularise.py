"""Terms that shape the loop rather than its answer. Pure functions; `Objective` multiplies and adds them.

loop_similarity   mean cosine of corresponding weights in neighbouring blocks of k layers; a reward,
                  so subtract it: loss - 10 R.  Saunshi et al. 2025, arXiv 2502.17416, section 6 (the
                  printed sign would punish what the text means to reward)
norm_drift        ( log ||h_N|| - log ||h_1|| )^2 per token: the state should not swell with depth
jacobian_vjp      ||v^T J||^2 of one step at the final state, v random: STARS, arXiv 2605.26733, weight 0.1
jacobian_secant   the same quantity from two forward evaluations, for steps whose kernels have no
                  second derivative; E ||J v||^2 = E ||v^T J||^2 = ||J||_F^2 / D for such v
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.shapes import Hidden
from open_mythos.train.loss import Scalar
from open_mythos.train.parallel import at_hand


def loop_similarity(layers: Sequence[nn.Module], block: int) -> Scalar:
    """Mean over weights of R(k) in [-1, 1], for alike layers taken as blocks of `block`.

    Raises `ValueError` unless there are at least two whole blocks.
    """
    if not 0 < block < len(layers) or len(layers) % block:
        raise ValueError(
            f"{len(layers)} layers cannot be compared in blocks of {block}; "
            "the block should divide them into two or more"
        )
    pairs = zip(layers, layers[block:], strict=False)
    return torch.stack([_cosine(a, b) for a, b in pairs]).mean()


def norm_drift(first: Hidden, last: Hidden) -> Scalar:
    """Mean squared log ratio of the state's norm after the last and after the first step."""
    ratio = (
        last.float().norm(dim=-1).clamp_min(1e-12).log() - first.float().norm(dim=-1).clamp_min(1e-12).log()
    )
    squares: Tensor = ratio.square()
    return squares.mean()


def jacobian_vjp(step: Callable[[Hidden], Hidden], state: Hidden, rng: Generator) -> Scalar:
    """Estimate of ||J||_F^2 / (B T D) at `state`; gradient reaches the parameters of `step`, not the state.

    Differentiates twice, so attention runs through its plain kernel.
    """
    at = state.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        after = step(at)
        (pulled,) = torch.autograd.grad(after, at, unit_probe(after, rng), create_graph=True)
    return _per_token(pulled)


def jacobian_secant(
    step: Callable[[Hidden], Hidden], state: Hidden, rng: Generator, *, size: float = 1e-2
) -> Scalar:
    """As `jacobian_vjp`, from a central difference of relative length `size`."""
    at = state.detach()
    # one length for all tokens: the step mixes them, and a length per token would weigh its parts unevenly
    stride = size * at.float().norm(dim=-1).mean().clamp_min(1e-6)
    move = stride.to(at.dtype) * unit_probe(at, rng)
    return _per_token((step(at + move).float() - step(at - move).float()) / (2 * stride))


def unit_probe(like: Hidden, rng: Generator) -> Hidden:
    """For every token a vector of random signs, of length one."""
    bits = torch.randint(0, 2, like.shape, generator=rng, device=rng.device).to(like)
    return (2 * bits - 1) / math.sqrt(like.shape[-1])


def _per_token(vectors: Hidden) -> Scalar:
    """Squared length, averaged over tokens."""
    squares: Tensor = vectors.float().square().sum(-1)
    return squares.mean()


def _cosine(a: nn.Module, b: nn.Module) -> Float[Tensor, ""]:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    matrices = [(at_hand(x).flatten(), at_hand(y).flatten()) for x, y in pairs if x.ndim > 1]
    return torch.stack([F.cosine_similarity(x, y, dim=0) for x, y in matrices]).mean()
