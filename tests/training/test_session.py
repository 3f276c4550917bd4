"""What a run does beside its losses: updates, averages, files; killed; in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from tests.training.small_run import new_state
from tests.training.tiny_training import (
    column,
    keys_of,
    log_of,
    one_of_two_fails,
    rcm_config,
    resumable,
    sla_config,
    tiny_teacher,
    train,
    two_processes,
    weights,
)
from torch.multiprocessing import ProcessRaisedException

from turbodit.checkpoints import load_transformer
from turbodit.config import preset
from turbodit.distributed import join, leave
from turbodit.training.config import SLAConfig
from turbodit.training.session import Session
from turbodit.training.setup import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def teacher(folder):
    return tiny_teacher(folder)


@pytest.fixture(scope="module")
def two_experts(folder):
    return tiny_teacher(folder, "t2v-a14b")


# Updates, one by one


@pytest.fixture
def session(tmp_path):
    """A function from changes of the configuration to a session of a small model's run."""
    mesh = join("cpu")
    opened = []

    def open_session(preview=None, **changes) -> Session:
        config = SLAConfig(**{"model": "", "out": tmp_path, "steps": 6, **changes})
        run = Run(config, mesh, None, preset("spritewan"), torch.float32, tmp_path, (0.0, 1.0))
        opened.append(Session(run, new_state(mesh), preview))
        return opened[-1]

    yield open_session
    for one in opened:
        one.__exit__(None, None, None)
    leave()


def with_gradient(session: Session, value: float) -> torch.nn.Module:
    """The student; one element of one gradient is `value`, the other ones are zero."""
    model = session.state.models["student"]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.head.head.bias.grad[0] = value
    return model


def copied(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(session, value):
    one = session()
    model, average = with_gradient(one, 1.0), one.state.averages["0.1"]
    one.update("student", average_step=0)
    before = copied(model.state_dict())
    moments = copied(one.state.optimizers["student"].state[model.head.head.bias])
    averaged = copied(average.state_dict())
    with_gradient(one, value)
    one.update("student", average_step=1)
    after = one.state.optimizers["student"].state[model.head.head.bias]
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(torch.equal(moments[name], x) for name, x in after.items())
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor, averaged[name])
    assert all(p.grad is None for p in model.parameters())
    taken = one.metrics.take()
    assert taken["student_skipped"] == 0.5 and taken["nan/student_gradient_norm"] == 1
    assert taken["student_gradient_norm"] == 1.0


@pytest.mark.parametrize(("longest", "step"), [(None, 6.0), (2.0, 2.0), (10.0, 6.0)])
def test_long_gradients_are_shortened(session, longest, step):
    one = session(max_grad_norm=longest)
    one.state.optimizers = {"student": torch.optim.SGD(one.state.models["student"].parameters(), 1)}
    model = with_gradient(one, 6.0)
    before = model.head.head.bias.detach().clone()
    one.update("student")
    moved = before - model.head.head.bias.detach()
    assert moved[0].item() == pytest.approx(step) and not moved[1:].any()
    assert one.metrics.take()["student_gradient_norm"] == 6.0, "that of before"


def test_averages_follow_where_they_are_asked_to(session):
    one = session()
    average = one.state.averages["0.1"]
    start = average.state_dict()["head.head.bias"].clone()
    model = with_gradient(one, 1.0)
    one.update("student")
    assert torch.equal(average.state_dict()["head.head.bias"], start)
    with_gradient(one, 1.0)
    one.update("student", average_step=0)
    assert torch.equal(average.state_dict()["head.head.bias"], model.head.head.bias)


def test_what_falls_due(session, tmp_path):
    """Of seven updates: every second one is told, every third saved, every fourth shown, and the
    last one always."""
    shown = []
    one = session(
        lambda log, state: shown.append(state.step),
        steps=7,
        log_every=2,
        save_every=3,
        sample_every=4,
        keep=9,
    )
    with one:
        while one.unfinished:
            one.metrics.add("loss", float(one.step))
            one.advance()
    config = SLAConfig(model="", out=tmp_path)
    assert [entry["step"] for entry in log_of(config)] == [2, 4, 6, 7]
    assert column(config, "loss") == [0.5, 2.5, 4.5, 6.0]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == [f"step-0000000{step}" for step in (3, 6, 7)]
    assert shown == [4, 7]


def test_time_is_up_at_a_log_entry_and_all_is_saved(session, tmp_path):
    shown = []
    one = session(
        lambda log, state: shown.append(state.step),
        steps=100,
        log_every=3,
        save_every=50,
        sample_every=50,
        minutes=1e-9,
    )
    with one:
        while one.unfinished:
            one.advance()
    assert one.step == 3 and shown == [3]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_no_samples_unless_they_are_wanted(session):
    one = session(lambda *_: pytest.fail("nobody asked"), steps=1, sample_every=None)
    with one:
        one.advance()
    assert not one.unfinished


def test_export_leaves_the_weights_as_they_are(session, tmp_path):
    """It writes the first average, in bfloat16; without one, the weights."""
    one = session()
    with torch.no_grad():
        for tensor in one.state.averages["0.1"].state_dict().values():
            tensor.fill_(0.25)
    before = copied(one.state.models["student"].state_dict())
    one.export({"attention": "sla"})
    after = one.state.models["student"].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all((x == 0.25).all() for x in weights(tmp_path / "transformer").values())
    one.state.averages = {}
    one.export({"attention": "sla"})
    for name, tensor in weights(tmp_path / "transformer").items():
        torch.testing.assert_close(tensor, before[name], rtol=2**-8, atol=0)


# Killed


