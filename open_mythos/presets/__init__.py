"""Every published family by name: one page per paper.

A page states its citation, what it is exact about and a table of sizes, offers one function that gives a
`Model`, and lists its named models in `MODELS`. Importing this package imports no page.
"""

import difflib
from functools import cache

from open_mythos.model import Model


def preset(name: str) -> Model:
    """The config of a published model, as in `preset("ouro-1.4b").build()`.

    Raises `ValueError` for a name that is not among `names()`.
    """
    known = _models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)[:5]
        raise ValueError(f"there is no preset {name!r}; close to it are {', '.join(close)} (see `names()`)")
    return known[name]


def names() -> tuple[str, ...]:
    """The names that `preset` knows, family by family."""
    return tuple(_models())


@cache
def _models() -> dict[str, Model]:
    from open_mythos.presets import (
        baseline,
        chen,
        dreamer,
        huginn,
        kohli,
        olmo,
        ouro,
        parcae,
        recursions,
        relaxed,
        retrofit,
        saunshi,
        universal,
    )
    from open_mythos.variants import VARIANTS

    models = {f"mythos_{size}": make().model() for size, make in VARIANTS.items()}
    models |= {f"parcae-{size}": parcae.parcae(size) for size in parcae.SIZES}
    models |= {f"parcae-gpt-{size}": parcae.parcae_gpt(size) for size in parcae.SIZES}
    models |= {f"huginn-{size}": huginn.huginn(size) for size in huginn.SIZES}
    looped = ouro, universal, chen, kohli, saunshi, dreamer, recursions, relaxed, retrofit
    for page in (*looped, baseline, olmo):
        models |= page.MODELS
    return models
