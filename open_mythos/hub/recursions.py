"""Checkpoints of mixture-of-recursions, Bae et al. 2025 (arXiv 2507.10524), as its training code saves them
(github.com/raymin0223/mixture_of_recursions): expert choice, token choice, and the plain recursive models.

They are Llamas whose first and last layer are their own and whose others recur (`middle_cycle`). Shared
weights lie in the file once for every step, and must be the same there:

    expert choice   model.layers.{1 + step}.block.{i}.           and  model.layers.{1 + step}.mor_router.
    token choice    model.layers.1.block_list.{step}.{i}.        and  model.layers.1.mor_router.
    recursive       model.layers.{1 + step * block + i}.

How a model recurs is not in its config.json but in the YAML of its run, conf/pretrain/RUN.yaml of their
repository. Copy what is enabled there into config.json before loading (`import yaml` is PyYAML):

    run, path = yaml.safe_load(open("RUN.yaml")), Path("FOLDER/config.json")
    parts = {part: run[part] for part in ("recursive", "mor", "kv_sharing") if run[part]["enable"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))

Their vanilla models need none of it: they are Llamas (llama.py). The recursive ones have a head of their own
whatever config.json says of it, for their code never ties it.

Expert choice ranks a sequence in their evaluation as in training, and so do models that are loaded, which
therefore look ahead. To generate, where nothing is ahead yet, let tokens above the threshold be taken instead
(loop/route.py), which says the same wherever the router has learned who is among the best:

    lm.loop.route.config = lm.loop.route.config.replace(causal=True)

Runs of expert choice by their code of July 2025 to September 2026 do not share the attention (issue 17 of
their repository; the published ones do); they are refused, for their copies differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from open_mythos.hub.family import Settings, fail_unless_same, need
from open_mythos.hub.links import Link, link, nest
from open_mythos.hub.llama import check_settings, layer_links, shape_of, shape_settings, spare_head
from open_mythos.loop.core import Loop
from open_mythos.loop.keys import FirstStep
from open_mythos.loop.route import Everyone, ExpertChoice, Routing, TokenChoice
from open_mythos.model import Model
from open_mythos.nn.attention import GQA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.presets.recursions import Size, recursions

NAME = "recursions"
ROUTED = "MoRLlamaForCausalLM"
PARTS = "recursive", "mor", "kv_sharing"  # of a run's YAML
NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}
SHARING = {"enable": True, "sharing": "middle_cycle", "ln_share": True}
ROUTER = {"rand_router": False, "router_type": "linear", "temp": 1.0}
EXPERT = {"router_func": "sigmoid", "sampling": "aux_loss", "gating": "weighted"}
TOKEN = {"router_func": "softmax", "balancing": "loss", "gating": "weighted"}


def recognise(config: Settings) -> bool:
    told = any((config.get(part) or {}).get("enable") for part in PARTS)
    return config.get("model_type") == "llama" and (told or _routed(config))


def to_model(config: Settings) -> Model:
    check_settings(config, NAME)
    told = _told(config)
    _check(told, "recursive", SHARING)
    need(told, "kv_sharing.update_cache", False, None, family=NAME)
    shape, routed = shape_of(config, eps=1e-6), bool(told.get("mor.enable"))
    size = Size(
        shape=shape.replace(tied=shape.tied and routed),
        steps=told["recursive.num_recursion"],
        tokens_choose=routed and told["mor.type"] == "token",
        share_keys=bool(told.get("kv_sharing.enable")),
    )
    model = recursions(size)
    assert model.loop is not None
    return model.replace(loop=model.loop.replace(route=_route(told, model.loop.route)))


def to_config(model: Model) -> dict[str, Any]:
    loop = model.loop
    block = loop.layers[0] if loop is not None else None
    if loop is None or not isinstance(block, PreNorm) or not isinstance(block.mixer, GQA):
        raise ValueError("MoR's code loops pre-norm blocks with grouped attention; this model has others")
    if not isinstance(block.ffn, SwiGLU):
        raise ValueError("MoR's code runs SwiGLU feed-forwards; this model has others")
    if isinstance(loop.route, ExpertChoice):  # their runs count the warm-up in steps, and rank always
        loop = loop.replace(route=loop.route.replace(warmup=0.0, causal=False))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM" if isinstance(loop.route, Everyone) else ROUTED],
        "num_hidden_layers": 2 + loop.schedule.mean_steps * len(loop.layers),
        "attention_bias": block.mixer.out_bias,
        "rms_norm_eps": getattr(model.norm, "eps", None),
        **shape_settings(model, block.mixer, block.ffn),
        **_parts(loop),
    }
    fail_unless_same(model.replace(loop=loop), to_model(config), "MoR")
    return config


def links(model: Model) -> Sequence[Link]:
    assert model.loop is not None
    mixer = model.loop.layers[0].mixer
    assert isinstance(mixer, GQA)
    layer, (routers, places, last) = layer_links(mixer, NORMS), _places(model.loop)
    found = [link("model.embed_tokens.weight", "embed.weight"), link("model.norm.weight", "norm.weight")]
    if not model.tied:
        found.append(link("lm_head.weight", "head.weight"))
    if routers:
        found.append(link(routers, "loop.route.score.weight"))
    for i, (first, *others) in enumerate(places):
        found += nest(layer, first, f"loop.layers.{i}.", others)
    return [*found, *nest(layer, "model.layers.0.", "prelude.0."), *nest(layer, last, "coda.0.")]


def spare(config: Settings) -> dict[str, tuple[int, ...]]:
    return spare_head(config)


def constants(model: Model) -> dict[str, Tensor]:
    return {}


def _routed(config: Settings) -> bool:
    return ROUTED in (config.get("architectures") or ())


def _told(config: Settings) -> dict[str, Any]:
    """The parts of the YAML, flat: `mor.expert.alpha`. Raises `ValueError` if one is not there."""
    lacking = [part for part in (PARTS[:2] if _routed(config) else PARTS[:1]) if not config.get(part)]
    if lacking:
        raise ValueError(
            f"config.json lacks {' and '.join(lacking)}, so it does not say how the model recurs; copy "
            f"{', '.join(PARTS)}, those that are enabled, into it from the YAML of the run "
            "(conf/pretrain/RUN.yaml of github.com/raymin0223/mixture_of_recursions)"
        )
    return dict(_flat({part: config.get(part) for part in PARTS}))


def _flat(settings: Settings, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _check(told: Settings, part: str, wanted: Settings) -> None:
    for name, value in wanted.items():
        need(told, f"{part}.{name}", value, family=NAME)


def _route(told: Settings, route: Routing) -> Routing:
    """`route`, which has the capacities and depths that follow from the sizes, with what the YAML says."""
    if not told.get("mor.enable"):
        return Everyone()
    _check(told, "mor", ROUTER)
    kind = need({"mor.type": told["mor.type"]}, "mor.type", "expert", "token", family=NAME)
    _check(told, f"mor.{kind}", TOKEN if kind == "token" else EXPERT)
    route = route.replace(
        alpha=float(told[f"mor.{kind}.alpha"]),
        balance=float(told[f"mor.{kind}.coeff"]),
        z_loss=float(told["mor.z_coeff"]) if told.get("mor.z_loss") else 0.0,
    )
    if isinstance(route, ExpertChoice):
        route = route.replace(causal=False)
    if isinstance(route, ExpertChoice) and told.get("mor.capacity") is not None:
        shares = tuple(float(share) for share in str(told["mor.capacity"]).split(","))
        if len(shares) != len(route.capacity):
            raise ValueError(f"mor.capacity has {len(shares)} shares, for {len(route.capacity)} recursions")
        route = route.replace(capacity=shares)
    return route


def _parts(loop: Loop) -> dict[str, Any]:
    """What a run's YAML would say; `kv_sharing` only where there is some, for their code asks for no more."""
    steps, route = loop.schedule.mean_steps, loop.route
    parts: dict[str, Any] = {"recursive": SHARING | {"num_recursion": steps}}
    if isinstance(loop.keys, FirstStep):
        shared = {"enable": True, "base_depth": len(loop.layers), "num_recursion": steps}
        parts["kv_sharing"] = shared | {"sharing": SHARING["sharing"], "update_cache": False}
    if isinstance(route, Everyone):
        return parts
    weights = {"alpha": route.alpha, "coeff": route.balance}
    mor = ROUTER | {"enable": True, "capacity": None, "z_loss": route.z_loss > 0, "z_coeff": route.z_loss}
    if isinstance(route, TokenChoice):
        return parts | {"mor": mor | {"type": "token", "token": TOKEN | weights}}
    mor |= {"type": "expert", "capacity": ",".join(map(str, route.capacity))}
    return parts | {"mor": mor | {"expert": EXPERT | weights}}


def _places(loop: Loop) -> tuple[list[str], list[list[str]], str]:
    """Names of the routers; where each shared layer lies, step by step; and where the last layer does."""
    steps, block = range(loop.schedule.mean_steps), range(len(loop.layers))
    if isinstance(loop.route, ExpertChoice):
        routers = [f"model.layers.{1 + n}.mor_router.router.weight" for n in steps]
        places = [[f"model.layers.{1 + n}.block.{i}." for n in steps] for i in block]
        return routers, places, f"model.layers.{1 + len(steps)}."
    if isinstance(loop.route, TokenChoice):
        places = [[f"model.layers.1.block_list.{n}.{i}." for n in steps] for i in block]
        return ["model.layers.1.mor_router.router.weight"], places, "model.layers.2."
    places = [[f"model.layers.{1 + n * len(block) + i}." for n in steps] for i in block]
    return [], places, f"model.layers.{1 + len(steps) * len(block)}."
