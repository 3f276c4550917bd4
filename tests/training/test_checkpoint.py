"""Runs that stop in the worst moments, and go on as if nothing had happened."""

from __future__ import annotations

import errno
import pickle
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from tests.checkpoints.small_disk import files_of_at_most
from tests.training.small_run import go_on, new_state, reshard, run, update, whole

from turbodit.checkpoints import load_transformer
from turbodit.checkpoints.transformer import stated_use
from turbodit.distributed import join, leave
from turbodit.training.checkpoint import Checkpoints, TrainState, export_transformer
from turbodit.training.parameters import LoRA, select_trainable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mesh():
    yield join("cpu")
    leave()


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return whole(state.models["student"].state_dict())


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **limits) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **(limits or {"rtol": 0, "atol": 0}))


def test_killed_while_saving_and_resumed_gives_the_same_losses(tmp_path):
    uninterrupted = run(tmp_path / "whole", steps=9)
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.training.small_run", str(folder)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "latest").read_text() == "step-00000003\n"
    assert (folder / ".step-00000006.partial").exists()  # killed in it
    assert run(folder, steps=9) == uninterrupted[3:]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step-00000006", "step-00000009"]
    assert run(folder, steps=9) == []


def test_full_disk_keeps_the_last_good_one(tmp_path, mesh):
    state = new_state(mesh)
    checkpoints = Checkpoints(tmp_path / "run", mesh)
    update(state, mesh)
    checkpoints.save(state)
    checkpoints.wait()
    good = weights(state)
    update(state, mesh)
    # The small file of each process fits, the weights don't.
    with files_of_at_most(40_000):
        checkpoints.save(state)
        with pytest.raises(OSError, match=r"last complete is .*step-00000001") as error:
            checkpoints.wait()
    assert error.value.errno == errno.EFBIG
    assert [path.name for path in checkpoints.folder.glob("*step*")] == ["step-00000001"]
    fresh = new_state(mesh, seed=1)
    assert checkpoints.load(fresh)
    assert_same(weights(fresh), good)
    checkpoints.save(state)  # there is room again
    checkpoints.close()
    assert checkpoints.latest == checkpoints.folder / "step-00000002"


def test_what_is_saved_is_the_state_of_that_moment(tmp_path, mesh):
    state = new_state(mesh)
    update(state, mesh)
    checkpoints = Checkpoints(tmp_path, mesh)
    wanted = weights(state)
    moment = state.optimizers["student"].state_dict()["state"][0]["exp_avg"].clone()
    checkpoints.save(state)
    with torch.no_grad():
        for p in state.models["student"].parameters():
            p.zero_()
        state.optimizers["student"].state_dict()["state"][0]["exp_avg"].zero_()
    checkpoints.close()
    fresh = new_state(mesh, seed=1)
    assert Checkpoints(tmp_path, mesh).load(fresh)
    assert_same(weights(fresh), wanted)
    found = fresh.optimizers["student"].state_dict()["state"][0]["exp_avg"]
    assert torch.equal(found, moment)


def test_an_optimizer_goes_on_at_the_rate_of_now(tmp_path, mesh):
    state = new_state(mesh)
    update(state, mesh)
    checkpoints = Checkpoints(tmp_path, mesh)
    checkpoints.save(state)
    checkpoints.close()
    fresh = new_state(mesh, seed=1)
    fresh.optimizers["student"].param_groups[0]["lr"] = 1e-30
    assert checkpoints.load(fresh)
    update(fresh, mesh)
    assert_same(weights(fresh), weights(state))
    assert fresh.optimizers["student"].state_dict()["state"][0]["step"] == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_content(path: Path) -> None:
    content = BytesIO()
    torch.save({"mesh": [1, 1]}, content)
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rank-00000.pt"])
@pytest.mark.parametrize("harm", [truncate, Path.unlink, empty, replace_content])
def test_a_damaged_checkpoint_says_so(tmp_path, mesh, name, harm):
    checkpoints, state = Checkpoints(tmp_path, mesh), new_state(mesh)
    for step in (1, 2):
        state.step = step
        checkpoints.save(state)
    checkpoints.close()
    harm(tmp_path / "step-00000002" / name)
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .*step-00000001") as error:
        checkpoints.load(new_state(mesh))
    assert "\n" not in str(error.value)
    (tmp_path / "latest").write_text("step-00000001")
    assert checkpoints.load(new_state(mesh))


def test_too_little_memory_is_no_damage(tmp_path, mesh, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, mesh), new_state(mesh)
    checkpoints.save(state)
    checkpoints.close()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("turbodit.training.checkpoint.dcp.load", fail)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints.load(state)


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("name", [".metadata", "rank-00000.pt"])
def test_a_checkpoint_cannot_run_code(tmp_path, mesh, name):
    checkpoints, state = Checkpoints(tmp_path / "run", mesh), new_state(mesh)
    checkpoints.save(state)
    checkpoints.close()
    evil = Evil(tmp_path / "harm")
    if name == ".metadata":
        (checkpoints.latest / name).write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, checkpoints.latest / name)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.load(state)
    assert not (tmp_path / "harm").exists()


def test_what_names_no_checkpoint(tmp_path, mesh):
    (tmp_path / "latest").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="expected a name"):
        Checkpoints(tmp_path, mesh).load(new_state(mesh))


