"""Shards and the reader of training data."""

from __future__ import annotations

import errno
import io
import json
import pickle
import tarfile
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from turbodit.config import PRESETS, TransformerConfig
from turbodit.training.data import (
    DatasetInfo,
    LatentDataset,
    Sample,
    ShardWriter,
    claim_folder,
)
from turbodit.training.data.shards import index_shard, sample_key, shard_path

SHAPE = (16, 2, 4, 4)
TEXT_LEN, TEXT_DIM = 6, 8
DIT = TransformerConfig(
    dim=8, ffn_dim=8, num_heads=1, num_layers=1, text_dim=TEXT_DIM, text_len=TEXT_LEN
)
MODEL = replace(PRESETS["Wan2.1-T2V-1.3B"], name="tiny", transformer=DIT)
I2V = replace(MODEL, task="i2v", transformer=replace(DIT, in_dim=36, image_dim=5))


def sample(number: int, **changes) -> Sample:
    """A sample that is told by its values."""
    parts = {
        "key": sample_key(number),
        "latents": torch.full(SHAPE, number / 4),
        "context": torch.ones(TEXT_LEN, TEXT_DIM) * number,
        "prompt": f"clip {number}",
    }
    return Sample(**(parts | changes))


def shard(folder: Path, number: int, samples: list[Sample]) -> Path:
    folder.mkdir(exist_ok=True)
    path = shard_path(folder, number)
    with ShardWriter(path, "") as writer:
        for one in samples:
            writer.write(one)
    return path


def shards(folder: Path, *sizes: int) -> Path:
    """Shards of so many samples, which count on."""
    first = 0
    for number, size in enumerate(sizes):
        shard(folder, number, [sample(i) for i in range(first, first + size)])
        first += size
    return folder


def dataset(source, **options) -> LatentDataset:
    return LatentDataset(source, MODEL, **({"batch": 2} | options))


