"""Which steps of the loop are scored, against what, and what leaving early costs.

Final      the last step only                      Chen 2026, arXiv 2603.21676: essential on its tasks
EveryStep  sum_n prior_n CE_n, prior fixed          Adaptive Depth, arXiv 2607.20519: a prior that does not
           look at the input already gives trajectories that know what is hard
Stepwise   mean_n CE(step n, target n)              a step is scored against the state after that many turns

exits      p_n = g_n prod_{m<n} (1 - g_m), the last step takes the rest; g = sigmoid(exit logits)
LearnedExit  sum_n p_n CE_n + beta KL(p || prior)   PonderNet, Banino et al. 2021, arXiv 2107.05407 (geometric
           prior of ratio 0.8, beta 0.01); Ouro stage I, Zhu et al. 2025, arXiv 2510.25741 (uniform prior,
           where KL is log N - entropy: beta 0.1, then 0.05)
TaughtExit the gate alone, in a model that stays as it is: to go on where the step helped    Ouro stage II
ponder     N + R: steps taken, and the remainder that gradient sees    ACT, Graves 2016, arXiv 1603.08983
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.shapes import Features, PerToken, Tokens
from open_mythos.train.loss import IGNORED, Loss, Scalar, next_token_loss

Exits = Float[Tensor, "N B T"]  # one number per step and token
Prior = Float[Tensor, "N"]
Head = Float[Tensor, "V D"]


class Uniform(Config):
    def over(self, steps: int) -> Prior:
        return torch.full((steps,), 1 / steps)


class Geometric(Config):
    """Each step weighs `ratio` times the one before: below 1 favours early steps, above 1 late ones."""

    ratio: float = 0.8

    def over(self, steps: int) -> Prior:
        logs = torch.arange(steps) * math.log(self.ratio)
        return logs.softmax(0)


class Final(Config):
    """Only the last of the given features is read."""

    def loss(
        self, features: Sequence[Features], head: Head, targets: Sequence[Tokens], *, z_loss: float = 0.0
    ) -> Loss:
        return next_token_loss(features[-1], head, targets[-1], z_loss=z_loss)


class EveryStep(Config):
    """Every step is read and scored against the final target."""

    prior: Uniform | Geometric = Uniform()

    def loss(
        self, features: Sequence[Features], head: Head, targets: Sequence[Tokens], *, z_loss: float = 0.0
    ) -> Loss:
        shares = self.prior.over(len(features)).tolist()
        losses = [next_token_loss(step, head, targets[-1], z_loss=z_loss) for step in features]
        return _mixed(losses, shares)


class Stepwise(Config):
    """Step n is scored against target n; steps beyond the last target, which the task has reached
    by then, against that one."""

    def loss(
        self, features: Sequence[Features], head: Head, targets: Sequence[Tokens], *, z_loss: float = 0.0
    ) -> Loss:
        last = len(targets) - 1
        losses = [
            next_token_loss(step, head, targets[min(n, last)], z_loss=z_loss)
            for n, step in enumerate(features)
        ]
        return _mixed(losses, [1 / len(losses)] * len(losses))


class LearnedExit(Config):
    """Every step is scored in proportion to how likely the gate is to leave there; trains model and gate.

    With a uniform prior Ouro's stage I, with a geometric one PonderNet.
    """

    prior: Uniform | Geometric = Uniform()
    beta: float = 0.1

    def loss(
        self,
        features: Sequence[Features],
        head: Head,
        targets: Sequence[Tokens],
        logits: Exits,
        *,
        z_loss: float = 0.0,
    ) -> Loss:
        prior = self.prior.over(len(features))
        return learned_exit_loss(
            features, head, targets[-1], logits, prior=prior, beta=self.beta, z_loss=z_loss
        )


class TaughtExit(Config):
    """Ouro's stage II: gradient reaches the gate alone. Give the run the `weights` of an earlier one."""

    slope: float = 50.0
    gain: float = 0.005  # nats that a step has to win to be worth taking

    def loss(
        self,
        features: Sequence[Features],
        head: Head,
        targets: Sequence[Tokens],
        logits: Exits,
        *,
        z_loss: float = 0.0,
    ) -> Loss:
        """What is minimised is the gate's; `tokens` are the cross entropies expected under the exits."""
        with torch.no_grad():
            scored = [next_token_loss(step, head, targets[-1]) for step in features]
        tokens = torch.stack([loss.tokens for loss in scored])
        total = continue_loss(logits, tokens, targets[-1] != IGNORED, slope=self.slope, gain=self.gain)
        expected = (exit_log_probabilities(logits.detach().float()).exp() * tokens).sum(0)
        return Loss(total, scored[-1].valid, expected)


