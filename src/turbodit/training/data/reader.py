"""Batches of training samples, shuffled, split over ranks, and resumed exactly.

All ranks walk through one endless stream of samples: epoch after epoch the shards in an order
drawn from (seed, epoch), and in each the samples in an order drawn from (seed, epoch, shard). A
step takes the next `world * batch` of them, of which every rank reads its own part. So the
position is the same on all ranks and does not depend on how many there are, ranks never share
a sample in an epoch, and it does not matter how many shards there are.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from glob import glob
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from turbodit.config import ModelConfig
from turbodit.training.data.shards import (
    BrokenSample,
    DatasetInfo,
    Entry,
    Index,
    Sample,
    index_shard,
    read_sample,
)

MAX_BROKEN = 0.1  # share of samples; more is an error
MIN_SEEN = 50  # samples, before their share means anything
BYTES_KEPT = 2 * 2**30  # of samples: a small set is read once
INDICES_KEPT = 32  # shards; the index of a thousand samples takes a megabyte


@dataclass(frozen=True)
class Batch:
    """Some samples, float32 on the CPU.

    Attributes:
        latents: (B, C, T, H, W).
        context: (B, text_len, text_dim), zeros past the prompts' ends.
        prompts, keys: B each; keys name the samples in their shards.
        channels: (B, in_dim - C, T, H, W), of models that see their condition so, else None.
        features: (B, n, image_dim), of models with CLIP features, else None.
    """

    latents: torch.Tensor
    context: torch.Tensor
    prompts: tuple[str, ...]
    keys: tuple[str, ...]
    channels: torch.Tensor | None = None
    features: torch.Tensor | None = None


@dataclass(frozen=True)
class Position:
    """How much of the stream is consumed: `sample` samples of the `shard`-th shard of `epoch`."""

    epoch: int = 0
    shard: int = 0
    sample: int = 0


class LatentDataset:
    """An endless iterator over the batches of a data set.

    While a batch is used, a thread reads the next. A broken sample is skipped and counted; the
    next good one of the stream takes its place, and is then seen twice. The samples skipped in
    a shard are told in one warning.

    Args:
        source: a folder with shards (`*.tar`), a pattern such as "data/shard_*.tar", or several
            of both.
        model: what the samples are for.
        batch: samples of this rank in each step.
        seed: of the order.
        rank, world: which of how many data-parallel processes this is.

    Attributes:
        info: the folder's `dataset.json`, if it has one.
        latent_shape: (C, T, H, W) of all samples.
        skipped: how many samples were skipped, by reason.

    Raises:
        FileNotFoundError: no such folder, or no shards.
        ValueError: an unfinished set, or samples that do not fit the model.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        model: ModelConfig,
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be positive, got {batch}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1} of {world}, got {rank}")
        self.model, self.batch, self.seed, self.rank, self.world = model, batch, seed, rank, world
        sources = (source,) if isinstance(source, (str, Path)) else source
        self.shards, self.info = _find_shards(sources)
        self._mark = _mark(self.shards)
        self.skipped: Counter[str] = Counter()
        self._seen = 0
        self._kept: dict[tuple[Path, str], Sample] = {}
        self._room = BYTES_KEPT
        self._damaged: set[Path] = set()
        self._untold: dict[Path, Counter[str]] = {}
        self._told: set[Path] = set()
        self._index: Callable[[Path], Index] = lru_cache(INDICES_KEPT)(index_shard)
        self._position = Position()
        dit = model.transformer
        self._channels = dit.in_dim > dit.out_dim
        self._features = dit.image_dim is not None
        self._pattern = self._first_good()
        self.latent_shape = tuple(self._pattern.latents.shape)
        self._check_model()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the position on. The position moves when a batch is handed out."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as thread:
            work = thread.submit(self._read_batch, self._position)
            try:
                while True:
                    batch, self._position, shard = work.result()
                    self._warn(but=shard)
                    work = thread.submit(self._read_batch, self._position)
                    yield batch
            finally:
                work.cancel()
                self._warn(but=None)

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch handed out: the same on all ranks; JSON values."""
        return asdict(self._position) | {"seed": self.seed, "shards": self._mark}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; iterators that began before do not notice.

        The number of ranks and the batch may be others than they were.

        Raises:
            ValueError: it belongs to another seed or other shards.
        """
        for name, own in (("seed", self.seed), ("shards", self._mark)):
            if state[name] != own:
                raise ValueError(
                    f"the saved position belongs to other data: {name} was {state[name]!r}, "
                    f"here it is {own!r}"
                )
        self._position = Position(state["epoch"], state["shard"], state["sample"])

    def _read_batch(self, at: Position) -> tuple[Batch, Position, Path]:
        """This rank's part of the step at a position, the next position, the shard reached."""
        stream = self._walk(at)
        step = list(islice(stream, self.world * self.batch))
        reached, _, after = step[-1]
        own = step[self.rank * self.batch : (self.rank + 1) * self.batch]
        good: list[Sample] = []
        for path, entry, _ in chain(own, stream):  # what follows stands in for broken samples
            sample = self._load(path, entry)
            if sample is not None:
                good.append(sample)
            if len(good) == self.batch:
                break
        return self._collate(good), after, reached

    def _walk(self, at: Position) -> Iterator[tuple[Path, Entry, Position]]:
        """The stream from a position on: shard, sample, and the position behind it."""
        for epoch in count(at.epoch):
            shards = self._order(len(self.shards), epoch)
            for turn in range(at.shard, len(shards)):
                path = self.shards[shards[turn]]
                entries = self._entries(path)
                order = self._order(len(entries), epoch, shards[turn])
                for number in range(at.sample, len(order)):
                    yield path, entries[order[number]], Position(epoch, turn, number + 1)
                at = Position(epoch, turn + 1)
            at = Position(epoch + 1)

    def _order(self, size: int, *key: int) -> list[int]:
        generator = np.random.default_rng((self.seed, *key))
        return generator.permutation(size).tolist()

    def _entries(self, path: Path) -> tuple[Entry, ...]:
        index = self._index(path)
        if index.damage is not None and path not in self._damaged:
            self._damaged.add(path)
            self._count(path, index.damage)
        return index.entries

    def _load(self, path: Path, entry: Entry) -> Sample | None:
        """The sample, or None if it is broken.

        Raises:
            ValueError: too many are.
        """
        self._seen += 1
        kept = self._kept.get((path, entry.key))
        if kept is not None:
            return kept
        try:
            sample = read_sample(path, entry, channels=self._channels, features=self._features)
            _check_like(sample, self._pattern, self.model.transformer.text_len)
            if self._room >= sample.nbytes:
                self._room -= sample.nbytes
                self._kept[path, entry.key] = sample
            return sample
        except BrokenSample as error:
            self._count(path, str(error))
        skipped = self.skipped.total()
        if self._seen >= MIN_SEEN and skipped > MAX_BROKEN * self._seen:
            raise ValueError(
                f"{skipped} of {self._seen} samples are broken, more than {MAX_BROKEN:.0%}: "
                f"{_listed(self.skipped)}; the last in {path}"
            )
        return None

    def _count(self, path: Path, reason: str) -> None:
        self.skipped[reason] += 1
        self._untold.setdefault(path, Counter())[reason] += 1

    def _warn(self, but: Path | None) -> None:
        """Tell what was skipped in shards that are done with, each once."""
        for path in [path for path in self._untold if path != but]:
            reasons = self._untold.pop(path)
            if path not in self._told:
                self._told.add(path)
                warnings.warn(f"skipped in {path}: {_listed(reasons)}", stacklevel=3)

    def _first_good(self) -> Sample:
        """The first good sample of the first shard that has one: all others must be like it."""
        reasons: Counter[str] = Counter()
        for path in self.shards:
            index = self._index(path)
            if index.damage is not None:
                reasons[index.damage] += 1
            for entry in index.entries:
                try:
                    return read_sample(
                        path, entry, channels=self._channels, features=self._features
                    )
                except BrokenSample as error:
                    reasons[str(error)] += 1
        found = _listed(reasons) or "no samples"
        raise ValueError(f"nothing to train on in {self.shards[0].parent}: {found}")

    def _check_model(self) -> None:
        """Raise a ValueError unless the samples fit the model."""
        name, dit, like = self.model.name, self.model.transformer, self._pattern
        where = self.shards[0].parent
        shape = tuple(like.latents.shape)
        if len(shape) != 4 or shape[0] != dit.out_dim:
            raise ValueError(
                f"latents in {where} have shape {shape}, {name} expects {dit.out_dim} channels "
                f"({dit.out_dim}, T, H, W): they were made by another VAE"
            )
        if any(size % patch for size, patch in zip(shape[1:], dit.patch_size, strict=True)):
            raise ValueError(
                f"latents in {where} have shape {shape}; {name} needs T, H and W to be multiples "
                f"of its patch {dit.patch_size}"
            )
        text = tuple(like.context.shape)
        if len(text) != 2 or text[0] > dit.text_len or text[1] != dit.text_dim:
            raise ValueError(
                f"text embeddings in {where} have shape {text}, {name} expects "
                f"(up to {dit.text_len}, {dit.text_dim}): they were made by another text encoder"
            )
        if like.channels is not None:
            expected = (dit.in_dim - dit.out_dim, *shape[1:])
            if like.channels.shape != expected:
                raise ValueError(
                    f"image conditions in {where} have shape {tuple(like.channels.shape)}, "
                    f"{name} expects {expected}"
                )
        if like.features is not None and (
            like.features.ndim != 2 or like.features.shape[1] != dit.image_dim
        ):
            raise ValueError(
                f"CLIP features in {where} have shape {tuple(like.features.shape)}, {name} "
                f"expects (n, {dit.image_dim})"
            )

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        length = self.model.transformer.text_len
        return Batch(
            torch.stack([s.latents for s in samples]),
            torch.stack([F.pad(s.context, (0, 0, 0, length - len(s.context))) for s in samples]),
            tuple(s.prompt for s in samples),
            tuple(s.key for s in samples),
            _stack(s.channels for s in samples),
            _stack(s.features for s in samples),
        )


