"""A checkpoint: a folder of safetensors and JSON that is either whole or not there.

    step-00001000/
      model.safetensors      tensors named "model/..." (plain names inside: any tool can read it)
      optimizer.safetensors  tensors named "optimizer/...", and so on
      tensors.safetensors    tensors whose name has no slash
      shards/                what was spread over ranks, a file for each of them (pieces.py)
      meta.json              everything that is not a tensor
      manifest.json          size and SHA-256 of each file, and which names share one tensor

It is written under a temporary name, every file and folder synced to disk, and renamed. A crash at
any moment leaves the old state or the new one. Nothing in it is code: no pickle, ever.
"""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.train import pieces
from open_mythos.whole import writing

FORMAT = "open_mythos checkpoint 1"
MANIFEST, META, LOOSE = "manifest.json", "meta.json", "tensors"
Beside = Callable[[Path], dict[str, dict[str, Any]]]
Tell = Callable[[str], None]
STEP = re.compile(r"step-(\d+)")


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    score: float | None = None,
    beside: Beside = lambda draft: {},
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint to `folder`, replacing one that is there.

    Tensors that are one and the same are stored once. `score` goes into the manifest. Raises `OSError`
    if it cannot be written, e.g. for a full disk, and `ValueError` for a part name that is no file
    name or meta that is no JSON; then nothing is left behind and what was there before still is.

    `beside` writes more files into the draft and returns their fingerprints; `aliases` are of what they hold.
    """
    kept, repeated = without_repeats(tensors)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in kept.items():
        part, inner = _split(name)
        parts[part][inner] = tensor.detach().cpu().contiguous()
    with _replacing(folder) as draft:
        files = beside(draft)
        for part, content in parts.items():
            _write_tensors(draft / f"{part}.safetensors", content)
        _write_json(draft / META, meta)
        files |= {path.name: fingerprint(path) for path in sorted(draft.iterdir()) if path.is_file()}
        names = repeated | dict(aliases or {})
        _write_json(draft / MANIFEST, {"format": FORMAT, "score": score, "aliases": names, "files": files})


def load(
    folder: Path,
    *,
    only: str | None = None,
    verify: bool = True,
    empty: pieces.Empty | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of a checkpoint; `only="model"` reads that part alone.

    Names that shared a tensor share it again. Raises `ValueError` saying what is wrong with a folder
    that is not a checkpoint, or is incomplete, cut short or altered. `verify=False` skips the hashes,
    not the sizes; `share=(rank, ranks)` leaves the other ranks' share of them to those. What was saved in
    shards is put together, or read into what `empty` makes.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    sharded = [name for name in files if name.startswith(pieces.FOLDER)]
    wanted = [name for name in files if only is None or name in (META, f"{only}.safetensors", *sharded)]
    rank, ranks = share
    for number, name in enumerate(wanted):
        _check(folder / name, files[name], verify and number % ranks == rank)
    tensors = pieces.read(folder, only, empty) if sharded else {}
    for name in wanted:
        if name != META and name not in sharded:
            part = name.removesuffix(".safetensors")
            tensors |= {_join(part, inner): tensor for inner, tensor in _read_tensors(folder / name).items()}
    if only is not None and not tensors:
        raise ValueError(f"{folder} has no part {only!r}; it has {', '.join(files)}")
    shared = {alias: tensors[name] for alias, name in manifest["aliases"].items() if name in tensors}
    return tensors | shared, _read_json(folder / META)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone. Raises `ValueError` if `folder` is not a checkpoint of ours."""
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder {folder}")
    if not (folder / MANIFEST).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(f"{folder} is not a checkpoint: it has no {MANIFEST} (it holds {found})")
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} has the format {manifest.get('format')!r}; this version reads {FORMAT!r}")
    files, aliases = manifest.get("files"), manifest.get("aliases")
    described = isinstance(files, dict) and all(map(_describes, files.values()))
    if not (described and isinstance(aliases, dict)):
        raise ValueError(f"{folder / MANIFEST} does not list the files of the checkpoint")
    return manifest


def _describes(file: Any) -> bool:
    return isinstance(file, dict) and {"bytes", "sha256"} <= file.keys()


def require_same(saved: Any, current: Any, name: str = "config") -> None:
    """Raise `ValueError` naming what differs, if two configs in plain form are not equal."""
    if differences := list(_differences(saved, current, name)):
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(f"the checkpoint is from another {name}: {'; '.join(differences[:4])}{more}")


