"""Tar shards of training samples: what is in them, how they are written, indexed and read.

The layout is that of rCM's and TurboDiffusion's published data sets, which webdataset reads: in
`shard_000000.tar`, `shard_000001.tar`, ... the members of a sample share a key:

    <key>.latent.pt      (C, T, H, W) bfloat16, normalised latents
    <key>.embed.pt       (text_len, text_dim) bfloat16, text embeddings, zeros past their end
    <key>.condition.pt   our own, for image-to-video models: {"channels": (4 + C, T, H, W),
                         "features": (n, image_dim)}, bfloat16, what the model has of the two
    <key>.prompt.txt     UTF-8

A `.pt` is a tensor (or a dictionary of tensors) as `torch.save` writes it. The shards are read
with `tarfile` and not with webdataset: a stream cannot be taken up exactly where it was left.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from turbodit import __version__
from turbodit.checkpoints.write import new_file

LATENT, EMBED, CONDITION, PROMPT = "latent.pt", "embed.pt", "condition.pt", "prompt.txt"
INFO_NAME = "dataset.json"


class BrokenSample(Exception):
    """A sample that cannot be used; the message is the reason, without the sample's name."""


@dataclass(frozen=True)
class Sample:
    """One training sample, its tensors on the CPU or where they were made.

    Attributes:
        latents: (C, T, H, W), normalised.
        context: (n, text_dim) text embeddings.
        channels, features: of `conditioning.ImageCondition`, without its batch dimension.
    """

    key: str
    latents: torch.Tensor
    context: torch.Tensor
    prompt: str
    channels: torch.Tensor | None = None
    features: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        tensors = (self.latents, self.context, self.channels, self.features)
        return sum(x.nbytes for x in tensors if x is not None)


