"""The sharded tensors of a checkpoint: every rank writes its own pieces, and reads those it is to hold.

    step-00001000/shards/shard-00001-model-00001-of-00001.safetensors     the pieces of the first rank, ...

`torch.distributed.checkpoint` says who writes what, and finds what a rank needs in whoever's file, so a run
may go on with another number of ranks and no machine ever holds the whole. It is used with its safetensors
storage: where a piece lies in its tensor stands in the file's header, and there is no pickle, as there would
be in the default storage's `.metadata`.

What ranks say to each other here goes through a group of its own, since it happens beside training.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as read_planned
from torch.distributed.checkpoint.state_dict_saver import save as write_planned
from torch.distributed.tensor import DTensor

from open_mythos.train.parallel import World

FOLDER = "shards"

Empty = Callable[[str, torch.Size, torch.dtype], Tensor]  # a tensor to read into, sharded or not
Fingerprints = dict[str, dict[str, Any]]


class Together:
    """One save, in which all ranks go from stage to stage, or all stop with the same error."""

    def __init__(self, world: World) -> None:
        self.world = world

    def agree(self, mine: Fingerprints | None = None, error: BaseException | None = None) -> Fingerprints:
        """What all ranks have to show for this stage. Raises `SaveError` if one could not do its part."""
        said: list[Any] = [None] * self.world.size
        dist.all_gather_object(said, (mine or {}, error and str(error)), group=self.world.aside)
        for rank, (_, trouble) in enumerate(said):
            if trouble is not None:
                raise SaveError(f"rank {rank} could not save: {trouble}")
        return {name: file for files, _ in said for name, file in files.items()}

    def do(self, part: Callable[[], object]) -> None:
        """This rank's part, which passes through the same stages on all. Raises on all, or on none."""
        try:
            part()
        except SaveError:
            raise
        except (Exception, CheckpointException) as error:
            self.agree(error=error)
        else:
            self.agree()


class SaveError(OSError):
    """A checkpoint was not written, on no rank."""


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The sharded tensors, the others, and which sharded ones are another by a second name."""
    first: dict[int, str] = {}
    pieces: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)], pieces[name] = name, tensor
    rest = {name: tensor for name, tensor in tensors.items() if name not in pieces and name not in aliases}
    return pieces, rest, aliases


def copied(pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this rank's pieces on the CPU, so that training may go on while they are written."""
    plain = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    staged = DefaultStager(plain).stage(dict(pieces))
    assert isinstance(staged, dict)
    return staged


def write(
    draft: Path,
    pieces: Mapping[str, Tensor],
    together: Together,
    fingerprint: Callable[[Path], dict[str, Any]],
) -> Fingerprints:
    """Write all ranks' pieces under `draft`; the fingerprint of every file, by its name there."""
    together.agree()  # the draft is there
    if not pieces:
        return together.agree()
    world = together.world
    writer = HuggingFaceStorageWriter(str(draft / FOLDER), save_distributed=True)
    write_planned(dict(pieces), storage_writer=writer, process_group=world.aside)
    own = (draft / FOLDER).glob(f"shard-{world.rank + 1:05d}-*")
    return together.agree({f"{FOLDER}/{path.name}": fingerprint(path) for path in own})


def read(folder: Path, only: str | None = None, empty: Empty | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint that were sharded, whole or as `empty` makes them.

    Every rank reads for itself. Raises `ValueError` if a piece is missing or unreadable.
    """
    path = str(folder / FOLDER)
    make = empty or (lambda name, size, dtype: torch.empty(size, dtype=dtype))
    try:
        saved = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata
        wanted = {
            name: make(name, entry.size, entry.properties.dtype)  # type: ignore[union-attr]
            for name, entry in saved.items()
            if only is None or name.startswith(f"{only}/")
        }
        with warnings.catch_warnings():  # that nothing is communicated is the intent
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            read_planned(wanted, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
    except (CheckpointException, SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"the shards in {path} cannot be read: {error}") from error
    return wanted


def like(model: nn.Module) -> Empty:
    """Tensors laid out as the parameters of `model` are: its own, and what the optimizer holds for each."""
    named = dict(model.named_parameters(remove_duplicate=False))

    def empty(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        inner = name.removeprefix("model/").removeprefix("optimizer/state/")
        parameter = named.get(inner, named.get(inner.rpartition("/")[0]))
        if isinstance(parameter, DTensor) and parameter.shape == size:
            return torch.empty_like(parameter.detach(), dtype=dtype)
        return torch.empty(size, dtype=dtype)

    return empty