def numbers(data: LatentDataset, steps: int) -> list[list[int]]:
    """Which samples the next batches hold."""
    batches = list(islice(iter(data), steps))
    for batch in batches:
        for row, key in enumerate(batch.keys):
            assert (batch.latents[row] == int(key) / 4).all()
            assert batch.prompts[row] == f"clip {int(key)}"
    return [[int(key) for key in batch.keys] for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return [number for one in lists for number in one]


def member_bytes(content: object) -> bytes:
    if isinstance(content, bytes):
        return content
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def add_raw(path: Path, members: dict[str, object]) -> Path:
    """A shard of members as they are."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = member_bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def raw_sample(number: int, **changes) -> dict[str, object]:
    """Members of a good sample, some of them changed; None leaves one out."""
    parts: dict[str, object] = {
        "latent": torch.full(SHAPE, number / 4, dtype=torch.bfloat16),
        "embed": torch.ones(TEXT_LEN, TEXT_DIM, dtype=torch.bfloat16),
        "prompt": f"clip {number}".encode(),
    }
    suffix = {"latent": "pt", "embed": "pt", "prompt": "txt"}
    return {
        f"{sample_key(number)}.{name}.{suffix[name]}": content
        for name, content in (parts | changes).items()
        if content is not None
    }


# Format.


def test_round_trip(tmp_path):
    torch.manual_seed(0)
    latents, context = torch.randn(SHAPE), torch.randn(4, TEXT_DIM)
    shard(tmp_path, 0, [sample(7, latents=latents, context=context, prompt="ein Füchslein")])
    batch = next(iter(dataset(tmp_path, batch=1)))
    assert batch.latents.dtype == batch.context.dtype == torch.float32
    assert torch.equal(batch.latents[0], latents.bfloat16().float())
    assert batch.context.shape == (1, TEXT_LEN, TEXT_DIM)
    assert torch.equal(batch.context[0, :4], context.bfloat16().float())
    assert not batch.context[0, 4:].any(), "not padded with zeros"
    assert batch.prompts == ("ein Füchslein",)
    assert batch.keys == ("000000007",)
    assert batch.channels is None
    assert batch.features is None


def test_only_the_sample_is_stored_not_its_batch(tmp_path):
    many = torch.zeros(1000, *SHAPE, dtype=torch.bfloat16)
    path = shard(tmp_path, 0, [sample(0, latents=many[3])])
    assert path.stat().st_size < 20_000


def test_webdataset_reads_what_we_write(tmp_path):
    wds = pytest.importorskip("webdataset")
    path = shard(tmp_path, 0, [sample(i) for i in range(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(
            wds.DataPipeline(
                wds.SimpleShardList([str(path)]),
                wds.tarfile_to_samples(),
                wds.decode(wds.handle_extension("pt", wds.torch_loads)),
            )
        )
    assert [one["__key__"] for one in found] == [sample_key(i) for i in range(3)]
    for number, one in enumerate(found):
        assert one["latent.pt"].dtype == one["embed.pt"].dtype == torch.bfloat16
        assert torch.equal(one["latent.pt"], torch.full(SHAPE, number / 4, dtype=torch.bfloat16))
        assert one["prompt.txt"] == f"clip {number}"


def test_we_read_what_webdataset_writes(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "foreign-0.tar")) as writer:
        for i in range(4):
            one = sample(i)
            writer.write(
                {
                    "__key__": f"part/{one.key}",
                    "latent.pt": member_bytes(one.latents.half()),
                    "embed.pt": member_bytes(one.context),
                    "prompt.txt": one.prompt.encode(),
                    "extra.json": b"{}",
                }
            )
    data = dataset(tmp_path)
    assert data.info is None
    batches = list(islice(iter(data), 2))
    assert {key for b in batches for key in b.keys} == {f"part/{sample_key(i)}" for i in range(4)}


def test_image_conditions(tmp_path):
    channels, features = torch.ones(20, *SHAPE[1:]), torch.ones(3, 5)
    ones = [sample(i, channels=channels * i, features=features * i) for i in range(2)]
    shard(tmp_path, 0, ones)
    batch = next(iter(LatentDataset(tmp_path, I2V, batch=2)))
    rows = torch.tensor([float(key) for key in batch.keys])
    assert torch.equal(batch.channels, rows.view(2, 1, 1, 1, 1) * channels)
    assert torch.equal(batch.features, rows.view(2, 1, 1) * features)
    assert next(iter(dataset(tmp_path))).channels is None, "a text-to-video model has no use for it"


def test_shards_of_one_content_are_equal_bit_for_bit(tmp_path):
    a, b = shards(tmp_path / "a", 3), shards(tmp_path / "b", 3)
    assert shard_path(a, 0).read_bytes() == shard_path(b, 0).read_bytes()


# Writing.


@pytest.mark.parametrize("cut", [0, 100, 512, 5000, 9000, None])
def test_writing_goes_on_after_a_cut(tmp_path, cut):
    whole = shards(tmp_path / "whole", 4)
    path = shard_path(tmp_path, 0)
    writer = ShardWriter(path, "x").__enter__()
    for i in range(2):
        writer.write(sample(i))
    writer._file.close()  # as if the process was killed
    assert not path.exists()
    size = writer.partial.stat().st_size
    with writer.partial.open("r+b") as file:
        file.truncate(size if cut is None else cut)
    with ShardWriter(path, "x") as writer:
        kept = set(writer.keys)
        for i in range(4):
            if sample_key(i) not in kept:
                writer.write(sample(i))
    assert len(kept) == {None: 2, 9000: 1}.get(cut, 1 if cut and cut > size // 2 else 0)
    assert path.read_bytes() == shard_path(whole, 0).read_bytes()
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_other_samples_do_not_go_on_with_a_partial_shard(tmp_path):
    path = shard_path(tmp_path, 0)
    writer = ShardWriter(path, "x").__enter__()
    writer.write(sample(0))
    writer._file.close()
    with ShardWriter(path, "y") as other:
        assert not other.keys
        other.write(sample(1))
    assert [entry.key for entry in index_shard(path).entries] == [sample_key(1)]
    assert not writer.partial.exists()


def test_a_full_disk_leaves_no_shard(tmp_path, monkeypatch):
    path = shard_path(tmp_path, 1)
    shards(tmp_path, 2)
    add = tarfile.TarFile.addfile

    def full(self, member, content=None):
        if member.name.startswith(sample_key(3)):
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, member, content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with (
        pytest.raises(OSError, match=r"cannot write .*shard_000001.tar: no space left") as failure,
        ShardWriter(path, "x") as writer,
    ):
        writer.write(sample(2))
        writer.write(sample(3))
    assert failure.value.errno == errno.ENOSPC
    assert not path.exists()
    assert shard_path(tmp_path, 0).exists()
    monkeypatch.undo()
    with ShardWriter(path, "x") as writer:
        assert writer.keys == {sample_key(2)}
        writer.write(sample(3))
    assert len(index_shard(path).entries) == 2


# Order, ranks, resume.


def test_every_sample_once_an_epoch_in_a_new_order(tmp_path):
    folder = shards(tmp_path, 3, 5, 4)
    epochs = flat(numbers(dataset(folder, batch=3), 16))
    parts = [epochs[i : i + 12] for i in (0, 12, 24, 36)]
    assert all(sorted(part) == list(range(12)) for part in parts)
    assert len({tuple(part) for part in parts}) == 4
    assert epochs == flat(numbers(dataset(folder, batch=3), 16))
    assert epochs != flat(numbers(dataset(folder, batch=3, seed=1), 16))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_samples_without_overlap(tmp_path, world):
    folder = shards(tmp_path, 20, 10)  # fewer shards than ranks
    steps = 30 // world
    ranks = [
        flat(numbers(dataset(folder, batch=1, rank=r, world=world), steps)) for r in range(world)
    ]
    assert sorted(flat(ranks)) == list(range(30))
    # One rank sees the same steps.
    alone = numbers(dataset(folder, batch=world), steps)
    assert [list(step) for step in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("steps", [0, 1, 4, 7, 13])
def test_resume_is_exact(tmp_path, steps):
    folder = shards(tmp_path, 3, 5, 4)
    expected = numbers(dataset(folder), steps + 8)
    first = dataset(folder)
    batches = iter(first)
    for _ in range(steps):
        next(batches)  # the next one is being read ahead
    state = json.loads(json.dumps(first.state_dict()))
    second = dataset(folder)
    second.load_state_dict(state)
    assert numbers(second, 8) == expected[steps:]
    assert second.state_dict() != state


def test_resume_on_another_number_of_ranks(tmp_path):
    folder = shards(tmp_path, 3, 5, 4)
    alone = flat(numbers(dataset(folder, batch=2), 9))
    first = dataset(folder, batch=2)
    numbers(first, 5)
    ranks = [dataset(folder, batch=1, rank=r, world=4) for r in range(4)]
    for data in ranks:
        data.load_state_dict(first.state_dict())
    steps = zip(*(flat(numbers(data, 2)) for data in ranks), strict=True)
    assert flat([list(step) for step in steps]) == alone[10:]


def test_a_position_in_other_data_is_refused(tmp_path):
    state = dataset(shards(tmp_path / "a", 3, 3)).state_dict()
    with pytest.raises(ValueError, match="other data: shards"):
        dataset(shards(tmp_path / "b", 3, 30)).load_state_dict(state)
    with pytest.raises(ValueError, match="other data: seed was 0, here it is 1"):
        dataset(tmp_path / "a", seed=1).load_state_dict(state)


# Broken data.


class Poison:
    def __reduce__(self):
        return (Path.touch, (Path("poisoned"),))


BROKEN = {
    "no latent.pt": raw_sample(99, latent=None),
    "no embed.pt": raw_sample(99, embed=None),
    "no prompt.txt": raw_sample(99, prompt=None),
    "NaN or infinity in latent.pt": raw_sample(99, latent=torch.full(SHAPE, float("nan"))),
    "NaN or infinity in embed.pt": raw_sample(99, embed=torch.tensor([[0, -torch.inf] * 4])),
    "embed.pt is empty": raw_sample(99, embed=torch.zeros(0, TEXT_DIM)),
    "latents of shape (16, 1, 4, 4)": raw_sample(99, latent=torch.zeros(16, 1, 4, 4)),
    "latents of shape (48, 2, 4, 4)": raw_sample(99, latent=torch.zeros(48, 2, 4, 4)),
    "text embeddings of shape (7, 8)": raw_sample(99, embed=torch.zeros(7, TEXT_DIM)),
    "text embeddings of shape (8,)": raw_sample(99, embed=torch.zeros(TEXT_DIM)),
    "latent.pt holds no tensor": raw_sample(99, latent={"a": torch.zeros(2)}),
    "embed.pt holds no tensor of floating": raw_sample(99, embed=torch.zeros(2, 8).long()),
    "prompt.txt is not UTF-8": raw_sample(99, prompt=b"\xff\xfe"),
    "unreadable latent.pt (EOFError)": raw_sample(99, latent=b""),
    "unreadable embed.pt": raw_sample(99, embed=b"PK\x03\x04 no archive"),
    "unreadable latent.pt (UnpicklingError)": raw_sample(
        99, latent=pickle.dumps(Poison(), protocol=2)
    ),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_sample_is_skipped_counted_and_told_once(tmp_path, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shards(tmp_path / "data", 20)
    add_raw(shard_path(folder, 1), raw_sample(20) | BROKEN[reason])
    shard(folder, 2, [sample(21)])
    data = dataset(folder)
    with pytest.warns(UserWarning, match=r"skipped in .*shard_000001.tar: ") as told:
        seen = flat(numbers(data, 30))
    assert set(seen) == set(range(22))
    assert len(told) == 1, "told more than once"
    assert reason in str(told[0].message)
    ((found, count),) = data.skipped.items()
    assert found.startswith(reason)
    assert 2 <= count <= 3, "not once an epoch"
    assert not Path("poisoned").exists()


def test_a_poisoned_file_whole_in_torchs_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shards(tmp_path / "data", 1)
    add_raw(shard_path(folder, 1), raw_sample(99, embed=Poison()))
    data = dataset(folder)
    with pytest.warns(UserWarning, match=r"unreadable embed.pt \(UnpicklingError\)"):
        numbers(data, 1)
    assert not Path("poisoned").exists()


@pytest.mark.parametrize("damage", ["cut", "cut between samples", "noise", "empty"])
def test_a_damaged_shard_gives_what_it_has(tmp_path, damage):
    folder = shards(tmp_path, 4, 4)
    path = shard_path(folder, 1)
    content = bytearray(path.read_bytes())
    ends = [entry.end for entry in index_shard(path).entries]
    if damage == "noise":
        content[ends[1] : ends[1] + 512] = b"x" * 512  # a header
    length = {"cut": ends[2] - 600, "cut between samples": ends[1], "empty": 0}
    path.write_bytes(content[: length.get(damage, len(content))])
    left = 4 if damage == "empty" else 6
    data = dataset(folder)
    with pytest.warns(UserWarning, match=r"shard_000001.tar: truncated or damaged shard \(1\)"):
        seen = flat(numbers(data, 12))
    assert set(seen) == set(range(left))


def test_a_broken_sample_costs_no_rank_its_place(tmp_path):
    """All ranks stay at one position, and each has its full batch."""
    folder = shards(tmp_path, 20)
    add_raw(shard_path(folder, 1), raw_sample(20) | raw_sample(99, latent=None))
    ranks = [dataset(folder, batch=2, rank=r, world=2) for r in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [numbers(data, 11) for data in ranks]
    assert {len(step) for rank in batches for step in rank} == {2}
    assert ranks[0].state_dict() == ranks[1].state_dict()
    assert sum(data.skipped.total() for data in ranks) in (2, 3)


def test_too_many_broken_samples_are_an_error(tmp_path):
    folder = shards(tmp_path, 8)
    shard(folder, 1, [sample(8 + i, latents=torch.full(SHAPE, torch.nan)) for i in range(2)])
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"samples are broken, more than 10%: NaN or infinity"),
    ):
        warnings.simplefilter("ignore")
        numbers(dataset(folder), 100)


# What a user can get wrong.


@pytest.mark.parametrize(
    ("one", "model", "message"),
    [
        (sample(0, latents=torch.zeros(48, 2, 4, 4)), MODEL, "tiny expects 16 channels"),
        (sample(0, latents=torch.zeros(16, 2, 3, 4)), MODEL, "multiples of its patch"),
        (sample(0, context=torch.zeros(6, 9)), MODEL, r"tiny expects \(up to 6, 8\)"),
        (sample(0, context=torch.zeros(7, 8)), MODEL, r"tiny expects \(up to 6, 8\)"),
        (sample(0), I2V, r"nothing to train on in .*: no condition.pt \(1\)"),
        (sample(0, features=torch.zeros(3, 5)), I2V, "no channels in condition.pt"),
        (
            sample(0, features=torch.zeros(3, 5), channels=torch.zeros(4, 2, 4, 4)),
            I2V,
            r"tiny expects \(20, 2, 4, 4\)",
        ),
        (
            sample(0, features=torch.zeros(3, 4), channels=torch.zeros(20, 2, 4, 4)),
            I2V,
            r"tiny expects \(n, 5\)",
        ),
    ],
)
def test_data_of_another_model(tmp_path, one, model, message):
    shard(tmp_path, 0, [one])
    with pytest.raises(ValueError, match=message):
        LatentDataset(tmp_path, model, batch=1)


def test_sources(tmp_path):
    folder = shards(tmp_path / "data", 2, 2)
    assert len(dataset(f"{folder}/shard_*1.tar").shards) == 1
    assert len(dataset([folder, shards(tmp_path / "more", 1)]).shards) == 3
    with pytest.raises(FileNotFoundError, match="no shards"):
        dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no shards"):
        dataset(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no data"):
        dataset([])
    with pytest.raises(ValueError, match=r"must be files here, got https://x/a\.tar"):
        dataset("https://x/a.tar")
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        dataset(folder, batch=0)
    with pytest.raises(ValueError, match="rank must be from 0 to 1 of 2, got 2"):
        dataset(folder, rank=2, world=2)


def test_the_description_of_a_folder(tmp_path):
    info = DatasetInfo("tiny", SHAPE, 5, 2, "abc", {"settings": {"steps": 3}})
    claim_folder(tmp_path, info)
    claim_folder(tmp_path, info)
    assert DatasetInfo.load(tmp_path) == info
    shards(tmp_path, 3)
    with pytest.raises(ValueError, match="unfinished: 1 of 2 shards"):
        dataset(tmp_path)
    assert len(dataset(f"{tmp_path}/*.tar").shards) == 1
    shards(tmp_path, 3, 2)
    assert dataset(tmp_path).info == info
    other = replace(info, origin={"settings": {"steps": 4}})
    with pytest.raises(ValueError, match="another data set: steps is 3, asked for 4"):
        claim_folder(tmp_path, other)
    with pytest.raises(ValueError, match="count is 5, asked for 6"):
        claim_folder(tmp_path, replace(info, count=6))
    claim_folder(tmp_path, replace(info, count=6), growing=True)
    assert DatasetInfo.load(tmp_path).count == 6
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(ValueError, match=r"dataset.json does not describe"):
        dataset(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"shard_000000.tar but no dataset.json"):
        claim_folder(tmp_path, info)


def test_an_error_while_reading_ahead_reaches_the_loop(tmp_path):
    folder = shards(tmp_path, 1, 3)
    data = dataset(folder)
    shard_path(folder, 1).unlink()
    with pytest.raises(FileNotFoundError):
        numbers(data, 2)