def exit_log_probabilities(logits: Exits) -> Exits:
    """log p_n of leaving at each step; the probabilities of a token sum to one."""
    sure = torch.zeros_like(logits[:1])
    stayed = torch.cat([sure, F.logsigmoid(-logits[:-1]).cumsum(0)])
    leaves = torch.cat([F.logsigmoid(logits[:-1]), sure])
    return stayed + leaves


def exit_divergence(log_probabilities: Exits, prior: Prior) -> PerToken:
    """KL(p || prior) in nats."""
    log_prior = prior.to(log_probabilities).log()[:, None, None]
    return (log_probabilities.exp() * (log_probabilities - log_prior)).sum(0)


def learned_exit_loss(
    features: Sequence[Features],
    head: Head,
    targets: Tokens,
    logits: Exits,
    *,
    prior: Prior,
    beta: float,
    z_loss: float = 0.0,
) -> Loss:
    """Cross entropy expected under the exit distribution, held near a prior. Gradient reaches the gates."""
    logs = exit_log_probabilities(logits.float())
    losses = [
        next_token_loss(step, head, targets, weights=p, z_loss=z_loss)
        for step, p in zip(features, logs.exp(), strict=True)
    ]
    valid = targets != IGNORED
    divergence = exit_divergence(logs, prior).where(valid, 0.0).sum()
    tokens = torch.stack([p.detach() * loss.tokens for p, loss in zip(logs.exp(), losses, strict=True)]).sum(
        0
    )
    total = torch.stack([loss.total for loss in losses]).sum() + beta * divergence
    return Loss(total, losses[0].valid, tokens)


def continue_targets(tokens: Exits, *, slope: float = 50.0, gain: float = 0.005) -> Float[Tensor, "N-1 B T"]:
    """Stage II labels: near 1 where step n lowered a token's loss by more than `gain` nats, n = 2..N."""
    improvement = (tokens[:-1] - tokens[1:]).clamp_min(0).detach()
    return torch.sigmoid(slope * (improvement - gain))


def continue_loss(
    logits: Exits, tokens: Exits, valid: Bool[Tensor, "B T"], *, slope: float = 50.0, gain: float = 0.005
) -> Scalar:
    """Stage II: binary cross entropy of staying, 1 - g_n, against its label; summed over tokens and
    divided by the number of steps. `tokens` are the per-step cross entropies of a frozen model."""
    labels = continue_targets(tokens, slope=slope, gain=gain)
    terms = F.binary_cross_entropy_with_logits(-logits[1:].float(), labels, reduction="none")
    return terms.sum(0).where(valid, 0.0).sum() / len(logits)


def mean_exit(logits: Exits) -> PerToken:
    """The step, counted from one, after which a token is expected to leave."""
    steps = torch.arange(1, len(logits) + 1, device=logits.device)[:, None, None]
    return (exit_log_probabilities(logits.float()).exp() * steps).sum(0)


def ponder_cost(steps: PerToken, remainder: PerToken, valid: Bool[Tensor, "B T"]) -> Scalar:
    """Sum over tokens of N + R; scaled by 0.01 or less. N is a count, so only R carries gradient."""
    return (steps.detach() + remainder).where(valid, 0.0).sum()


def _mixed(losses: Sequence[Loss], shares: Sequence[float]) -> Loss:
    """Shares of several sums, each over its own valid targets; counted as the last one is."""
    last = losses[-1].valid
    parts = [
        share * loss.total * (last / loss.valid.clamp_min(1))
        for share, loss in zip(shares, losses, strict=True)
    ]
    return Loss(torch.stack(parts).sum(), last, losses[-1].tokens)


Gated = LearnedExit | TaughtExit  # these read the gate's logits too
Readout = Final | EveryStep | Stepwise | LearnedExit | TaughtExit
