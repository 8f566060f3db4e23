import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from open_mythos.train.loss import IGNORED, naive_next_token_loss
from open_mythos.train.readout import (
    EveryStep,
    Final,
    Geometric,
    Stepwise,
    Uniform,
    continue_loss,
    continue_targets,
    exit_divergence,
    exit_log_probabilities,
    learned_exit_loss,
    ponder_cost,
)

N, B, T, D, V = 4, 2, 5, 8, 17


def inputs() -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    features = [torch.randn(B, T, D).requires_grad_() for _ in range(N)]
    targets = [torch.randint(0, V, (B, T)) for _ in range(N)]
    for target in targets:
        target[0, 0] = IGNORED
    return features, torch.randn(V, D), targets, torch.randn(N, B, T).requires_grad_()


def test_final_reads_the_last_step_only() -> None:
    features, head, targets, _ = inputs()
    loss = Final().loss(features, head, targets)
    assert_close(loss.total, naive_next_token_loss(features[-1], head, targets[-1]).total)
    loss.total.backward()
    assert [f.grad is not None for f in features] == [False, False, False, True]


@pytest.mark.parametrize("prior", [Uniform(), Geometric(ratio=0.5), Geometric(ratio=2.0)])
def test_every_step_is_weighed_by_the_prior(prior: Uniform | Geometric) -> None:
    features, head, targets, _ = inputs()
    shares = prior.over(N)
    assert_close(shares.sum(), torch.tensor(1.0))
    each = torch.stack([naive_next_token_loss(f, head, targets[-1]).total for f in features])
    assert_close(EveryStep(prior=prior).loss(features, head, targets).total, (shares * each).sum())


def test_geometric_prior() -> None:
    assert_close(Geometric(ratio=0.5).over(3), torch.tensor([4, 2, 1]) / 7)


def test_stepwise_targets_and_steps_beyond_them() -> None:
    features, head, targets, _ = inputs()
    goals = [targets[0], targets[1], targets[1], targets[1]]
    each = [naive_next_token_loss(f, head, g).total for f, g in zip(features, goals, strict=True)]
    assert_close(Stepwise().loss(features, head, targets[:2]).total, torch.stack(each).mean())


def test_stepwise_weighs_steps_alike_whatever_their_number_of_targets() -> None:
    features, head, targets, _ = inputs()
    targets[0][1] = IGNORED
    means = [naive_next_token_loss(f, head, g) for f, g in zip(features, targets, strict=True)]
    loss = Stepwise().loss(features, head, targets)
    assert_close(loss.total / loss.valid, torch.stack([m.total / m.valid for m in means]).mean())


def test_exit_probabilities_are_the_definition_and_sum_to_one() -> None:
    logits = torch.randn(N, B, T)
    gates, left, expected = logits.sigmoid(), torch.ones(B, T), []
    for n in range(N - 1):
        expected.append(left * gates[n])
        left = left * (1 - gates[n])
    p = exit_log_probabilities(logits).exp()
    assert_close(p, torch.stack([*expected, left]))
    for extreme in (-1e4, 1e4):
        assert_close(exit_log_probabilities(torch.full((N, B, T), extreme)).exp().sum(0), torch.ones(B, T))


def test_learned_exit_is_ouros_stage_one() -> None:
    """Uniform prior: sum p CE - beta H(p), up to beta log N."""
    features, head, targets, logits = inputs()
    loss = learned_exit_loss(features, head, targets[-1], logits, prior=Uniform().over(N), beta=0.1)
    p = exit_log_probabilities(logits).exp()
    each = torch.stack([naive_next_token_loss(f, head, targets[-1], weights=None).tokens for f in features])
    entropy = -(p * p.log()).sum(0)
    valid = targets[-1] != IGNORED
    expected = (((p * each).sum(0) - 0.1 * (entropy - math.log(N))) * valid).sum()
    assert_close(loss.total, expected)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss.total, expected))
    assert_close(ours, theirs)
    assert_close(loss.tokens, ((p * each).sum(0) * valid).detach())


def test_divergence_is_ponder_nets() -> None:
    logs, prior = exit_log_probabilities(torch.randn(N, B, T)), Geometric(ratio=0.6).over(N)
    expected = F.kl_div(prior.log()[:, None, None].expand_as(logs), logs, reduction="none", log_target=True)
    assert_close(exit_divergence(logs, prior), expected.sum(0))
    at_prior = prior.log()[:, None, None].expand(N, B, T)
    assert_close(exit_divergence(at_prior, prior), torch.zeros(B, T))


def test_stage_two_teaches_to_go_on_where_it_helped() -> None:
    tokens = torch.tensor([2.0, 1.0, 0.999, 1.5])[:, None, None]
    labels = continue_targets(tokens)[:, 0, 0]
    expected = torch.sigmoid(50 * (torch.tensor([1.0, 0.001, 0.0]) - 0.005))
    assert_close(labels, expected, atol=1e-4, rtol=0)
    logits = torch.zeros(4, 1, 1, requires_grad=True)
    loss = continue_loss(logits, tokens, torch.ones(1, 1, dtype=torch.bool))
    assert_close(loss, torch.tensor(3 * math.log(2) / 4))
    loss.backward()
    push = -logits.grad[:, 0, 0]
    assert push[0] == 0  # no step before the first to compare with
    assert push[1] < 0 < push[3]  # a step that helped lowers the gate, one that did not raises it


def test_stage_two_ignores_padding() -> None:
    logits, tokens = torch.randn(N, B, T).requires_grad_(), torch.rand(N, B, T)
    valid = torch.zeros(B, T, dtype=torch.bool)
    valid[0, 1] = True
    continue_loss(logits, tokens, valid).backward()
    assert logits.grad[:, ~valid].abs().max() == 0
    assert logits.grad[1:, valid].abs().min() > 0


def test_ponder_cost_is_graves() -> None:
    steps = torch.full((B, T), 3.0, requires_grad=True)
    remainder, valid = torch.rand(B, T).requires_grad_(), torch.ones(B, T, dtype=torch.bool)
    valid[0] = False
    cost = ponder_cost(steps, remainder, valid)
    assert_close(cost, (3 + remainder[1]).sum())
    cost.backward()
    assert steps.grad is None
    assert_close(remainder.grad, valid.float())