@pytest.fixture(scope="module")
def killed(folder, teacher):
    """Both methods, killed while they wrote the checkpoint of step 4, then run to their end."""
    command = [sys.executable, "-m", "tests.training.tiny_training"]
    arguments = [teacher["model"], *teacher["data"], str(folder / "killed")]
    found = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return folder / "killed"


@pytest.mark.parametrize("method", [0, 1], ids=["sla", "rcm"])
def test_killed_and_started_again_goes_on_bit_by_bit(folder, teacher, killed, method):
    """Losses, gradient norms and, at the end, the weights' first average."""
    whole = resumable(teacher, folder / "whole")[method]
    train(whole)
    again = resumable(teacher, killed)[method]
    assert (again.out / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert (again.out / "checkpoints" / ".step-00000004.partial").exists()
    told = len(log_of(again))
    assert told >= 4 and not (again.out / "transformer").exists()
    train(again)
    assert log_of(again)[told:] == log_of(whole)[2:]
    assert log_of(again)[:4] == log_of(whole)[:4]
    if method == 1:
        assert len(column(again, "fake_loss")) > 1, "no fake score to go on with"
    found, wanted = weights(again.out / "transformer"), weights(whole.out / "transformer")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# In two processes

ALIKE = ("sla-shard", "sla-context", "scm-shard", "scm-context", "experts-shard")
TOLD = {  # of each update, or of each that it belongs to
    "sla": ("loss", "student_gradient_norm"),
    "scm": ("scm_tangent_norm", "student_gradient_norm"),
    "experts": (
        "scm_tangent_norm",
        "dmd_distance",
        "student_gradient_norm",
        "fake_loss",
        "fake_gradient_norm",
    ),
}


def cases(teacher, two_experts, out: Path) -> dict[str, tuple]:
    sla, scm = {"steps": 2, "lr": 1e-2}, {"steps": 2, "method": "scm", "warmup": 0}
    # Mostly the high-noise expert's times, so that roll-outs pass without a gradient through the
    # one that has a gradient already; the average is exported after the fake score's update.
    experts = {"steps": 6, "warmup": 0, "p_mean": 3.0, "ema": (0.1,)}
    # The released variant's map is found from all tokens: 96, six blocks of 16.
    return {
        "sla-shard": (sla_config(teacher, out / "sla-shard", shard=2, **sla), True),
        "sla-context": (sla_config(teacher, out / "sla-context", context=2, **sla), False),
        "scm-shard": (rcm_config(teacher, out / "scm-shard", shard=2, **scm), True),
        "scm-context": (rcm_config(teacher, out / "scm-context", context=2, **scm), False),
        "experts-shard": (
            rcm_config(two_experts, out / "experts-shard", shard=2, **experts),
            True,
        ),
        "rcm": (rcm_config(teacher, out / "rcm", replicate=2, ema=(0.1,)), False),
    }


@pytest.fixture(scope="module")
def together(folder, teacher, two_experts):
    out = folder / "together"
    out.mkdir()
    runs = cases(teacher, two_experts, out)
    two_processes(out, runs)
    return SimpleNamespace(folder=out, configs={name: config for name, (config, _) in runs.items()})


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one_does(folder, teacher, two_experts, together, name):
    """With a shard each, of one batch both see; with half the tokens each."""
    alone = cases(teacher, two_experts, folder / "alone")[name][0]
    alone = type(alone)(**{**vars(alone), "shard": None, "context": 1})
    train(alone)
    config = together.configs[name]
    for told in TOLD[name.partition("-")[0]]:
        found, wanted = column(config, told), column(alone, told)
        assert len(wanted) > 1 and found == pytest.approx(wanted, rel=2e-4), told
    assert not any(column(config, "student_skipped"))
    folders = [path.name for path in alone.out.glob("transformer*")]
    assert len(folders) == (2 if name.startswith("experts") else 1)
    for folder in folders:
        found, wanted = weights(config.out / folder), weights(alone.out / folder)
        for parameter, tensor in wanted.items():
            # An update of AdamW is the rate's size also where a gradient is hardly more than
            # rounding.
            difference = (found[parameter] - tensor).abs()
            assert difference.median() <= 2e-3, parameter


def test_processes_have_their_own_samples_unless_they_share_the_tokens(together):
    first, second = (keys_of(together.folder, "rcm", rank)[:2] for rank in (0, 1))
    for own, other in zip(first, second, strict=True):
        assert len({*own, *other}) == 4
    first, second = (keys_of(together.folder, "sla-context", rank)[:2] for rank in (0, 1))
    assert first == second


def test_all_of_rcm_in_two_processes(together):
    config = together.configs["rcm"]
    entries = log_of(config)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all("nan/" not in name for entry in entries for name in entry)
    assert "dmd_distance" in entries[2] and "fake_loss" in entries[3]
    assert load_transformer(config.out / "transformer") is not None


def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path, teacher):
    """After a checkpoint, in which all meet: the others are in the middle of an update."""
    config = sla_config(teacher, tmp_path / "run", steps=6, save_every=2)
    with pytest.raises(ProcessRaisedException, match="one process fails"):
        one_of_two_fails(tmp_path, config)


def test_two_runs_do_not_share_a_folder(tmp_path, teacher):
    config = sla_config(teacher, tmp_path, steps=1)
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another run is writing"):
        train(config)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        train(sla_config(teacher, tmp_path / "file"))


def test_a_run_that_has_diverged_ends(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("turbodit.training.session.MOST_SKIPPED", 2)
    config = sla_config(teacher, tmp_path, steps=9, lr=1e30)
    with pytest.raises(FloatingPointError, match="student is nan, for 2 updates in a row"):
        train(config)
    assert not (tmp_path / "transformer").exists()
