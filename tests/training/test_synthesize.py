"""`turbodit synthesize`: a tiny random teacher's samples."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image
from tests.tiny_models import tiny_diffusers_folder
from tyro.conf import FlagCreatePairsOff

from turbodit.cli.synthesize import Synthesize, WorkerBars
from turbodit.pipeline import Pipeline
from turbodit.request import GenerationRequest
from turbodit.spritewan.world import HELD_OUT, scene
from turbodit.training.data import DatasetInfo, LatentDataset
from turbodit.training.data.shards import sample_key, shard_path
from turbodit.training.data.work import Worker, this_worker
from turbodit.training.synthesize import Prompt, read_prompts, sample_seed, synthesize

PROMPTS = [Prompt(text) for text in ("a cat", "a red fox", "the car moves left", "a fox", "snow")]
REQUEST = GenerationRequest(
    prompt=(), width=32, height=32, frames=5, steps=2, solver="euler", shift=3.0, guidance=5.0
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def teacher(models) -> Pipeline:
    folder = tiny_diffusers_folder(models / "tiny", "ti2v")
    return Pipeline.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def expected(teacher, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    report = make(teacher, folder)
    assert (report.made, report.found) == (5, 0)
    return files(folder)


def make(teacher: Pipeline, folder: Path, **options):
    options = {"request": REQUEST, "shard_size": 2, "seed": 7} | options
    return synthesize(teacher, PROMPTS, folder, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_samples_are_the_teachers_own(teacher, tmp_path):
    make(teacher, tmp_path, seed=3)
    data = LatentDataset(tmp_path, teacher.model, batch=5)
    batch = next(iter(data))
    assert data.latent_shape == (48, 2, 2, 2)
    for row, key in enumerate(batch.keys):
        number = int(key)
        assert batch.prompts[row] == PROMPTS[number].text
        settings = teacher.resolve(
            GenerationRequest(
                prompt=PROMPTS[number].text,
                seed=sample_seed(3, number),
                width=32,
                height=32,
                frames=5,
                steps=2,
                solver="euler",
                shift=3.0,
                guidance=5.0,
            )
        )
        (video,) = teacher.generate(settings)
        assert torch.equal(
            batch.context[row],
            teacher.text_encoder.encode([PROMPTS[number].text])[0].bfloat16().float(),
        )
        decoded = teacher.vae.decode(batch.latents[row : row + 1])[0].permute(1, 2, 3, 0)
        difference = (decoded * 127.5 + 127.5) - torch.from_numpy(video.frames).float()
        assert difference.abs().mean() < 1, "not the video of this prompt and seed"


def test_the_description(teacher, expected):
    record = json.loads(expected["dataset.json"])
    assert record["model"] == teacher.model.name
    assert record["latent_shape"] == [48, 2, 2, 2]
    assert (record["count"], record["shards"]) == (5, 3)
    assert record["origin"]["seed"] == 7
    assert record["origin"]["settings"]["steps"] == 2
    assert record["origin"]["settings"]["solver"] == "euler"


def test_nothing_is_made_twice(teacher, tmp_path, expected):
    make(teacher, tmp_path)
    shard_path(tmp_path, 1).unlink()
    report = make(teacher, tmp_path)
    assert (report.made, report.found) == (2, 3)
    assert files(tmp_path) == expected


def test_workers_share_the_shards(teacher, tmp_path, expected):
    for rank, made in ((1, 2), (0, 3)):
        report = make(teacher, tmp_path, worker=Worker(rank, 2, rank))
        assert report.made == made
    assert files(tmp_path) == expected


@pytest.mark.parametrize("killed_at", [0, 4, 13])
def test_killed_and_run_again_gives_the_same_bits(teacher, tmp_path, expected, killed_at):
    """SIGKILL in the middle of a member of a shard; there are three members in a sample."""
    process = multiprocessing.get_context("fork").Process(
        target=_make_until_killed, args=(teacher, tmp_path, killed_at)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = files(tmp_path)
    assert any(name.endswith(".partial") for name in left)
    finished = [name for name in left if name.endswith(".tar")]
    assert len(finished) == killed_at // 6
    assert all(left[name] == expected[name] for name in finished)
    report = make(teacher, tmp_path)
    assert report.found == killed_at // 3, "samples that were whole are made again"
    assert files(tmp_path) == expected


def _make_until_killed(teacher: Pipeline, folder: Path, killed_at: int) -> None:
    add, members = tarfile.TarFile.addfile, iter(range(100))

    def add_or_die(self, member, content=None):
        if next(members) == killed_at:
            half = content.read(member.size // 2)
            self.fileobj.write(member.tobuf() + half)
            self.fileobj.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, member, content)

    tarfile.TarFile.addfile = add_or_die
    make(teacher, folder)


def test_a_cut_batch_ends_with_the_same_bits(teacher, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    make(teacher, whole, shard_size=5, batch=3)
    folder = tmp_path / "cut"
    add, members = tarfile.TarFile.addfile, iter(range(100))

    def full_disk(self, member, content=None):
        if next(members) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, member, content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*shard_000000.tar: no space left"):
        make(teacher, folder, shard_size=5, batch=3)
    assert not list(folder.glob("*.tar"))
    monkeypatch.undo()
    resolve, asked = teacher.resolve, []

    def note(request: GenerationRequest):
        asked.append(len(request.prompt))
        return resolve(request)

    monkeypatch.setattr(teacher, "resolve", note)
    assert make(teacher, folder, shard_size=5, batch=3).made == 4
    assert asked[1:] == [3, 2], "other batches give other last bits"  # the first: what to record
    assert files(folder) == files(whole)


def test_a_full_disk_keeps_finished_shards(teacher, tmp_path, expected, monkeypatch):
    add, members = tarfile.TarFile.addfile, iter(range(100))

    def full_disk(self, member, content=None):
        if next(members) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, member, content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make(teacher, tmp_path)
    assert [p.name for p in tmp_path.glob("*.tar")] == ["shard_000000.tar"]
    monkeypatch.undo()
    make(teacher, tmp_path)
    assert files(tmp_path) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 8}, "seed is 7, asked for 8"),
        ({"shard_size": 3}, "shard_size is 2, asked for 3; shards is 3, asked for 2"),
        ({"request": GenerationRequest((), width=32, height=32, frames=5, steps=3)}, "steps is 2"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(teacher, tmp_path, options, message):
    make(teacher, tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"another data set: .*{message}"):
        make(teacher, tmp_path, **options)
    assert files(tmp_path) == before


def test_image_to_video_with_its_conditions(models, tmp_path):
    i2v = tiny_diffusers_folder(models / "i2v", "i2v")
    teacher = Pipeline.from_pretrained(i2v, device="cpu")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    lines = [{"prompt": f"a {name} car", "image": f"{name}.png"} for name in ("red", "blue")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    synthesize(teacher, prompts, tmp_path / "data", request=REQUEST)
    batch = next(iter(LatentDataset(tmp_path / "data", teacher.model, batch=2)))
    assert batch.channels.shape == (2, 20, 2, 4, 4)
    assert batch.features.shape == (2, 5, 16)
    assert not torch.equal(*batch.channels.unbind())
    assert not torch.equal(*batch.features.unbind())
    with pytest.raises(ValueError, match="batch must be 1, got 2"):
        synthesize(teacher, prompts, tmp_path / "data", request=REQUEST, batch=2)
    with pytest.raises(ValueError, match="needs an image"):
        synthesize(teacher, PROMPTS, tmp_path / "other", request=REQUEST)
    assert not (tmp_path / "other").exists()


def test_images_of_any_shape_make_samples_of_one(models, tmp_path, monkeypatch):
    i2v = tiny_diffusers_folder(models / "i2v", "i2v")
    teacher = Pipeline.from_pretrained(i2v, device="cpu")
    sizes = {"32p": {"2:1": (64, 32), "1:1": (32, 32)}}
    monkeypatch.setattr(teacher, "model", replace(teacher.model, sizes=sizes))
    prompts = []
    for size in ((32, 64), (64, 32), (50, 50)):
        image = tmp_path / f"{size[0]}.png"
        Image.new("RGB", size).save(image)
        prompts.append(Prompt("a car", image))
    request = replace(REQUEST, width=None, height=None, steps=1)
    synthesize(teacher, prompts, tmp_path / "data", request=request)
    data = LatentDataset(tmp_path / "data", teacher.model, batch=3)
    next(iter(data))
    assert data.latent_shape == (16, 2, 4, 8)
    assert not data.skipped


def test_first_frame_models_keep_it_in_their_latents(teacher, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    prompts = [Prompt("a car", image=tmp_path / "red.png"), Prompt("a car")]
    with pytest.raises(ValueError, match="batch must be 1"):
        synthesize(teacher, prompts, tmp_path / "data", request=REQUEST, batch=2)
    synthesize(teacher, prompts, tmp_path / "data", request=REQUEST)
    data = LatentDataset(tmp_path / "data", teacher.model, batch=2)
    batch = next(iter(data))
    rows = dict(zip(batch.keys, batch.latents, strict=True))
    pixels = torch.tensor([200, 30, 30]).view(1, 3, 1, 1, 1) / 127.5 - 1
    first = teacher.vae.encode(pixels.expand(1, 3, 1, 32, 32))[0]
    assert torch.equal(rows[sample_key(0)][:, :1], first.bfloat16().float())
    assert not torch.equal(rows[sample_key(1)][:, :1], first.bfloat16().float())


# Prompts and processes.


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("p.csv", "a", ValueError, r"must end in .txt or .jsonl"),
        ("p.txt", None, FileNotFoundError, "prompt file not found"),
        ("p.txt", "\n# only a comment\n", ValueError, "has no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{', ValueError, "line 2: "),
        ("p.jsonl", '{"prompt": 3}', ValueError, "line 1: expected an object of texts"),
        ("p.jsonl", '["a"]', ValueError, "line 1: expected an object of texts"),
        ("p.jsonl", '{"prompt": "a", "seed": "3"}', ValueError, "unknown keys: seed; supported: p"),
        ("p.jsonl", '{"image": "a.png"}', ValueError, "there is no prompt"),
        ("p.jsonl", '{"prompt": "a", "image": "b.png"}', FileNotFoundError, "image not found: .*b"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_prompts(tmp_path / name)


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text(
        "\ufeffa cat\n\n  # no\n ein Fuchs über\u2028Schnee \r\n", "utf-8"
    )
    found = [prompt.text for prompt in read_prompts(tmp_path / "p.txt")]
    assert found == ["a cat", "ein Fuchs über\u2028Schnee"]


def test_worker_of_torchrun(monkeypatch):
    assert this_worker() == Worker()
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert this_worker() == Worker(), "torchrun did not start us"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    worker = this_worker()
    assert worker == Worker(5, 8, 1)
    assert worker.device("cuda") == "cuda:1"
    assert worker.device("cuda:3") == "cuda:3"
    assert worker.device("cpu") == "cpu"
    assert Worker().device("cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker.device(None) == "cuda:1"
    assert Worker().device(None) is None


# The command.


def test_command(teacher, models, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\n".join(prompt.text for prompt in PROMPTS))
    arguments = {
        "prompts": str(tmp_path / "p.txt"),
        "output": tmp_path / "data",
        "model": str(models / "tiny"),
        "size": "32*32",
        "frames": 5,
        "steps": 2,
        "shard_size": 2,
        "seed": 7,
        "device": "cpu",
    }
    Synthesize(**arguments).run()
    out, err = capsys.readouterr()
    assert "samples" in err, "no progress shown"
    assert "5 samples" in out
    Synthesize(**arguments, json=True).run()
    result = json.loads(capsys.readouterr().out)
    assert (result["made"], result["found"]) == (0, 5)
    assert len(list((tmp_path / "data").glob("*.tar"))) == 3


def parse(*arguments: str) -> Synthesize:
    return tyro.cli(Synthesize, args=arguments, config=(FlagCreatePairsOff,))


def test_flags(capsys):
    command = parse("--prompts", "p.txt", "-o", "data", "--batch", "4", "--json")
    assert (command.output, command.batch, command.json) == (Path("data"), 4, True)
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in Synthesize.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    with pytest.raises(SystemExit) as end:
        parse("--prompts", "p.txt")
    assert end.value.code == 2


def test_defaults_are_the_published_ones():
    request = parse("--prompts", "p.txt", "-o", "data")._request()
    assert (request.solver, request.steps, request.shift, request.guidance) == ("euler", 100, 3, 5)


def test_spriteworld_prompts_are_training_captions():
    prompts = Synthesize(prompts="spriteworld:3", output=Path("x"))._prompts()
    assert prompts == [Prompt(scene(clip).caption) for clip in range(3)]
    for wrong in ("0", "-1", "x", "", str(HELD_OUT + 1)):
        with pytest.raises(ValueError, match="takes N from 1 to 1,000,000,000"):
            Synthesize(prompts=f"spriteworld:{wrong}", output=Path("x"))._prompts()


def test_only_the_first_worker_shows_progress(capsys):
    for rank in (0, 1):
        with WorkerBars(Worker(rank, 2, rank)) as bars:
            bars("samples", 1, 2)
        assert ("samples" in capsys.readouterr().err) == (rank == 0)


def test_bad_numbers(teacher, tmp_path):
    for options, message in (
        ({"shard_size": 0}, "must be positive, got 0 and 1"),
        ({"batch": 0}, "must be positive, got 2 and 0"),
        ({"seed": -1}, "the seed must be from 0 to"),
        ({"seed": 2**31}, "the seed must be from 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            make(teacher, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()
    assert DatasetInfo.load(tmp_path) is None


def test_a_solver_does_not_sample_a_distilled_model(tmp_path):
    """It would take the model's big steps for a flow, and the data would be wrong."""
    student = Pipeline.from_pretrained("spritewan", device="cpu")
    with pytest.raises(ValueError, match="distilled for the few-step sampler, got solver euler"):
        make(student, tmp_path / "data")
    assert not (tmp_path / "data").exists()
