"""The package open-mythos 0.5.0 as a rival: its architecture at the size of one of ours, and its training.

    settings_like(model)   its settings, as large as `model` is: the same width, layers, heads and experts,
                           the experts as wide as it takes to have as many parameters
    recipe_like(recipe)    the same text in the same batches, learned as its script learns it: AdamW with
                           decay on everything, a linear warmup over 2,000 of 57,220 updates, a cosine down
                           to a tenth, float32 where there is no GPU, all loops with gradient, an untouched
                           router bias, the answer averaged by ACT

Its users' attempt to let go of the trained depth, a number of loops drawn for every batch, is `random=True`.
"""

from open_mythos.analysis.compute import parameters
from open_mythos.classic.config import MythosConfig
from open_mythos.loop.schedule import Uniform
from open_mythos.model import Model
from open_mythos.nn.attention import MLA
from open_mythos.nn.moe import MoE
from open_mythos.train.lr import WarmupCosine
from open_mythos.train.objective import Objective
from open_mythos.train.optim import AdamW
from open_mythos.train.recipe import Recipe

LR = 3e-4
WARMUP = 2000 / 57_220  # the share of its run: 30e9 tokens in batches of 524,288
TOLERANCE = 0.02


def settings_like(model: Model, context: int) -> MythosConfig:
    """Raises `ValueError` unless `model` loops over MLA and MoE, and for one too small to be equalled."""
    layer = model.loop.layers[0] if model.loop is not None else None
    if layer is None or not isinstance(layer.mixer, MLA) or not isinstance(layer.ffn, MoE):
        raise ValueError("the original is compared with a model that loops over MLA and a mixture of experts")
    wanted = parameters(model).total
    thin, wide = (parameters(_settings(model, context, width).model()).total for width in (8, 16))
    width = 4 * round((8 + 8 * (wanted - thin) / (wide - thin)) / 4)
    if width < 4:
        raise ValueError(f"no original of dim {model.dim} is as small as {wanted:,} parameters")
    found = _settings(model, context, width)
    counted = parameters(found.model()).total
    if abs(counted / wanted - 1) > TOLERANCE:
        raise ValueError(f"the nearest original has {counted:,} parameters instead of {wanted:,}")
    return found


def recipe_like(recipe: Recipe, *, random: bool = False, lr: float = LR) -> Recipe:
    """Raises `ValueError` as `settings_like` does, and for a recipe whose end is not given in steps."""
    if recipe.steps is None:
        raise ValueError("the original warms up over a share of its steps: give the recipe a number")
    model = settings_like(recipe.model, recipe.length).model().override("loop.layers.0.ffn.speed=0.0")
    return recipe.replace(
        model=_drawn(model) if random else model,
        objective=Objective(),
        optimiser=AdamW(lr=lr, beta1=0.9, beta2=0.95, weight_decay=0.1, decay_all=True),
        lr=WarmupCosine(warmup=round(WARMUP * recipe.steps), floor=0.1),
        clip=1.0,
        precision="float32",
    )


def _drawn(model: Model) -> Model:
    """One to twice the mean (less one) loops, drawn once per batch; the adapter has a row for each."""
    assert model.loop is not None
    most = 2 * model.loop.schedule.mean_steps - 1
    model = model.override(f"loop.adapt.steps={most}")
    assert model.loop is not None
    return model.replace(loop=model.loop.replace(schedule=Uniform(low=1, high=most, per="batch")))


def _settings(model: Model, context: int, width: int) -> MythosConfig:
    assert model.loop is not None
    mixer, experts = model.loop.layers[0].mixer, model.loop.layers[0].ffn
    assert isinstance(mixer, MLA)
    assert isinstance(experts, MoE)
    return MythosConfig(
        vocab_size=model.vocab,
        dim=model.dim,
        n_heads=mixer.heads,
        n_kv_heads=mixer.heads,
        max_seq_len=context,
        max_loop_iters=model.loop.schedule.mean_steps,
        prelude_layers=len(model.prelude),
        coda_layers=len(model.coda),
        kv_lora_rank=mixer.kv_rank,
        q_lora_rank=mixer.q_rank,
        qk_rope_head_dim=mixer.rope_dim,
        qk_nope_head_dim=mixer.nope_dim,
        v_head_dim=mixer.value_dim,
        n_experts=experts.experts,
        n_shared_experts=experts.shared,
        n_experts_per_tok=experts.chosen,
        expert_dim=width,
        released=True,
    )