def steps_in(run: Path) -> dict[int, Path]:
    """Checkpoints of a run that look whole (manifest readable, sizes right), by step, oldest first."""
    return {step: folder for step, folder in _folders(run).items() if trouble(folder) is None}


def damage(run: Path) -> str:
    """What is wrong with the newest checkpoint of a run that has none that looks whole, to end a sentence."""
    folders = _folders(run)
    return f": {trouble(folders[max(folders)])}" if folders else ""


def broken_in(run: Path) -> dict[Path, str]:
    """Checkpoints of a run that do not look whole, and why."""
    troubles = {folder: trouble(folder) for folder in _folders(run).values()}
    return {folder: why for folder, why in troubles.items() if why is not None}


def passed_over(damaged: Mapping[Path, str], taken: Path) -> str | None:
    """What to tell of damaged checkpoints that are newer than the one taken, if there are any."""
    newer = {folder: why for folder, why in damaged.items() if folder.name > taken.name}
    return f"passed over a damaged checkpoint, took {taken}: {newer[max(newer)]}" if newer else None


def _folders(run: Path) -> dict[int, Path]:
    found = [(STEP.fullmatch(path.name), path) for path in run.iterdir()] if run.is_dir() else []
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def latest(run: Path) -> Path | None:
    """The newest checkpoint in `run` that looks whole, if there is one."""
    return next(reversed(steps_in(run).values()), None)


def step_folder(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}"


def trouble(folder: Path) -> str | None:
    """Why a checkpoint is not whole, if its manifest or the sizes of its files show it."""
    try:
        for name, file in read_manifest(folder)["files"].items():
            _check(folder / name, file, verify=False)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def draft_of(folder: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `folder`."""
    return _beside(folder, "draft")


def fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remove(folder: Path) -> None:
    """Delete a checkpoint such that no half of it is ever seen."""
    draft = _beside(folder, "draft")
    shutil.rmtree(draft, ignore_errors=True)
    folder.rename(draft)
    shutil.rmtree(draft)


def recover(run: Path) -> None:
    """Clear up after a process that was killed: drop drafts, put back what was about to be replaced."""
    for path in list(run.glob(".*.draft")):
        shutil.rmtree(path)
    for path in list(run.glob(".*.replaced")):
        target = run / path.name.removeprefix(".").removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)


def without_repeats(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once; the other names of the same memory, as aliases. Overlapping views are copied."""
    first: dict[Any, str] = {}
    owners: set[int] = set()
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        key = (tensor.device, memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first.setdefault(key, name)
        kept[name] = tensor.clone() if memory in owners else tensor
        owners.add(memory)
    return kept, aliases


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A draft folder that becomes `folder` at the end, or disappears with the error that stopped it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, replaced = draft_of(folder), _beside(folder, "replaced")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(exist_ok=True)
        yield draft
        _sync(draft)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        draft.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with writing(path):
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # who may read the folder may read it, as all else there
    _sync(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be written as JSON: {error}") from error
    with writing(path):
        path.write_text(text + "\n")
    _sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


def _check(path: Path, expected: Mapping[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise ValueError(f"the checkpoint {path.parent} lacks its file {path.name}")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise ValueError(
            f"{path} has {size} bytes, it was written with {expected['bytes']}: it is cut short or altered"
        )
    if verify and fingerprint(path)["sha256"] != expected["sha256"]:
        raise ValueError(
            f"{path} does not match its SHA-256 in {MANIFEST}: it was altered or the disk is failing"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with writing(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def _split(name: str) -> tuple[str, str]:
    part, slash, inner = name.partition("/")
    part, inner = (part, inner) if slash and inner else (LOOSE, name)
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", part):
        raise ValueError(f"tensor {name!r}: its part {part!r} should be made of letters, digits, - and _")
    return part, inner


def _join(part: str, inner: str) -> str:
    return inner if part == LOOSE else f"{part}/{inner}"


def _differences(saved: Any, current: Any, path: str) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in [*saved, *(key for key in current if key not in saved)]:
            if key not in saved or key not in current:
                yield f"{path}.{key} is only in the {'checkpoint' if key in saved else 'one at hand'}"
            else:
                yield from _differences(saved[key], current[key], f"{path}.{key}")
    elif saved != current:
        yield f"{path} was {saved!r} and is {current!r}"