def test_weights_that_are_not_finite_are_not_exported(tmp_path, mesh):
    model = new_state(mesh).models["student"]
    with torch.no_grad():
        model.blocks[0].ffn[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0\.weight has values that are not fin"):
        export_transformer(model, tmp_path / "out", mesh)
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_ones_are_kept(tmp_path, mesh):
    state = new_state(mesh)
    checkpoints = Checkpoints(tmp_path, mesh, keep=2)
    for step in (5, 6, 6, 7):
        state.step = step
        checkpoints.save(state)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000006",
        "step-00000007",
    ]


def test_a_checkpoint_that_never_became_the_latest_is_replaced(tmp_path, mesh):
    state = new_state(mesh)
    state.step = 4
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "rest").touch()
    checkpoints = Checkpoints(tmp_path, mesh)
    assert checkpoints.latest is None
    assert not checkpoints.load(state)
    checkpoints.save(state)
    checkpoints.close()
    assert checkpoints.load(state)
    assert not (tmp_path / "step-00000004" / "rest").exists()


def test_errors_say_what_does_not_fit(tmp_path, mesh):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, mesh, keep=0)
    state = new_state(mesh)
    checkpoints = Checkpoints(tmp_path, mesh)
    checkpoints.save(state)
    checkpoints.close()
    other = new_state(mesh)
    other.averages = {"0.1": state.averages["0.1"]}
    with pytest.raises(ValueError, match=r"nothing here takes averages\.0\.2\.blocks"):
        checkpoints.load(other)
    other.averages = {**state.averages, "0.05": state.averages["0.1"]}
    with pytest.raises(ValueError, match=r"it has no averages\.0\.05\.blocks"):
        checkpoints.load(other)
    other.averages = state.averages
    other.optimizers = state.optimizers
    with pytest.raises(ValueError, match="make it after the model"):
        checkpoints.load(other)
    other.identity = {"method": "rcm"}
    with pytest.raises(ValueError, match=r"another run: method is rcm and was None"):
        checkpoints.load(other)
    state.step, state.data.position = 1, Path("of no plain type")
    with pytest.raises(ValueError, match="position in the data must be made of"):
        checkpoints.save(state)
    (tmp_path / "latest").write_text("step-7")
    with pytest.raises(FileNotFoundError, match="step-7"):
        checkpoints.load(state)


def test_another_number_of_processes(tmp_path):
    """One saves, two load and go on, and save; one loads and goes on."""
    mesh = join("cpu")
    state = new_state(mesh)
    for _ in range(2):
        update(state, mesh, draws=False)
    checkpoints = Checkpoints(tmp_path / "one", mesh)
    checkpoints.save(state)
    checkpoints.close()
    torch.rand(5, generator=state.common["sides"])  # after what is saved
    state.data.position = 0  # as readers start anew
    update(state, mesh, draws=False)
    once = {"weights": weights(state), "average": whole(state.averages["0.2"].state_dict())}
    reshard(tmp_path)
    # float32 sums over two halves of a batch, against sums over all of it
    limits = {"rtol": 1e-4, "atol": 1e-5}
    told = [torch.load(tmp_path / f"told-{rank}.pt") for rank in (0, 1)]
    for one in told:
        assert (one["found"], one["step"], one["position"]) == (True, 2, 0)
        assert_same(one["weights"], once["weights"], **limits)
        assert_same(one["average"], once["average"], **limits)
    assert told[0]["draw"] != told[1]["draw"]
    first = torch.rand((), generator=torch.Generator().manual_seed(0))
    assert told[0]["common"] == told[1]["common"] == first

    state.data.position = 0
    update(state, mesh, draws=False)
    with pytest.warns(UserWarning, match="of 2 data x 1 context processes, now there are 1 x 1"):
        again = go_on(tmp_path / "two", mesh)
    assert again["step"] == 3
    assert_same(again["weights"], weights(state), **limits)
    leave()

    exported = load_transformer(
        tmp_path / "average",
        dtype=torch.float32,
        attention="sla",
        attention_settings={"block_q": 16, "block_k": 16},
    )
    assert_same(exported.state_dict(), told[0]["average"])
    half = load_transformer(tmp_path / "exported", attention="sla").state_dict()
    rounded = {n: told[0]["weights"][n].to(half[n].dtype) for n in half}
    assert_same(half, rounded)
    assert half["blocks.0.ffn.0.weight"].dtype == torch.bfloat16


def test_an_export_says_how_it_is_used(tmp_path, mesh):
    model = new_state(mesh).models["student"]
    stated = {"attention": "sla", "attention_settings": {"ratio": 0.2}, "sampling": {"steps": 4}}
    export_transformer(model, tmp_path / "out", mesh, torch.float32, stated)
    assert stated_use(tmp_path / "out") == stated
    export_transformer(model, tmp_path / "plain", mesh)
    assert stated_use(tmp_path / "plain") == {}
    with pytest.raises(ValueError, match=r"to be exported: sampling has no speed; supported: ste"):
        export_transformer(model, tmp_path / "bad", mesh, stated={"sampling": {"speed": 4}})
    assert not (tmp_path / "bad").exists()


def test_a_model_with_a_lora_is_not_exported(tmp_path, mesh):
    model = new_state(mesh).models["student"]
    select_trainable(model, LoRA(rank=2))
    with pytest.raises(ValueError, match=r"has a LoRA beside its weights .*merge it first"):
        export_transformer(model, tmp_path / "out", mesh)
    assert not (tmp_path / "out").exists()
