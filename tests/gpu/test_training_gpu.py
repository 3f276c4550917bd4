"""Trainings of the embedded model on one GPU and on two: kernels, compiled blocks, tangents."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CODE = "import sys; from turbodit.cli import main; sys.exit(main())"
# As many updates as show that weights change; the first is that of the same weights everywhere.
UPDATES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    from turbodit.spritewan.shards import write_clips

    folder = tmp_path_factory.mktemp("sprites") / "data"
    write_clips(folder, 16)
    return str(folder)


def train(
    data: str, out: Path, method: str, *flags: str, processes: int = 1
) -> list[dict[str, Any]]:
    """The log of a training in processes of its own."""
    command = [sys.executable, "-c", CODE]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(processes), "--no-python", *command]
    command += ["train", method, "--recipe", "spritewan", "--data", data, "--out", str(out)]
    command += ["--steps", str(UPDATES), "--log-every", "1", "--device", "cuda", *flags]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    assert (out / "transformer" / "config.json").exists()
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(entries) == UPDATES
    return entries


def values(entries: list[dict[str, Any]], name: str) -> list[float]:
    found = [entry[name] for entry in entries if name in entry]
    assert found and all(math.isfinite(value) for value in found), (name, found)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--checkpointing", "block"),
        ("--checkpointing", "selective"),
        ("--temporal-heads", "chosen"),
    ],
)
def test_sla_is_that_of_the_references(data: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """At a ratio of 1 and with a linear branch of zeros the student is the teacher at first."""
    flags = ("--batch", "4", *flags)
    same = values(train(data, tmp_path / "same", "sla", "--ratio", "1", *flags), "loss")
    assert 0 <= same[0] < 1e-3
    sparse = values(train(data, tmp_path / "sparse", "sla", *flags), "loss")
    assert 0.02 < sparse[0] < 1 and len(set(sparse)) == UPDATES


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["rcm", "scm", "dmd", "dcm"])
def test_distillation_runs_and_stays_finite(data: str, tmp_path: Path, method: str) -> None:
    flags = ("--method", method, "--warmup", "1", "--student-every", "2", "--batch", "4")
    entries = train(data, tmp_path / "gpu", "rcm", *flags)
    names = {"rcm": ("scm_loss", "fake_loss"), "scm": ("scm_loss",), "dcm": ("dcm_loss",)}
    for name in names.get(method, ("fake_loss", "dmd_distance")):
        values(entries, name)
    assert all(entry.get("student_skipped", 0) == 0 for entry in entries)


@pytest.mark.gpu
def test_distillation_of_a_sparse_student(data: str, tmp_path: Path) -> None:
    """What SLA has tuned goes on under tangents and through roll-outs."""
    train(data, tmp_path / "sla", "sla", "--batch", "4", "--temporal-heads", "chosen")
    flags = ("--student", str(tmp_path / "sla" / "transformer"), "--joint-ratio", "0.1")
    flags = (*flags, "--warmup", "1", "--student-every", "2", "--batch", "4")
    entries = train(data, tmp_path / "rcm", "rcm", *flags)
    values(entries, "scm_tangent_norm")
    values(entries, "dmd_distance")


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("method", "told"), [("sla", "loss"), ("scm", "scm_tangent_norm")], ids=["sla", "scm"]
)
def test_two_gpus_that_share_tokens_train_as_one(
    data: str, tmp_path: Path, method: str, told: str
) -> None:
    """FSDP2 and Ulysses: the same samples and noise, so the same numbers but for rounding."""
    flags = ("--batch", "4", "--image-share", "0")
    if method == "scm":
        flags = (*flags, "--method", "scm", "--warmup", "0")
    command = "sla" if method == "sla" else "rcm"
    one = values(train(data, tmp_path / "one", command, *flags), told)
    two = train(data, tmp_path / "two", command, "--context", "2", *flags, processes=2)
    assert values(two, told) == pytest.approx(one, rel=0.03)


@pytest.mark.multi_gpu
def test_two_gpus_with_a_shard_each_distil(data: str, tmp_path: Path) -> None:
    flags = ("--warmup", "1", "--student-every", "2", "--batch", "4", "--shard", "2")
    entries = train(data, tmp_path / "two", "rcm", *flags, processes=2)
    values(entries, "scm_loss")
    values(entries, "fake_loss")
