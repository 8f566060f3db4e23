"""Choices, written down.

A `Config` is frozen, keyword-only, comparable, and survives a trip through JSON. It records what
was chosen and nothing that follows from the choice: widths flow down through `build(dim)`, so no
number is written twice. Where several variants fit one place, the field is a union, and the union
is the registry:

    inject: Add | Concat | Diagonal

In JSON a variant says which it `is`: {"is": "Diagonal"}. Bad input gets a `ValueError` that names
what was given and what would have worked. Law: tests/laws/test_config.py.
"""

import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, Union, dataclass_transform, get_args, get_origin, get_type_hints

from open_mythos.whole import write_whole


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Config:
    """Base of every choice. Subclasses become frozen, keyword-only dataclasses by themselves."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives back an equal config."""
        return {"is": type(self).__name__} | {name: _plain(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild from plain data. Raises `ValueError` for unknown or missing fields and wrong types."""
        hints = get_type_hints(cls)
        given = {name: value for name, value in data.items() if name != "is"}
        for name in given:
            if name not in hints:
                raise ValueError(f"{cls.__name__} has no field {name!r}{_did_you_mean(name, hints)}")
        needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}  # type: ignore[arg-type]
        if missing := sorted(needed - given.keys()):
            raise ValueError(f"{cls.__name__} needs {', '.join(missing)}")
        owner = cls.__name__
        return cls(**{name: _typed(hints[name], value, f"{owner}.{name}") for name, value in given.items()})

    def override(self, *assignments: str) -> Self:
        """A copy with dotted assignments applied, as in `loop.halt.threshold=0.9`.

        Values are JSON (`loop.inject={"is": "Concat"}`), or bare text; a variant as it is by default needs
        only its name (`loop.inject=Concat`). A number in the path picks an item of a tuple
        (`prelude.0.ffn.width=64`), `*` all of them.
        """
        data = self.to_dict()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise ValueError(f"override {assignment!r} should look like path.to.field=value")
            _assign(data, path.split("."), parsed(text), path)
        return self.from_dict(data)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[type-var]

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all. Raises `OSError` that names the file and the remedy."""
        write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read a {cls.__name__} from {path}: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} should hold a JSON object describing a {cls.__name__}")
        return cls.from_dict(data)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any, name: str) -> Any:
    """Turn parsed JSON back into the type the field asks for."""
    variants = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, dict):
        return _variant(variants, value, name)
    if isinstance(value, (list, tuple)):
        tuples = [get_args(variant) for variant in variants if get_origin(variant) is tuple]
        if not tuples:
            raise ValueError(f"{name} should be {_spell(hint)}, got the list {value!r}")
        return tuple(_typed(tuples[0][0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if value == "none" and type(None) in variants and str not in variants:
        return None
    if float in variants and type(value) is int:
        return float(value)
    if value in (named := _named(variants)) and str not in variants:
        return named[value].from_dict({})
    if any(_fits(variant, value) for variant in variants):
        return value
    raise ValueError(f"{name} should be {_spell(hint)}, got {value!r}")


def _variant(variants: Iterable[Any], value: Mapping[str, Any], name: str) -> Any:
    named = _named(variants)
    kind = value.get("is", next(iter(named)) if len(named) == 1 else None)
    if kind not in named:
        raise ValueError(f"{name} cannot be {kind!r}; it can be {', '.join(named) or 'no nested config'}")
    return named[kind].from_dict(value)


def _named(variants: Iterable[Any]) -> dict[Any, type[Config]]:
    return {v.__name__: v for v in variants if isinstance(v, type) and issubclass(v, Config)}


def _fits(hint: Any, value: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if not isinstance(hint, type):
        return False
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _spell(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spell(variant) for variant in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_spell(get_args(hint)[0])}"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = [k for k in known if k != "is"]
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"


def _assign(node: Any, path: list[str], value: Any, whole: str) -> None:
    head, *rest = path
    if isinstance(node, list):
        if head != "*" and not (head.isdigit() and int(head) < len(node)):
            raise ValueError(f"{whole}: {head!r} should be * or an item number below {len(node)}")
        for i in range(len(node)) if head == "*" else [int(head)]:
            if rest:
                _assign(node[i], rest, value, whole)
            else:
                node[i] = value
    elif not isinstance(node, dict) or (head not in node):
        known = [k for k in node if k != "is"] if isinstance(node, dict) else []
        raise ValueError(f"{whole}: there is no {head!r}{_did_you_mean(head, known) if known else ''}")
    elif rest:
        _assign(node[head], rest, value, whole)
    else:
        node[head] = value


def parsed(text: str) -> Any:
    """The value that a user wrote: JSON, or else the text. Raises `ValueError` for NaN and infinities."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError:
        return text
    except RecursionError as error:
        raise ValueError(f"a value is nested too deeply: {text[:20]} ...") from error


def _finite(number: str) -> float:
    if math.isinf(float(number)):
        _refuse(number)
    return float(number)


def _refuse(number: str) -> None:
    raise ValueError(f"a value should be a finite number, got {number}")
