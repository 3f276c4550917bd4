"""Checkpoints to go on from exactly where a run was stopped, and the model as users load it.

    folder/step-00001000/     a checkpoint, complete on all processes
        .metadata, *.distcp   weights, averages, optimizers: torch.distributed.checkpoint (DCP)
        rank-00000.pt         of each process: position in the data, random numbers
    folder/latest             the name of the last one

A checkpoint is written in the background under another name and renamed when all processes are
done, before `latest` is moved: what bears the name is complete, also after a full disk or a
kill. All processes see the same folder.

Weights, averages and optimizers can be read by any number of processes. What belongs to one
process can't, so another number of them starts its data and random numbers anew, with a warning.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from turbodit.checkpoints.stated import Stated, check_stated
from turbodit.checkpoints.transformer import Stored, empty_transformer, write_transformer
from turbodit.checkpoints.write import new_file, new_folder
from turbodit.distributed.mesh import Mesh, seed_everything
from turbodit.model.wan import WanModel
from turbodit.quantization import check_no_lora
from turbodit.training.checkpoint_reader import CheckpointReader
from turbodit.training.ema import PowerEMA
from turbodit.weights import LazyTensor, listing

Tensors = dict[str, torch.Tensor]
PATTERN = "step-*"
DONE = -1  # in place of the number of a tensor
OWN_KEYS = {"step", "mesh", "random", "generators", "common", "data"}
DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    KeyError,
    TypeError,
    AttributeError,
    CheckpointException,
)


class Stateful(Protocol):
    """What knows its position, as made of tensors, numbers, strings, lists and dicts."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """All that a run needs to go on. What is loaded is put into these very objects.

    Attributes:
        models: that are trained, by name, spread over devices already.
        optimizers: of the models of the same names.
        averages: of weights.
        generators: of random numbers, beside those of torch, NumPy and Python themselves.
        common: such generators that are alike in all processes.
        data: the reader of this process's samples.
        step: number of updates so far.
        identity: settings by name that stay as they are for as long as the run goes on.
    """

    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    averages: Mapping[str, PowerEMA] = field(default_factory=dict)
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    common: Mapping[str, torch.Generator] = field(default_factory=dict)
    data: Stateful | None = None
    step: int = 0
    identity: Mapping[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run in `folder`, of which the last `keep` stay.

    Every method is called by all processes together.

    Raises:
        ValueError: `keep` below 1.
    """

    def __init__(self, folder: Path | str, mesh: Mesh, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint is kept, got keep={keep}")
        self.folder = Path(folder)
        self.mesh = mesh
        self.keep = keep
        # Apart from the others, in which the training goes on meanwhile.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    @property
    def latest(self) -> Path | None:
        """The last complete checkpoint; None before the first.

        Raises:
            ValueError: the file that names it holds something else.
        """
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        name = pointer.read_bytes().decode(errors="replace").strip()
        if not re.fullmatch(r"step-\d+", name):
            raise ValueError(f"{pointer} holds {name!r:.40}, expected a name; {self._advice}")
        return self.folder / name

    def save(self, state: TrainState) -> None:
        """Copy `state` to the CPU now, and write it in the background.

        A save before it is waited for, and its error raised. A step that has been saved is not
        saved again.

        Raises:
            ValueError: an optimizer of other parameters than its model's, or a position in the
                data that is more than data.
            OSError: it, or the one before, cannot be written; the last complete one stays.
        """
        self.wait()
        final = self.folder / f"step-{state.step:08d}"
        if final == self.latest:
            return
        temporary = final.with_name(f".{final.name}.partial")
        if self.mesh.is_first:
            self._clear()
            temporary.mkdir(parents=True)
        dist.barrier(self._group)
        try:
            self._write_own(state, temporary / self._own_name)
        except OSError as error:
            explained = self._unwritten(error, final)
            if self.mesh.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise explained from error
        tensors = {**_tensors(state), **_all_optimizer_tensors(state)}
        future = dcp.async_save(tensors, checkpoint_id=temporary, process_group=self._group)
        assert isinstance(future, Future)
        self._pending = self._thread.submit(self._publish, future, temporary, final)

    def wait(self) -> None:
        """Until the save under way is done.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
            dist.barrier(self._group)  # the first process has renamed it

    def close(self, *, together: bool = True) -> None:
        """`wait`, and end the thread.

        Args:
            together: all processes close. False: this one has failed, and waits for none that
                has not.
        """
        try:
            if together:
                self.wait()
            elif self._pending is not None:
                self._pending.result()
        finally:
            self._thread.shutdown()

    def load(self, state: TrainState) -> bool:
        """Put the last checkpoint into `state`; False where there is none yet.

        Raises:
            FileNotFoundError: `latest` names a checkpoint that is not there.
            ValueError: it is damaged, or one of another identity, or of other models, averages
                or optimizers; an optimizer of other parameters than its model's.
        """
        source = self.latest
        if source is None:
            return False
        if not source.is_dir():
            raise FileNotFoundError(
                f"no checkpoint {source}, which {self.folder / 'latest'} names; {self._advice}"
            )
        reader = CheckpointReader(source)
        with self._damage(source):
            own = self._read_own(source)
            stored = reader.read_metadata().state_dict_metadata
        # Earlier versions kept no identity.
        _check_identity(own.get("identity", state.identity), state.identity, source)
        optimizers = _empty_optimizer_tensors(state, stored)
        tensors = {**_tensors(state), **optimizers}
        _check(tensors, stored, source)
        with self._damage(source):
            dcp.load(tensors, storage_reader=reader, process_group=self._group)
        for name, optimizer in state.optimizers.items():
            _fill(optimizer, f"optimizers.{name}.", state.models[name], tensors)
        for name, generator in state.common.items():
            generator.set_state(own["common"][name])
        state.step = own["step"]
        if own["mesh"] == self._mesh_sizes:
            self._restore(state, own)
        else:
            self._start_anew(state, own["mesh"])
        return True

    @property
    def _own_name(self) -> str:
        return f"rank-{self.mesh.rank:05d}.pt"

    @property
    def _mesh_sizes(self) -> list[int]:
        """What the data and random numbers of a process depend on."""
        return [self.mesh.data_count, self.mesh.context]

    def _write_own(self, state: TrainState, path: Path) -> None:
        content = BytesIO()  # first, as torch.save does not tell that a disk is full
        torch.save(self._own_state(state), content)
        content.seek(0)
        try:
            _read(content)
        except UnpicklingError as error:  # better now than when it is needed
            raise ValueError(
                "the position in the data must be made of tensors, numbers, strings, lists and "
                f"dicts, got more than that in {self._own_state(state)['data']!r:.200}"
            ) from error
        path.write_bytes(content.getbuffer())

    def _own_state(self, state: TrainState) -> dict[str, Any]:
        return {
            "step": state.step,
            "mesh": self._mesh_sizes,
            "identity": dict(state.identity),
            "random": _random_state(self.mesh.device),
            "generators": {name: g.get_state() for name, g in state.generators.items()},
            "common": {name: g.get_state() for name, g in state.common.items()},
            "data": None if state.data is None else state.data.state_dict(),
        }

    def _read_own(self, source: Path) -> dict[str, Any]:
        """This process's own state; the first one's, where there were other processes."""
        own = _read(source / "rank-00000.pt")
        if own["mesh"] == self._mesh_sizes:
            own = _read(source / self._own_name)
        if missing := OWN_KEYS - own.keys():
            raise KeyError(*sorted(missing))
        return own

    def _restore(self, state: TrainState, own: dict[str, Any]) -> None:
        if state.data is not None and own["data"] is not None:
            state.data.load_state_dict(own["data"])
        for name, generator in state.generators.items():
            generator.set_state(own["generators"][name])
        _set_random_state(own["random"], self.mesh.device)

    def _start_anew(self, state: TrainState, sizes: list[int]) -> None:
        seed_everything(state.step, self.mesh)
        for generator in state.generators.values():
            # Of the global one, so alike in a context group and different elsewhere.
            generator.manual_seed(int(torch.randint(2**62, ()).item()))
        if self.mesh.is_first:
            warnings.warn(
                f"the checkpoint is of {sizes[0]} data x {sizes[1]} context processes, now there "
                f"are {self._mesh_sizes[0]} x {self._mesh_sizes[1]}: weights, averages and "
                "optimizers go on; data and random numbers start anew",
                stacklevel=3,
            )

    def _clear(self) -> None:
        """Remove what an interrupted save left."""
        for rest in self.folder.glob(f".{PATTERN}.partial"):
            shutil.rmtree(rest)

    def _publish(self, future: Future[Any], temporary: Path, final: Path) -> None:
        try:
            future.result()
        except CheckpointException as error:
            explained = self._explained(error, final)
            if self.mesh.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise explained from error
        if not self.mesh.is_first:
            return
        if final.exists():  # left by a run that was stopped before it moved `latest`
            shutil.rmtree(final)
        os.replace(temporary, final)
        with new_file(self.folder / "latest") as pointer:
            pointer.write_text(final.name + "\n")
        others = sorted(path for path in self.folder.glob(PATTERN) if path != final)
        for old in others[: len(others) - (self.keep - 1)]:
            shutil.rmtree(old)

    def _explained(self, error: CheckpointException, final: Path) -> BaseException:
        """The first process's error of the file system, if that is what it was."""
        causes = [cause for cause, _ in error.failures.values()]
        # torch's own writer of tensors tells of a full disk by a RuntimeError.
        for kind in (OSError, RuntimeError):
            for cause in causes:
                if isinstance(cause, kind):
                    return self._unwritten(cause, final)
        return error

    def _unwritten(self, cause: OSError | RuntimeError, final: Path) -> OSError:
        number = cause.errno if isinstance(cause, OSError) else errno.EIO
        reason = cause.strerror if isinstance(cause, OSError) else str(cause).splitlines()[0]
        free = shutil.disk_usage(self.folder).free
        kept = "none is complete" if self.latest is None else f"the last complete is {self.latest}"
        return OSError(
            number, f"cannot write checkpoint {final}: {reason} ({free:,} bytes are free); {kept}"
        )

    @contextmanager
    def _damage(self, source: Path) -> Iterator[None]:
        """Say of whatever is wrong in the files of `source` that they are damaged."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except DAMAGE as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException) and error.failures:
                cause = next(iter(error.failures.values()))[0]
            what = f"{type(cause).__name__}: {cause}".splitlines()[0]
            raise ValueError(f"checkpoint {source} is damaged ({what}); {self._advice}") from error

    @property
    def _advice(self) -> str:
        names = sorted(path.name for path in self.folder.glob(PATTERN))
        there = f"the name of another one ({', '.join(names)})" if names else "a name"
        return f"write {there} into {self.folder / 'latest'}, or remove it to start anew"


def export_transformer(
    model: WanModel,
    folder: Path | str,
    mesh: Mesh,
    dtype: torch.dtype = torch.bfloat16,
    stated: Stated | None = None,
) -> None:
    """Write the weights of a model that is spread over `mesh` in diffusers' layout.

    The first process writes tensor by tensor, each gathered from all when it is its turn. Called
    by all processes; within `PowerEMA.applied` it writes an average.

    Args:
        dtype: of the weights, but for those that Wan keeps in float32.
        stated: how the model is to be used, for config.json (`checkpoints.stated`).

    Raises:
        ValueError: weights that do not make a whole transformer or are not finite, a LoRA beside
            them; or `stated` has what is unknown.
        OSError: it cannot be written.
    """
    stated = stated or {}
    check_stated(stated, "the model to be exported")
    check_no_lora(model)
    tensors = model.state_dict()
    missing = empty_transformer(model.config, None, "sdpa").state_dict().keys() - tensors.keys()
    if missing:
        raise ValueError(f"the model cannot be exported, it has no {listing(sorted(missing))}")
    names = list(tensors)

    def gathered(index: int) -> torch.Tensor:
        name, tensor = names[index], tensors[names[index]].detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.to("cpu", torch.float32 if WanModel.keep_float32(name) else dtype)

    if not mesh.is_first:
        while (index := _announce(DONE, mesh)) != DONE:
            gathered(index)
        return

    def read(index: int) -> torch.Tensor:
        whole = gathered(_announce(index, mesh))
        if not whole.isfinite().all():
            raise ValueError(
                f"the model cannot be exported, {names[index]} has values that are not finite: "
                "the run has diverged"
            )
        return whole

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if WanModel.keep_float32(name) else dtype

    weights = {
        name: LazyTensor(tuple(tensors[name].shape), dtype_of(name), partial(read, index))
        for index, name in enumerate(names)
    }
    try:
        with new_folder(Path(folder)) as temporary:
            write_transformer(temporary, Stored(model.config, None, weights, stated))
    finally:
        _announce(DONE, mesh)


def _read(file: Path | BytesIO) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def _announce(index: int, mesh: Mesh) -> int:
    """The number that the first process gives, on all of them."""
    said = torch.tensor(index, device=mesh.device)
    dist.broadcast(said, src=0)
    return int(said.item())


def _tensors(state: TrainState) -> Tensors:
    """Weights and averages, sharing memory with `state`."""
    tensors: Tensors = {}
    for kind, owners in (("models", state.models), ("averages", state.averages)):
        for owner, held in owners.items():
            for name, tensor in held.state_dict().items():
                tensors[f"{kind}.{owner}.{name}"] = tensor
    return tensors


def _numbered(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names of an optimizer's parameters, in the order in which its state numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    "an optimizer has parameters that its model has not: make it after the model "
                    "has been spread over devices, and give both the same name"
                )
            yield names[id(p)], p


def _all_optimizer_tensors(state: TrainState) -> Tensors:
    tensors: Tensors = {}
    for owner, optimizer in state.optimizers.items():
        for name, p in _numbered(optimizer, state.models[owner]):
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"optimizers.{owner}.{name}.{key}"] = value
    return tensors


def _empty_optimizer_tensors(state: TrainState, stored: Mapping[str, Any]) -> Tensors:
    """Places for what is stored of each parameter: sharded as it is, or a number."""
    tensors: Tensors = {}
    for owner, optimizer in state.optimizers.items():
        places = {
            f"optimizers.{owner}.{name}": p for name, p in _numbered(optimizer, state.models[owner])
        }
        for key, entry in stored.items():
            p = places.get(key.rpartition(".")[0])
            if p is not None and isinstance(entry, TensorStorageMetadata):
                dtype = entry.properties.dtype
                tensors[key] = (
                    torch.zeros_like(p, dtype=dtype, requires_grad=False)
                    if entry.size == p.shape
                    else torch.zeros(entry.size, dtype=dtype)
                )
    return tensors


def _fill(
    optimizer: torch.optim.Optimizer, prefix: str, model: nn.Module, tensors: Tensors
) -> None:
    """Give an optimizer its state back, as its own `load_state_dict` wants it.

    Its rate and other settings stay those of now: a run may go on with others.
    """
    found: dict[int, dict[str, torch.Tensor]] = {}
    numbers = {prefix + name: index for index, (name, _) in enumerate(_numbered(optimizer, model))}
    for key, tensor in tensors.items():
        place, _, entry = key.rpartition(".")
        if place in numbers:
            found.setdefault(numbers[place], {})[entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def _check_identity(there: Mapping[str, str], now: Mapping[str, str], source: Path) -> None:
    """Raise unless a checkpoint is one of this very run."""
    names = sorted(there.keys() | now.keys())
    others = [name for name in names if there.get(name) != now.get(name)]
    if others:
        listed = "; ".join(f"{n} is {now.get(n)} and was {there.get(n)}" for n in others)
        raise ValueError(f"{source} is a checkpoint of another run: {listed}; take another out")


def _check(tensors: Tensors, stored: Mapping[str, Any], source: Path) -> None:
    """Raise unless a checkpoint has what is to be loaded and nothing else, in these shapes."""
    faults = [
        f"{what} {listing(sorted(names))}"
        for what, names in (
            ("it has no", tensors.keys() - stored.keys()),
            ("nothing here takes", stored.keys() - tensors.keys()),
            (
                "other shapes of",
                {
                    name
                    for name, tensor in tensors.items()
                    if name in stored and stored[name].size != tensor.shape
                },
            ),
        )
        if names
    ]
    if faults:
        raise ValueError(f"{source} is a checkpoint of another run: {'; '.join(faults)}")


def _random_state(device: torch.device) -> dict[str, Any]:
    """States of the global generators, in types that torch.load reads as data alone."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def _set_random_state(saved: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(saved["torch"])
    if device.type == "cuda" and saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"], device)
    random.setstate(saved["python"])
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
