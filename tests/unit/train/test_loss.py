import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from open_mythos.train.loss import IGNORED, Loss, naive_next_token_loss, next_token_loss

B, T, D, V = 3, 7, 8, 29


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = torch.randn(B, T, D, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T))
    targets[0, 2:4] = IGNORED
    targets[2] = IGNORED
    return features, head, targets, torch.rand(B, T).requires_grad_()


def gradients(loss: Loss, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3.0 * loss.total, of)


@pytest.mark.parametrize("chunk", [1, 4, 21, 100, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_definition(chunk: int | None, z_loss: float, weighted: bool) -> None:
    features, head, targets, weights = inputs(torch.float32)
    given = weights if weighted else None
    of = (features, head, weights) if weighted else (features, head)
    fast = next_token_loss(features, head, targets, weights=given, z_loss=z_loss, chunk=chunk)
    slow = naive_next_token_loss(features, head, targets, weights=given, z_loss=z_loss)
    assert_close(fast.total, slow.total)
    assert_close(fast.tokens, slow.tokens)
    assert fast.valid == slow.valid == 12
    for ours, theirs in zip(gradients(fast, *of), gradients(slow, *of), strict=True):
        assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_under_autocast() -> None:
    features, head, targets, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = (f(features, head, targets) for f in (next_token_loss, naive_next_token_loss))
    exact = naive_next_token_loss(features, head, targets)
    assert fast.total.dtype == torch.float32
    assert_close(fast.total, slow.total, atol=0.05, rtol=1e-3)
    wanted = gradients(exact, features, head)
    for ours, truth in zip(gradients(fast, features, head), wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() < 0.02 * truth.norm()


def test_bf16_and_half_precision_features() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        features, head, targets, _ = inputs(dtype)
        fast = next_token_loss(features, head, targets, chunk=5)
        exact = naive_next_token_loss(features.float(), head.float(), targets)
        assert_close(fast.total, exact.total, atol=0.3, rtol=1e-2)
        assert [g.dtype for g in gradients(fast, features, head)] == [dtype, dtype]


def test_accumulation_over_micro_batches_is_one_batch() -> None:
    features, head, targets, _ = inputs(torch.float32)
    whole = next_token_loss(features, head, targets)
    parts = [next_token_loss(features[i : i + 1], head, targets[i : i + 1]) for i in range(B)]
    valid = torch.stack([part.valid for part in parts]).sum()
    summed = torch.stack([part.total for part in parts]).sum() / valid
    assert_close(summed, whole.total / whole.valid)
    assert_close(
        torch.autograd.grad(summed, head)[0], torch.autograd.grad(whole.total / whole.valid, head)[0]
    )


def test_tied_and_frozen_heads() -> None:
    features, head, targets, _ = inputs(torch.float32)
    frozen = next_token_loss(features, head.detach(), targets)
    (gradient,) = gradients(frozen, features)
    assert_close(gradient, gradients(naive_next_token_loss(features, head, targets), features)[0])
    assert not next_token_loss(features.detach(), head.detach(), targets).total.requires_grad
    with torch.no_grad():
        assert not next_token_loss(features, head, targets).total.requires_grad


def test_nothing_to_predict() -> None:
    features, head, targets, _ = inputs(torch.float32)
    loss = next_token_loss(features, head, torch.full_like(targets, IGNORED))
    assert (float(loss.total.detach()), int(loss.valid)) == (0.0, 0)
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, features, head))


@pytest.mark.parametrize("bad", [V, -1, -99])
def test_targets_outside_the_vocabulary(bad: int) -> None:
    features, head, targets, _ = inputs(torch.float32)
    targets[1, 1] = bad
    with pytest.raises(ValueError, match=f"below {V}"):
        next_token_loss(features, head, targets)


def test_extreme_logits_stay_finite() -> None:
    features, head, targets, _ = inputs(torch.float32)
    loss = next_token_loss(1e4 * features, head, targets)
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, features, head))


def test_logits_are_never_held_whole() -> None:
    """Peak memory by torch's own count: a chunk of logits, not all of them."""
    rows, vocabulary = 512, 4096
    features, head = torch.randn(1, rows, D).requires_grad_(), torch.randn(vocabulary, D).requires_grad_()
    targets = torch.randint(0, vocabulary, (1, rows))

    def largest(loss: object) -> int:
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            loss(features, head, targets).total.backward()  # type: ignore[operator]
        return max(event.self_cpu_memory_usage for event in profile.events())

    fast = largest(lambda *given: next_token_loss(*given, chunk=32))
    assert largest(naive_next_token_loss) >= 4 * rows * vocabulary
    assert fast <= 4 * rows * vocabulary / 8
