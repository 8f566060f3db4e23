"""Start, mark, inject, adapt and update against their equations, written out."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.loop import adapt, inject, mark, start, update
from open_mythos.nn.context import Context
from tests.zoo import close

DIM = 12
H, E, Y = torch.randn(3, 2, 5, DIM, generator=torch.Generator().manual_seed(0))
CTX = Context.counting(torch.zeros(2, 5, dtype=torch.long), start=3)
STEP = torch.tensor([0, 7])  # the second row is past every table


def awake(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def test_start() -> None:
    assert (start.Zeros().build(DIM)(E) == 0).all()
    embedded = start.Embedded().build(DIM)(E)
    assert torch.equal(embedded, E)
    assert embedded.data_ptr() != E.data_ptr()


def test_noise() -> None:
    big = torch.zeros(50, 100, DIM)
    rng = torch.Generator().manual_seed(0)
    h, std = start.Noise(scale=2.0).build(DIM)(big, rng), math.sqrt(2 / (5 * DIM))
    assert abs(float(h.std()) / (2 * std) - 0.9866) < 0.01  # a normal cut at three deviations
    assert abs(float(h.mean())) < 0.01
    assert 2.9 * std < float(h.abs().max()) / 2 <= 3 * std
    assert (start.Noise().build(DIM)(big) == 0).all()
    assert torch.equal(start.Noise(std=0.5).build(DIM)(E, rng.manual_seed(1)).std() > 0.3, torch.tensor(True))


def sinusoid(n: int, channels: int, base: float) -> Tensor:
    half = [n * base ** (-2 * i / max(channels, 1)) for i in range((channels + 1) // 2)]
    values = [math.sin(a) for a in half] + [math.cos(a) for a in half]
    return torch.tensor(values[:channels] + [0.0] * (DIM - channels))


@pytest.mark.parametrize("channels", [0, 4, 5, DIM])
def test_step_sinusoid(channels: int) -> None:
    signal = torch.stack(
        [sinusoid(n, channels, 100.0) if channels else torch.zeros(DIM) for n in STEP.tolist()]
    )
    plain = mark.StepSinusoid(channels=channels, base=100.0, amplitude=0.7).build(DIM)
    close(plain(H, STEP, CTX), H + 0.7 * signal[:, None], 1e-6)
    shared = mark.StepSinusoid(channels=channels, base=100.0, relative=True).build(DIM)
    close(shared(H, STEP, CTX), H + signal[:, None] * H.square().mean(-1, keepdim=True).sqrt(), 1e-6)
    assert mark.StepSinusoid().build(64).channels == 8


def test_a_sinusoid_may_end() -> None:
    ends, on = (mark.StepSinusoid(steps=steps).build(DIM) for steps in (2, None))
    late = STEP + 5
    close(ends(H, late, CTX), on(H, torch.ones_like(late), CTX))
    assert not torch.allclose(ends(H, late, CTX), on(H, late, CTX))


def test_more_channels_than_there_are() -> None:
    with pytest.raises(ValueError, match="marks 13 channels, but there are 12"):
        mark.StepSinusoid(channels=13).build(DIM)


def test_step_table_goes_on_with_its_last_row() -> None:
    module = awake(mark.StepTable(steps=3).build(DIM))
    close(module(H, STEP, CTX), H + module.table.weight[[0, 2]][:, None])


@pytest.mark.parametrize("steps", [None, 3])
def test_position_and_step(steps: int | None) -> None:
    module = awake(mark.PositionStep(steps=steps, base=100.0).build(DIM))
    half = DIM // 2
    where = torch.tensor(
        [[p * 100.0 ** (-i / (half - 1)) for i in range(half)] for p in range(3, 8)], dtype=torch.float64
    )
    where = torch.cat([where.sin(), where.cos()], -1).float()
    rate = torch.tensor([100.0 ** (-i / (half - 1)) for i in range(half)])
    angle = STEP[:, None] * rate
    sinusoid_of_step = torch.cat([angle.sin(), angle.cos()], -1)
    depth = sinusoid_of_step if steps is None else DIM**0.5 * module.table.weight[[0, 2]]
    close(module(H, STEP, CTX), H + where + depth[:, None], 1e-6)
    with pytest.raises(ValueError, match="dim=13 must be even"):
        mark.PositionStep().build(13)


def test_inject() -> None:
    assert torch.equal(inject.Nothing().build(DIM)(H, E), H)
    assert torch.equal(inject.Add().build(DIM)(H, E), H + E)
    normed = awake(inject.NormedAdd().build(DIM))
    close(normed(H, E), F.rms_norm(H + E, (DIM,), normed.norm.weight, 1e-6), 1e-6)
    concat = awake(inject.Concat().build(DIM))
    w_h, w_e = concat.mix.weight.chunk(2, dim=1)
    close(concat(H, E), H @ w_h.mT + E @ w_e.mT, 1e-5)


def test_diagonal_injection() -> None:
    module = awake(inject.Diagonal().build(DIM))
    dt, a = torch.log(1 + module.raw_dt.exp()), module.log_a.exp()
    close(module(H, E), torch.exp(-dt * a) * H + dt * (E @ module.b.mT), 1e-5)
    close(inject.Diagonal(decay=0.3).build(DIM).decay(), torch.full((DIM,), 0.3), 1e-6)
    with pytest.raises(ValueError, match="lies between 0 and 1, got 1"):
        inject.Diagonal(decay=1.0).build(DIM)


def test_adapt() -> None:
    assert torch.equal(adapt.Unadapted().build(DIM)(Y, STEP), Y)
    normed = awake(adapt.NormedStep().build(DIM))
    close(normed(Y, STEP), F.rms_norm(Y, (DIM,), normed.norm.weight, 1e-6), 1e-6)


def test_depth_lora_goes_on_with_its_last_scale() -> None:
    module = awake(adapt.DepthLoRA(rank=3, steps=4).build(DIM))
    scale = next(p for p in module.parameters() if p.shape == (4, 3))
    for row, n in enumerate((0, 3)):
        expected = Y[row] + ((Y[row] @ module.down.weight.mT) * scale[n]) @ module.up.weight.mT
        close(module(Y, STEP)[row], expected, 1e-5)
    with pytest.raises(ValueError, match="at least 1, got 0, 4"):
        adapt.DepthLoRA(rank=0, steps=4)


def test_update() -> None:
    assert torch.equal(update.Replace().build(DIM)(H, E, Y), Y)
    lti = awake(update.LTI().build(DIM))
    decay = torch.exp(-torch.exp(lti.log_dt + lti.log_a))
    close(lti.decay(), decay, 1e-6)
    close(lti(H, E, Y), decay * H + lti.b * E + Y, 1e-5)
    close(update.LTI().build(DIM).decay(), torch.full((DIM,), math.exp(-1)), 1e-6)


def test_gate() -> None:
    module = awake(update.Gate().build(DIM))
    w_y, w_h = module.gate.weight.chunk(2, dim=1)
    z = torch.sigmoid(Y @ w_y.mT + H @ w_h.mT + module.gate.bias)
    close(module(H, E, Y), z * Y + (1 - z) * H, 1e-5)
    fresh = update.Gate(bias=-2.0).build(DIM)
    nn.init.zeros_(fresh.gate.weight)
    close(fresh(H, E, Y), H + torch.sigmoid(torch.tensor(-2.0)) * (Y - H), 1e-5)
