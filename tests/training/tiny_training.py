"""Tiny random teachers and data for whole training runs; and runs in two processes, or killed."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from turbodit.checkpoints import load_transformer
from turbodit.distributed import Mesh
from turbodit.training import rcm, sla
from turbodit.training.checkpoint import Checkpoints
from turbodit.training.config import RCMConfig, SLAConfig, TrainConfig
from turbodit.training.data import LatentDataset, Sample, ShardWriter
from turbodit.training.data.shards import sample_key, shard_path
from turbodit.training.session import Session

if TYPE_CHECKING:
    from tests.tiny_models import Variant

# They write a line for every tensor, which pytest keeps.
for _name in ("dcp_logger", "default"):
    logging.getLogger(f"c10d-NullHandler-{_name}").setLevel(logging.WARNING)

SAMPLES = 4
SIZE = (3, 8, 16)  # T, H, W of latents: 96 tokens, six blocks of 16


def tiny_teacher(folder: Path, variant: Variant = "t2v") -> dict[str, Any]:
    """A teacher and its data, as arguments of a configuration."""
    # Here, as the processes that only train are the sooner up.
    from tests.tiny_models import tiny_diffusers_folder

    model = tiny_diffusers_folder(folder / variant, variant)
    data = folder / f"{variant}-data"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(shard_path(data, 0), "") as writer:
        for number in range(SAMPLES):
            writer.write(_sample(number, variant, generator))
    return {"model": str(model), "data": (str(data),)}


def _sample(number: int, variant: Variant, generator: torch.Generator) -> Sample:
    from tests.tiny_models import IMAGE_DIM, IMAGE_TOKENS, TEXT_DIM

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Sample(
        sample_key(number),
        randn(48 if variant == "ti2v" else 16, *SIZE),
        randn(6, TEXT_DIM),
        f"clip {number}",
        channels=randn(20, *SIZE) if variant in ("i2v", "i2v-a14b") else None,
        features=randn(IMAGE_TOKENS, IMAGE_DIM) if variant == "i2v" else None,
    )


def sla_config(teacher: dict[str, Any], out: Path, **changes: Any) -> SLAConfig:
    """Four updates on a CPU, each in the log, without an average."""
    return SLAConfig(**{**_SHARED, **teacher, "out": out, "block_q": 16, "block_k": 16, **changes})


def rcm_config(teacher: dict[str, Any], out: Path, **changes: Any) -> RCMConfig:
    """The same of rCM, which has one update of each kind in each two after the first two."""
    return RCMConfig(
        **{**_SHARED, **teacher, "out": out, "student_every": 2, "warmup": 2, **changes}
    )


_SHARED: dict[str, Any] = {
    "steps": 4,
    "batch": 2,
    "lr": 1e-3,
    "ema": (),
    "device": "cpu",
    "checkpointing": "none",
    "log_every": 1,
    "sample_every": None,
}


def log_of(config: TrainConfig) -> list[dict[str, Any]]:
    """The log's entries, without what a clock and the process's memory decide."""
    lines = (config.out / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        for name in ("time", "minutes", "seconds_per_step", "peak_memory_gib"):
            entry.pop(name)
    return entries


def column(config: TrainConfig, name: str) -> list[float]:
    """One number of every update; an update without it has none."""
    return [entry[name] for entry in log_of(config) if name in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a transformer's folder, float32."""
    stated = json.loads((folder / "config.json").read_text())
    model = load_transformer(folder, dtype=torch.float32, attention=stated.get("attention", "sdpa"))
    return model.state_dict()


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The positional arguments of all calls of a function or method from now on."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
    return calls


def only_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs from now on write no weights, which takes longer than a few updates do."""
    monkeypatch.setattr(Session, "export", lambda *args: None)
    monkeypatch.setattr(Checkpoints, "save", lambda *args: None)


def train(config: TrainConfig) -> None:
    method = sla if isinstance(config, SLAConfig) else rcm
    method.train(config)  # type: ignore[arg-type]


# In two processes.


def two_processes(folder: Path, cases: dict[str, tuple[TrainConfig, bool]]) -> None:
    """Each configuration by two processes; the keys of their samples in `folder`/<name>-<rank>.

    The flag of a case: whether both take the samples and noise of the first, so that they find
    what one process finds.
    """
    mp.spawn(_process, (folder, cases), nprocs=2)


def one_of_two_fails(folder: Path, config: TrainConfig) -> None:
    """Raises what the failing process raises; a TimeoutError if they wait for each other."""
    context = mp.spawn(_fail_alone, (folder, config), nprocs=2, join=False)
    try:
        if not context.join(timeout=60):
            raise TimeoutError("the processes wait for each other")
    finally:
        for process in context.processes:
            process.kill()


def _fail_alone(rank: int, folder: Path, config: TrainConfig) -> None:
    torch.set_num_threads(1)
    update = Session.update

    def failing(self: Session, *args: Any, **kwargs: Any) -> None:
        if rank == 1 and self.step == 3:
            raise RuntimeError("one process fails")
        update(self, *args, **kwargs)

    Session.update = failing  # type: ignore[method-assign]
    store = f"file://{folder / 'store-fails'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    train(config)


def keys_of(folder: Path, name: str, rank: int) -> list[list[str]]:
    """Keys of each batch that a process took."""
    return json.loads((folder / f"{name}-{rank}").read_text())


def _process(rank: int, folder: Path, cases: dict[str, tuple[TrainConfig, bool]]) -> None:
    torch.set_num_threads(1)
    for name, (config, alike) in cases.items():
        keys: list[list[str]] = []
        with pytest.MonkeyPatch.context() as patch:
            if alike:
                patch.setattr(Mesh, "data_rank", 0)
                patch.setattr(Mesh, "data_count", 1)
            patch.setattr(LatentDataset, "_collate", _noting(LatentDataset._collate, keys))
            store = f"file://{folder / f'store-{name}'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            train(config)
        (folder / f"{name}-{rank}").write_text(json.dumps(keys))


def _noting(collate: Callable[..., Any], keys: list[list[str]]) -> Callable[..., Any]:
    def noted(self: LatentDataset, samples: Any) -> Any:
        keys.append([sample.key for sample in samples])
        return collate(self, samples)

    return noted


# Killed.


def resumable(teacher: dict[str, Any], out: Path) -> tuple[SLAConfig, RCMConfig]:
    """Runs that save every second update, with all that has to come back."""
    shared: dict[str, Any] = {"steps": 6, "save_every": 2, "ema": (0.1, 0.2), "accumulate": 2}
    return (
        sla_config(teacher, out / "sla", first_ratio=1.0, ratio_steps=4, **shared),
        rcm_config(teacher, out / "rcm", warmup=1, **shared),
    )


def _train_until_killed(config: TrainConfig) -> int:
    """In a process of its own, which dies while it writes the second checkpoint; its number."""
    process = os.fork()
    if process == 0:
        fsync = os.fsync

        def dying(file: Any) -> None:
            fsync(file)
            if (config.out / "checkpoints" / "latest").exists():
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = dying
        train(config)
        os._exit(0)
    return process


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, data, out = sys.argv[1:]
    runs = resumable({"model": model, "data": (data,)}, Path(out))
    for process in [_train_until_killed(config) for config in runs]:
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
