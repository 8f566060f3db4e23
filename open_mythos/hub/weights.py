"""The files of a checkpoint: named tensors, read one at a time and written shard by shard.

Read are safetensors, whole or in shards, and PyTorch's own format where that is all there is (tensors only:
a file that holds code is refused). Written are safetensors.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHOLE = ("model.safetensors", "pytorch_model.bin", "model.pt")
SHARD = 5_000_000_000  # bytes
WANTED = "as torch.save(model.state_dict(), path) would write"


class Weights:
    """The tensors of a folder, or of one file, by name.

    Raises `ValueError` if there are none, a shard is missing, or a file holds anything but named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path, alone = path, path.is_file()
        self.folder = path.parent if alone else path
        self._files: dict[str, Any] = {}
        self._home = _where_whole(path.name, self._open) if alone else _where(path, self._open)

    @property
    def names(self) -> list[str]:
        return list(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def read(self, name: str) -> Tensor:
        file = self._open(self._home[name])
        if name not in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            raise ValueError(f"{self.folder / self._home[name]} lacks {name}, which the index says it holds")
        tensor: Tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self._files:
            if not (self.folder / file).is_file():
                raise ValueError(f"{self.folder} lacks {file}, which its index names")
            self._files[file] = _open(self.folder / file)
        return self._files[file]


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD) -> None:
    """Write safetensors into `folder`, in one file or in shards of at most `limit` bytes and an index."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            shards.append(_save(folder, held, len(shards)))
            held, size = {}, 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    shards.append(_save(folder, held, len(shards)))
    _finish(folder, shards, total)


def _save(folder: Path, tensors: dict[str, Tensor], number: int) -> list[str]:
    from safetensors.torch import save_file

    part = _part(folder, number)
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(folder.stat().st_mode & 0o666)  # the library lets nobody else read it
    return list(tensors)


def _finish(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the parts the names by which others look for them."""
    if len(shards) == 1:
        _part(folder, 0).replace(folder / WHOLE[0])
        (folder / f"{WHOLE[0]}.index.json").unlink(missing_ok=True)
        return
    home: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _part(folder, number).replace(folder / file)
        home |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / f"{WHOLE[0]}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / WHOLE[0]).unlink(missing_ok=True)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.safetensors.new"


def _where(folder: Path, open_: Any) -> dict[str, str]:
    """Which file each tensor is in."""
    for whole in WHOLE:
        if (folder / whole).is_file():
            return _where_whole(whole, open_)
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return _indexed(index)
    raise ValueError(f"{folder} holds no weights: none of {', '.join(WHOLE)}, nor an index of shards")


def _where_whole(file: str, open_: Any) -> dict[str, str]:
    return dict.fromkeys(open_(file).keys(), file)


def _indexed(index: Path) -> dict[str, str]:
    """What an index says. Raises `ValueError` where it is none, or leads out of its folder."""
    try:
        home: dict[str, str] = json.loads(index.read_text())["weight_map"]
        outside = next((file for file in home.values() if Path(file).name != file), None)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards: it needs a weight_map ({error!r})") from error
    if outside is not None:
        raise ValueError(f"{index} names {outside!r}, which is not a file beside it")
    return home


def _open(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken or hostile pickle brings up
        raise ValueError(f"{path} cannot be read as plain tensors, {WANTED}: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, not named tensors, {WANTED}")
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{path} holds more than named tensors, {WANTED}: {name!r} is a {kind}")
    return held