@dataclass(frozen=True)
class DatasetInfo:
    """What a folder of shards holds: the content of `dataset.json`.

    Attributes:
        model: name of the model whose VAE and text encoder it is for.
        latent_shape: (C, T, H, W) of every sample.
        count: samples that were asked for; there are fewer where some were broken.
        shards: of the finished set.
        vae: `prompt_cache.fingerprint` of the VAE that the latents belong to.
        origin: what else decides the samples; JSON values.
    """

    model: str
    latent_shape: tuple[int, int, int, int]
    count: int
    shards: int
    vae: str
    origin: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `dataset.json`, all or nothing."""
        record = {"turbodit": __version__} | asdict(self)
        with explained(folder / INFO_NAME), new_file(folder / INFO_NAME) as partial:
            partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> DatasetInfo | None:
        """The folder's `dataset.json`; None where there is none, as in sets of others.

        Raises:
            ValueError: it is no description of ours.
        """
        path = folder / INFO_NAME
        try:
            record = json.loads(path.read_text("utf-8"))
            record.pop("turbodit")
            record["latent_shape"] = tuple(record["latent_shape"])
            return cls(**record)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not describe a data set of ours: {error!r}") from error

    def identity(self, *, sizes: bool = True) -> str:
        """JSON text that differs between data sets with different samples.

        Args:
            sizes: whether `count` and `shards` are a part of it.
        """
        values = asdict(self)
        if not sizes:
            del values["count"], values["shards"]
        return json.dumps(values, sort_keys=True)


def claim_folder(folder: Path, info: DatasetInfo, *, growing: bool = False) -> None:
    """Make `folder` the home of the data set `info`, or go on with the one that is there.

    Several processes may do so at once.

    Args:
        growing: whether the number of samples may change.

    Raises:
        ValueError: it holds another data set, or shards without a description.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # In this order: another process writes the description before its first shard.
    shards = sorted(folder.glob("*.tar"))
    there = DatasetInfo.load(folder)
    if there is None and shards:
        raise ValueError(
            f"{folder} holds {shards[0].name} but no {INFO_NAME}, so it is not known what that "
            "is; choose another folder"
        )
    if there is None:
        info.save(folder)
        return
    differences = _differences(
        json.loads(there.identity(sizes=not growing)), json.loads(info.identity(sizes=not growing))
    )
    if differences:
        raise ValueError(
            f"{folder} holds another data set: {'; '.join(differences)}. Choose another folder, "
            "or delete that one"
        )
    if there != info:
        info.save(folder)


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Where two descriptions differ, in words."""
    found = []
    for name in sorted(there.keys() | asked.keys()):
        old, new = there.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new)
        elif old != new:
            found.append(f"{name} is {old!r}, asked for {new!r}")
    return found


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:06d}.tar"


def sample_key(number: int) -> str:
    return f"{number:09d}"


# Index.

Span = tuple[int, int]  # where a member's content begins, and its bytes


@dataclass(frozen=True)
class Entry:
    """Where the members of a sample lie in its shard; `end` is behind the last of them."""

    key: str
    members: dict[str, Span]
    end: int


@dataclass(frozen=True)
class Index:
    """The samples of a shard in the file's order, and what is wrong with the file, if anything.

    Members that the file no longer holds in full are left out.
    """

    entries: tuple[Entry, ...]
    damage: str | None


def index_shard(path: Path) -> Index:
    """Read the headers of a tar file; its contents are not touched.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    members: dict[str, dict[str, Span]] = {}
    ends: dict[str, int] = {}
    damage = None
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isfile() or member.offset_data + member.size > size:
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    members.setdefault(key, {})[kind] = (member.offset_data, member.size)
                    ends[key] = member.offset_data + -(-member.size // 512) * 512
                file.seek(tar.offset)
                # An invalid header ends tarfile's loop just as the end of the archive does.
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    damage = "truncated or damaged shard"
        except tarfile.TarError:
            damage = "truncated or damaged shard"
    return Index(tuple(Entry(key, members[key], ends[key]) for key in members), damage)


# Writing.


class ShardWriter:
    """A shard that gets its name when it is whole. Use it in a `with` statement.

    Until then its samples are in `<name>.<digest>.partial`, where the next writer of the same
    shard and identity finds them. A process that is killed loses what it was writing, no more.

    Args:
        path: of the shard; what is there is replaced.
        identity: text that differs where the samples differ.

    Attributes:
        keys: of the samples that it holds.
    """

    def __init__(self, path: Path, identity: str) -> None:
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.path = path
        self.partial = path.with_name(f"{path.name}.{digest}.partial")
        self.keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        for stale in self.path.parent.glob(f"{self.path.name}.*.partial"):
            if stale != self.partial:
                stale.unlink()
        with explained(self.path):
            self.partial.touch()
            end = 0
            for entry in index_shard(self.partial).entries:
                if PROMPT in entry.members:  # the last member that is written
                    self.keys.add(entry.key)
                    end = entry.end
            self._file = self.partial.open("r+b")
            self._file.truncate(end)
            self._file.seek(end)
            self._tar = tarfile.open(fileobj=self._file, mode="w")
        return self

    def write(self, sample: Sample) -> None:
        """Add a sample, its tensors in bfloat16.

        Raises:
            OSError: it cannot be written, for example for want of space.
        """
        with explained(self.path):
            for kind, content in _contents(sample):
                member = tarfile.TarInfo(f"{sample.key}.{kind}")
                member.size = len(content)
                self._tar.addfile(member, io.BytesIO(content))
            self._file.flush()
        self.keys.add(sample.key)

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            with suppress(OSError):  # of a full disk, which was told already
                self._file.close()
            return
        with explained(self.path):
            self._tar.close()
            self._file.close()
            os.replace(self.partial, self.path)


def _contents(sample: Sample) -> Iterator[tuple[str, bytes]]:
    """The members of a sample, the prompt last."""
    yield LATENT, _to_bytes(_stored(sample.latents))
    yield EMBED, _to_bytes(_stored(sample.context))
    parts = {"channels": sample.channels, "features": sample.features}
    condition = {name: _stored(part) for name, part in parts.items() if part is not None}
    if condition:
        yield CONDITION, _to_bytes(condition)
    yield PROMPT, sample.prompt.encode()


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, so that no more than this is stored where it is a part of a batch."""
    return tensor.detach().to("cpu", torch.bfloat16, copy=True).contiguous()


def _to_bytes(content: torch.Tensor | dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say in the error which file could not be written, and how to go on after a full disk."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(path.parent).free
            reason = (
                f"no space left ({free:,} bytes are free); finished shards are kept, and the same "
                "command goes on from here"
            )
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error


# Reading.


def read_sample(path: Path, entry: Entry, *, channels: bool, features: bool) -> Sample:
    """A sample of a shard, its tensors float32; `channels` and `features` only if asked for.

    Raises:
        BrokenSample: a member is missing or unreadable, or holds NaN or infinity.
        OSError: the shard cannot be read.
    """
    wanted = [LATENT, EMBED, PROMPT] + ([CONDITION] if channels or features else [])
    for kind in wanted:
        if kind not in entry.members:
            raise BrokenSample(f"no {kind}")
    with path.open("rb") as file:
        contents = {kind: _read(file, entry.members[kind]) for kind in wanted}
    try:
        prompt = contents[PROMPT].decode()
    except UnicodeDecodeError as error:
        raise BrokenSample(f"{PROMPT} is not UTF-8") from error
    condition = _load(CONDITION, contents[CONDITION]) if CONDITION in contents else None
    return Sample(
        entry.key,
        _tensor(LATENT, _load(LATENT, contents[LATENT])),
        _tensor(EMBED, _load(EMBED, contents[EMBED])),
        prompt,
        _part(condition, "channels") if channels else None,
        _part(condition, "features") if features else None,
    )


def _read(file: io.BufferedReader, span: Span) -> bytes:
    offset, size = span
    file.seek(offset)
    return file.read(size)


def _load(kind: str, content: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: the bytes may be anything
        raise BrokenSample(f"unreadable {kind} ({type(error).__name__})") from error


def _part(condition: Any, name: str) -> torch.Tensor:
    if not isinstance(condition, dict) or name not in condition:
        raise BrokenSample(f"no {name} in {CONDITION}")
    return _tensor(CONDITION, condition[name])


def _tensor(kind: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise BrokenSample(f"{kind} holds no tensor of floating-point numbers")
    if value.numel() == 0:
        raise BrokenSample(f"{kind} is empty")
    value = value.float()
    least, most = torch.aminmax(
        value
    )  # NaN if there is any; isfinite of all takes 20 times as long
    if not (least.isfinite() and most.isfinite()):
        raise BrokenSample(f"NaN or infinity in {kind}")
    return value