def _find_shards(
    sources: Sequence[str | Path],
) -> tuple[tuple[Path, ...], DatasetInfo | None]:
    """All shards, and the description if there is a single folder that has one."""
    shards: list[Path] = []
    info = None
    for source in sources:
        if "://" in str(source) or str(source).startswith("pipe:"):
            raise ValueError(f"data must be files here, got {source}: download or mount it first")
        folder = Path(source)
        if folder.is_dir():
            found = sorted(folder.glob("*.tar"))
            info = DatasetInfo.load(folder)
            if info is not None and len(found) < info.shards:
                raise ValueError(
                    f"the data in {folder} is unfinished: {len(found)} of {info.shards} shards. "
                    f"Run the command that makes it again, or name the shards: {folder}/*.tar"
                )
        else:
            found = sorted(Path(name) for name in glob(str(source)))
        if not found:
            raise FileNotFoundError(f"no shards (*.tar) in {source}")
        shards += found
    if not shards:
        raise FileNotFoundError("no data given")
    return tuple(shards), info if len(sources) == 1 else None


def _mark(shards: Sequence[Path]) -> str:
    """Hash of the shards' names and sizes."""
    parts = [f"{path.name} {path.stat().st_size}" for path in shards]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _check_like(sample: Sample, pattern: Sample, text_len: int) -> None:
    """Raise BrokenSample unless the shapes are those of `pattern`."""
    for name in ("latents", "channels", "features"):
        own, expected = getattr(sample, name), getattr(pattern, name)
        if expected is not None and own.shape != expected.shape:
            raise BrokenSample(
                f"{name} of shape {tuple(own.shape)} instead of {tuple(expected.shape)}"
            )
    shape, width = tuple(sample.context.shape), pattern.context.shape[1]
    if len(shape) != 2 or shape[0] > text_len or shape[1] != width:
        raise BrokenSample(f"text embeddings of shape {shape} instead of ({text_len}, {width})")


def _stack(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
