import copy
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.testing import assert_close

from open_mythos.train.muon import Muon, PolarExpress, Quintic, orthogonalise_, polar_factor


def polar(x: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def train(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (8, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_each_matrix_moves_as_torch_moves_it(shape: tuple[int, int], nesterov: bool) -> None:
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    config = Muon(lr=0.1, weight_decay=0.3, nesterov=nesterov, precision="bfloat16")
    oracle = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn="original")
    assert_close(
        train(ours, config.build([(ours, 1)]), gradients), train(theirs, oracle, gradients), atol=1e-2, rtol=0
    )


def test_rms_scale_is_torchs() -> None:
    start, gradients = torch.randn(6, 16), [torch.randn(6, 16)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    oracle = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon(lr=0.1, scale="rms", precision="bfloat16").build([(ours, 1)])
    assert_close(train(ours, optimizer, gradients), train(theirs, oracle, gradients), atol=1e-2, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stacks_and_blocks_move_as_their_matrices_alone(precision: str) -> None:
    """Experts (E, 2F, D) are 2E matrices, a fused pair is two, uneven blocks are what they are."""
    config = Muon(lr=0.1, precision=precision)  # type: ignore[arg-type]
    stack, fused, uneven = torch.randn(3, 8, 6), torch.randn(8, 6), torch.randn(7, 6)
    whole = [stack.clone(), fused.clone(), uneven.clone()]
    orthogonalise_(zip(whole, (2, 2, (4, 3)), strict=True), config)
    alone = [
        *stack.reshape(6, 4, 6).clone(),
        *fused.reshape(2, 4, 6).clone(),
        uneven[:4].clone(),
        uneven[4:].clone(),
    ]
    for matrix in alone:
        orthogonalise_([(matrix, 1)], config)
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert_close(torch.cat([w.reshape(-1, 6) for w in whole]), torch.cat(alone), atol=tolerance, rtol=0)


def test_fused_maps_are_not_orthogonalised_as_one() -> None:
    fused = torch.randn(8, 6)
    together, apart = fused.clone(), fused.clone()
    orthogonalise_([(together, 1)], Muon(precision="float32"))
    orthogonalise_([(apart, 2)], Muon(precision="float32"))
    assert (together - apart).abs().max() > 0.1


def test_pieces_of_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(5, 4, 6)
    once, pieces = stack.clone(), stack.clone()
    orthogonalise_([(once, 1)], Muon(precision="float32"))
    monkeypatch.setattr("open_mythos.train.muon.CACHED_BYTES", 2 * 4 * 6 * 4)
    orthogonalise_([(pieces, 1)], Muon(precision="float32"))
    assert_close(once, pieces, atol=1e-6, rtol=0)


def test_polar_express_is_closer_to_the_polar_factor() -> None:
    x = torch.randn(4, 12, 40)
    errors = {p: float((polar_factor(x, p) - polar(x)).norm()) for p in (Quintic(), PolarExpress())}
    assert errors[PolarExpress()] < 0.75 * errors[Quintic()]
    singular = torch.linalg.svdvals(polar_factor(x, PolarExpress()))
    assert singular.sub(1).abs().max() < 0.2


def test_an_idle_expert_stays_and_a_missing_gradient_skips() -> None:
    used, unused = nn.Parameter(torch.randn(2, 4, 6)), nn.Parameter(torch.randn(4, 6))
    before = copy.deepcopy([used.data, unused.data])
    used.grad = torch.cat([torch.randn(1, 4, 6), torch.zeros(1, 4, 6)])
    Muon().build([(used, 1), (unused, 1)]).step()
    assert not torch.equal(used[0], before[0][0])
    assert torch.equal(used[1], before[0][1])
    assert torch.equal(unused, before[1])


def test_cautious_decay_never_pulls_against_the_step() -> None:
    start, gradient = torch.randn(6, 8), torch.randn(6, 8)
    moved = {}
    for name, config in {
        "none": Muon(lr=0.1),
        "cautious": Muon(lr=0.1, weight_decay=0.5, cautious=True),
        "plain": Muon(lr=0.1, weight_decay=0.5),
    }.items():
        p = nn.Parameter(start.clone())
        moved[name] = train(p, config.build([(p, 1)]), [gradient])
    shrink = moved["none"] - moved["cautious"]
    agrees = (start - moved["none"]) * start >= 0
    assert_close(shrink, (0.05 * start).where(agrees, 0.0), atol=1e-5, rtol=0)
    assert_close(moved["plain"], moved["none"] - 0.05 * start, atol=1e-5, rtol=0)


def test_momentum_warms_up() -> None:
    config = Muon(momentum_start=0.5, momentum=0.9, warmup=4)
    assert [round(config.momentum_at(step), 3) for step in range(6)] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    assert Muon().momentum_at(0) == 0.95


def _sharded(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from open_mythos.train.optim import MuonAdamW
    from tests.unit.train.test_roles import Model

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = _filled(Model(tied=True))
    fully_shard(model)
    optimizer = MuonAdamW(muon=Muon(precision="float32", weight_decay=0.1)).build(model)
    for step in range(3):
        if step == 2:  # through a state of whole tensors into a fresh optimizer, as a resumed run would
            full = {
                n: {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in s.items()}
                for n, s in optimizer.state_dict()["state"].items()
            }
            optimizer = MuonAdamW(muon=Muon(precision="float32", weight_decay=0.1)).build(model)
            optimizer.load_state_dict({"steps": 2, "state": full})
        for i, parameter in enumerate(model.parameters()):
            from torch.distributed.tensor import distribute_tensor

            whole = _gradient(i, step, parameter)
            parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        optimizer.step()
    torch.save({n: p.full_tensor() for n, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    _stacks_cut_both_ways()
    dist.destroy_process_group()


def _stacks_cut_both_ways() -> None:
    """Experts shared out along one axis of a mesh, and their rows sharded along the other."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole, gradient = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    expected = nn.Parameter(whole.clone())
    expected.grad = gradient
    Muon(precision="float32").build([(expected, 2)]).step()
    for shape in ((2, 1), (1, 2)):
        mesh = DeviceMesh("cpu", torch.arange(2).view(shape), mesh_dim_names=("expert", "data"))
        stack, grad = (distribute_tensor(each, mesh, (Shard(0), Shard(1))) for each in (whole, gradient))
        parameter = nn.Parameter(stack)
        parameter.grad = grad
        Muon(precision="float32").build([(parameter, 2)]).step()
        assert parameter.placements == (Shard(0), Shard(1))
        assert_close(parameter.full_tensor(), expected.detach(), atol=1e-5, rtol=0)


def _filled(model: nn.Module) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=rng)
    return model


def _gradient(i: int, step: int, parameter: Tensor) -> Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + i))


def test_sharded_over_two_processes_equals_one(tmp_path: Path) -> None:
    """FSDP2: experts (3 over 2 ranks, unevenly), fused pairs, tables and vectors, with a resume; then stacks
    that are cut along two axes."""
    from open_mythos.train.optim import MuonAdamW
    from tests.unit.train.test_roles import Model

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A forked process ends without shutting its interpreter down, which gloo's threads may not outlive.
    start_processes(_sharded, args=(port, str(tmp_path)), nprocs=2, start_method="forkserver")
    model = _filled(Model(tied=True))
    optimizer = MuonAdamW(muon=Muon(precision="float32", weight_decay=0.1)).build(model)
    for step in range(3):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = _gradient(i, step, parameter)
        optimizer.step()
    for rank in range(2):
        sharded = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in model.named_parameters():
            assert_close(sharded[name], parameter.detach(), atol=1e-5, rtol=0, msg=name)
