"""SLA fine-tuning of tiny random teachers, whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file
from tests.training.tiny_training import (
    column,
    log_of,
    only_logs,
    rcm_config,
    sla_config,
    spy,
    tiny_teacher,
    weights,
)

from turbodit.attention import SparseLinearAttention
from turbodit.checkpoints import load_transformer
from turbodit.model.wan import WanModel
from turbodit.noise_schedule import few_step_times
from turbodit.training import losses, rcm, sla
from turbodit.training.data import LatentDataset, reader
from turbodit.training.data.shards import BrokenSample, sample_key
from turbodit.training.setup import Run

LINEAR_BRANCH = "proj_l"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture(scope="module")
def teacher(folder):
    return tiny_teacher(folder)


@pytest.fixture(scope="module")
def ti2v(folder):
    return tiny_teacher(folder, "ti2v")


@pytest.fixture(scope="module")
def two_experts(folder):
    return tiny_teacher(folder, "t2v-a14b")


@pytest.fixture
def logs(monkeypatch) -> None:
    """For tests that look at nothing else."""
    only_logs(monkeypatch)


def rounded(folder: Path) -> dict[str, torch.Tensor]:
    """A teacher's weights as an export stores them."""
    model = load_transformer(folder, dtype=torch.bfloat16)
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def is_student(model: WanModel) -> bool:
    return any(isinstance(module, SparseLinearAttention) for module in model.modules())


@pytest.mark.parametrize(("objective", "share"), [("white-box", 0.6), ("black-box", 0.9)])
def test_the_loss_falls(logs, teacher, tmp_path, objective, share):
    """The same samples each time, at nearly one time. Data that are noise can't be told from
    it, so that the black-box loss falls to 2 at best."""
    config = sla_config(
        teacher, tmp_path, objective=objective, steps=20, batch=4, lr=1e-2, p_mean=0.0, p_std=0.01
    )
    sla.train(config)
    found = column(config, "loss")
    assert len(found) == 20
    assert mean(found[-5:]) < share * mean(found[:5])


def test_with_all_blocks_and_no_linear_branch_it_is_the_teacher(logs, teacher, tmp_path):
    same = sla_config(teacher, tmp_path / "all", ratio=1.0, steps=1)
    sparse = sla_config(teacher, tmp_path / "tenth", ratio=0.1, steps=1)
    sla.train(same)
    sla.train(sparse)
    assert column(same, "loss")[0] < 1e-9
    assert column(sparse, "loss")[0] > 1e-4


@pytest.mark.parametrize("master", [True, False])
def test_bfloat16_products_find_nearly_the_same(logs, teacher, tmp_path, monkeypatch, master):
    """Master weights are float32; without them only what Wan keeps so is."""
    dtypes = []
    adamw = Run.adamw

    def noted(self, parameters, lr):
        optimizer = adamw(self, parameters, lr)
        dtypes.extend(p.dtype for p in optimizer.param_groups[0]["params"])
        return optimizer

    exact = sla_config(teacher, tmp_path / "float32", steps=1)
    sla.train(exact)
    monkeypatch.setattr(Run, "adamw", noted)
    half = sla_config(teacher, tmp_path / "half", dtype="bfloat16", master_weights=master, steps=1)
    sla.train(half)
    for told in ("loss", "student_gradient_norm"):
        assert column(half, told) == pytest.approx(column(exact, told), rel=0.03)
        assert column(half, told) != column(exact, told)
    assert set(dtypes) == ({torch.float32} if master else {torch.float32, torch.bfloat16})


def test_black_box_asks_no_teacher(logs, teacher, tmp_path, monkeypatch):
    frozen = spy(monkeypatch, Run, "frozen")
    asked = spy(monkeypatch, WanModel, "forward")
    config = sla_config(teacher, tmp_path, objective="black-box", ratio=1.0, steps=1)
    sla.train(config)
    assert not frozen and len(asked) == 1
    # With all blocks kept it is the teacher, whose velocity is random: ||noise - x0||^2 is 2.
    assert column(config, "loss")[0] > 1.5


PARTS = {
    "full": lambda name: True,
    "attention": lambda name: ".self_attn." in name,
    "proj_l": lambda name: LINEAR_BRANCH in name,
}


@pytest.mark.parametrize("part", PARTS)
def test_only_what_was_asked_for_changes(teacher, tmp_path, part):
    sla.train(sla_config(teacher, tmp_path, train=part, lr=1e-2, steps=2, weight_decay=0.0))
    found, before = (
        weights(tmp_path / "transformer"),
        rounded(Path(teacher["model"], "transformer")),
    )
    branch = {name for name in found if LINEAR_BRANCH in name}
    assert found.keys() == before.keys() | branch and len(branch) == 4
    for name, tensor in found.items():
        changed = not torch.equal(tensor, before.get(name, torch.zeros_like(tensor)))
        assert changed == PARTS[part](name), name


def test_lora_leaves_the_model_and_writes_what_it_learned(teacher, tmp_path):
    config = sla_config(teacher, tmp_path, train="lora", lora_rank=3, lr=1e-2, steps=2)
    sla.train(config)
    assert not (tmp_path / "transformer").exists()
    found = load_file(tmp_path / "lora.safetensors")
    ups = [tensor for name, tensor in found.items() if "lora_B" in name]
    assert ups and all(tensor.shape[1] == 3 and tensor.any() for tensor in ups)
    branch = [tensor for name, tensor in found.items() if LINEAR_BRANCH in name]
    assert len(branch) == 4 and all(tensor.any() for tensor in branch)
    assert "attn1.to_q.lora_A.weight" in " ".join(found)


def test_the_ratio_goes_down(logs, teacher, tmp_path, monkeypatch):
    """Six key blocks; both layers of the student keep what the step's ratio says."""
    kept = []
    choose = SparseLinearAttention.block_indices

    def noted(self, q, k):
        indices = choose(self, q, k)
        kept.append(indices.shape[-1])
        return indices

    monkeypatch.setattr(SparseLinearAttention, "block_indices", noted)
    sla.train(sla_config(teacher, tmp_path, steps=6, first_ratio=1.0, ratio=0.2, ratio_steps=4))
    assert kept == [blocks for blocks in (6, 4, 3, 2, 1, 1) for _ in range(2)]


def heads_of(folder: Path) -> list[list[int]]:
    """What an export states, with which it loads."""
    settings = json.loads((folder / "config.json").read_text())["attention_settings"]
    model = load_transformer(folder, attention="sla", attention_settings=settings)
    found = [list(block.self_attn.attn_op.temporal_heads) for block in model.blocks]
    assert is_student(model) and found == settings["temporal_heads"]
    return found


def test_temporal_heads_are_stated(teacher, tmp_path):
    sla.train(sla_config(teacher, tmp_path, ratio=0.3, temporal_heads="all", steps=1))
    heads = heads_of(tmp_path / "transformer")
    assert len(heads) == 2 and all(its == list(range(len(its))) and its for its in heads)


def test_chosen_heads_leave_out_less_and_stay(teacher, tmp_path, monkeypatch):
    losses_of = {}
    for heads in ("none", "all", "chosen"):
        config = sla_config(teacher, tmp_path / heads, ratio=0.2, temporal_heads=heads, steps=1)
        sla.train(config)
        losses_of[heads] = column(config, "loss")[0]
    chosen = heads_of(tmp_path / "chosen" / "transformer")
    assert any(chosen), "or the test would show nothing"
    assert losses_of["chosen"] < max(losses_of["none"], losses_of["all"])
    asked = spy(monkeypatch, sla, "choose_temporal_heads")
    sla.train(replace(config, steps=2))
    assert not asked and heads_of(tmp_path / "chosen" / "transformer") == chosen
    student = tmp_path / "chosen" / "transformer"
    sla.train(sla_config(teacher, tmp_path / "next", student=student, steps=1))
    assert heads_of(tmp_path / "next" / "transformer") == chosen
    for damage, message in (("[[0", "without this file"), ("[[0]]", "of 1 layers")):
        (tmp_path / "chosen" / "temporal_heads.json").write_text(damage)
        with pytest.raises(ValueError, match=rf"temporal_heads\.json: .*{message}"):
            sla.train(replace(config, steps=3))


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_what_is_exported_says_how_it_attends(teacher, tmp_path, variant):
    sla.train(sla_config(teacher, tmp_path, ratio=0.3, variant=variant, steps=1))
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["attention"] == "sla"
    expected = {"ratio": 0.3, "variant": variant, "block_q": 16, "block_k": 16}
    assert config["attention_settings"] == expected
    model = load_transformer(tmp_path / "transformer", attention="sla", attention_settings=expected)
    assert is_student(model)
    with pytest.raises(ValueError, match="trained with sparse-linear attention"):
        load_transformer(tmp_path / "transformer")


def test_the_first_average_is_exported(teacher, tmp_path):
    """After one update an average is the weights themselves, after more it lags behind."""
    for steps, same in ((1, True), (4, False)):
        for name, ema in (("average", (0.25,)), ("weights", ())):
            out = tmp_path / f"{steps}-{name}"
            sla.train(sla_config(teacher, out, steps=steps, ema=ema, lr=1e-2))
        found, own = (
            weights(tmp_path / f"{steps}-{name}" / "transformer") for name in ("average", "weights")
        )
        name = "blocks.0.ffn.0.weight"
        assert torch.equal(found[name], own[name]) == same


# A distilled teacher


@pytest.fixture(scope="module")
def distilled(teacher, folder):
    """The teacher after an update of distillation; it states three steps from another noise level
    than is usual."""
    out = folder / "distilled"
    rcm.train(rcm_config(teacher, out, method="scm", steps=1))
    config = json.loads((out / "transformer" / "config.json").read_text())
    config["sampling"] |= {"steps": 3, "sigma_max": 60.0}
    (out / "transformer" / "config.json").write_text(json.dumps(config))
    return teacher | {"transformer": out / "transformer"}


def test_a_distilled_teacher_makes_a_student_of_few_steps(distilled, tmp_path, monkeypatch):
    asked = spy(monkeypatch, WanModel, "forward")
    config = sla_config(distilled, tmp_path, noise_levels="few-step", batch=4, steps=6)
    sla.train(config)
    seen = {round(t, 9) for _, _, times, *_ in asked for t in times.tolist()}
    assert seen == {round(t, 9) for t in few_step_times(3, 60.0)[:-1]}
    stated = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert stated["sampling"] == {
        "solver": "few-step", "steps": 3, "sigma_max": 60.0, "guidance": 1.0
    }  # fmt: skip
    assert stated["attention"] == "sla"


def test_few_step_noise_levels_want_a_distilled_teacher(logs, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"distilled model, but the solver of .* is unipc"):
        sla.train(sla_config(teacher, tmp_path, noise_levels="few-step"))


def test_a_student_begins_with_weights_that_are_sparse(teacher, tmp_path):
    """With all blocks kept and an untrained linear branch it would be the teacher, and is not."""
    sla.train(sla_config(teacher, tmp_path / "first", lr=1e-2, steps=2))
    student = tmp_path / "first" / "transformer"
    again = sla_config(teacher, tmp_path / "again", student=student, ratio=1.0, steps=1, lr=1e-9)
    sla.train(again)
    assert column(again, "loss")[0] > 1e-4
    before, after = weights(student), weights(tmp_path / "again" / "transformer")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_sparse_weights_of_another_variant_are_refused(teacher, tmp_path):
    sla.train(sla_config(teacher, tmp_path / "first", steps=1))
    student = tmp_path / "first" / "transformer"
    with pytest.raises(ValueError, match="was trained with variant released, got paper"):
        sla.train(sla_config(teacher, tmp_path / "again", student=student, variant="paper"))


# Image conditions


def test_clip_and_condition_channels_reach_both_networks(logs, folder, tmp_path, monkeypatch):
    teacher = tiny_teacher(folder, "i2v")
    batches = spy(monkeypatch, losses, "white_box")
    asked = spy(monkeypatch, WanModel, "forward")
    config = sla_config(teacher, tmp_path, steps=2)
    sla.train(config)
    assert all(0 < loss < 10 for loss in column(config, "loss"))
    assert len(batches) == 2 and len(asked) == 4
    assert {is_student(model) for model, *_ in asked} == {True, False}
    for _, latents, t, context, features in asked:
        assert latents.shape[1] == 16 + 20 and t.shape == (2,)
        assert features.shape == (2, 5, 16) and features.any()
        assert context.shape[1] == 512 and not context[:, 6:].any()
    teachers, students = asked[0], asked[1]
    assert torch.equal(teachers[1], students[1]) and torch.equal(teachers[4], students[4])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_given_first_frame_is_clean_and_has_no_loss(logs, ti2v, tmp_path, monkeypatch, share):
    """A student that is the teacher but for its first frame."""
    forward, x0s, asked = WanModel.forward, [], []

    def wrong_first(self, latents, t, *others):
        out = forward(self, latents, t, *others)
        if not is_student(self):
            return out
        asked.append((latents, t))
        return out + 100 * (torch.arange(3) == 0)[:, None, None]

    monkeypatch.setattr(WanModel, "forward", wrong_first)
    collate = LatentDataset._collate

    def noted(self, samples):
        batch = collate(self, samples)
        x0s.append(batch.latents)
        return batch

    monkeypatch.setattr(LatentDataset, "_collate", noted)
    config = sla_config(ti2v, tmp_path, ratio=1.0, image_share=share, steps=1)
    sla.train(config)
    (loss,) = column(config, "loss")
    ((latents, t),) = asked
    if share == 0:
        assert loss == pytest.approx(100**2 / 3, rel=1e-3)
        assert t.shape == (2,)
        return
    assert loss < 1e-9
    assert torch.equal(latents[:, :, 0], x0s[0][:, :, 0])
    assert not torch.equal(latents[:, :, 1], x0s[0][:, :, 1])
    assert (t[:, 0] == 0).all() and (t[:, 1:] > 0).all()


def test_text_to_video_models_are_given_no_frame(logs, teacher, tmp_path, monkeypatch):
    asked = spy(monkeypatch, WanModel, "forward")
    sla.train(sla_config(teacher, tmp_path, image_share=1.0, steps=1))
    assert all(t.ndim == 1 for _, _, t, *_ in asked)


# Two experts


@pytest.mark.parametrize(
    ("expert", "part", "low", "high"),
    [("high-noise", "transformer", 0.875, 1.0), ("low-noise", "transformer_2", 0.0, 0.875)],
)
def test_an_expert_sees_its_own_times(two_experts, tmp_path, monkeypatch, expert, part, low, high):
    asked = spy(monkeypatch, WanModel, "forward")
    config = sla_config(two_experts, tmp_path, expert=expert, steps=6, batch=4, lr=1e-9)
    sla.train(config)
    t = torch.cat([times for _, _, times, *_ in asked])
    assert len(t) == 6 * 2 * 4
    assert low <= t.min() < t.max() <= high
    own = rounded(Path(two_experts["model"], part))
    found = weights(tmp_path / "transformer")
    for name, tensor in own.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_an_expert_has_to_be_named(logs, two_experts, teacher, tmp_path):
    with pytest.raises(ValueError, match="high-noise or low-noise"):
        sla.train(sla_config(two_experts, tmp_path))
    with pytest.raises(ValueError, match="wants none"):
        sla.train(sla_config(teacher, tmp_path, expert="low-noise"))


# What goes wrong


def test_a_broken_batch_is_skipped_and_counted(teacher, tmp_path, monkeypatch):
    """One NaN in the third of four batches: that update is none, the others are."""
    collate, number = LatentDataset._collate, iter(range(100))

    def poisoned(self, samples):
        batch = collate(self, samples)
        if next(number) == 2:
            batch.latents[0, 3, 1, 2, 2] = float("nan")
        return batch

    monkeypatch.setattr(LatentDataset, "_collate", poisoned)
    config = sla_config(teacher, tmp_path)
    sla.train(config)
    assert column(config, "student_skipped") == [0, 0, 1, 0]
    entry = log_of(config)[2]
    assert entry["nan/loss"] == 1 and entry["nan/student_gradient_norm"] == 1
    assert "student_gradient_norm" not in entry
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "transformer").values())
    assert len(column(config, "loss")) == 4, "the good sample's loss counts"


def test_accumulated_gradients_are_their_mean(logs, teacher, tmp_path, monkeypatch):
    """Of a loss whose gradient is 1 for each of the head's 64 biases."""
    losses_of = []

    def loss(run, student, *others):
        losses_of.append(student)
        return student.head.head.bias.sum()

    monkeypatch.setattr(sla, "_loss", loss)
    config = sla_config(teacher, tmp_path, accumulate=3, steps=2)
    sla.train(config)
    assert len(losses_of) == 6
    assert column(config, "student_gradient_norm") == [8.0, 8.0]


def test_data_is_wanted(logs, teacher, tmp_path):
    with pytest.raises(ValueError, match=r"no data given.*synthesize"):
        sla.train(sla_config(teacher, tmp_path, data=()))


def test_data_of_another_model_is_refused(logs, teacher, ti2v, tmp_path):
    with pytest.raises(ValueError, match="made by another VAE"):
        sla.train(sla_config(teacher, tmp_path, data=ti2v["data"]))


def test_a_checkpoint_of_another_run_is_refused(teacher, tmp_path):
    sla.train(sla_config(teacher, tmp_path, steps=1))
    with pytest.raises(ValueError, match="checkpoint of another run"):
        sla.train(sla_config(teacher, tmp_path, steps=2, train="lora", lora_rank=2))


def test_a_finished_run_is_exported_again_and_not_trained(teacher, tmp_path):
    config = sla_config(teacher, tmp_path, steps=2)
    sla.train(config)
    before, told = weights(tmp_path / "transformer"), log_of(config)
    (tmp_path / "transformer" / "config.json").unlink()
    sla.train(config)
    after = weights(tmp_path / "transformer")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert log_of(config) == told


def test_broken_samples_of_the_data_are_in_the_log(teacher, tmp_path, monkeypatch):
    read = reader.read_sample

    def broken_second(path, entry, **options):
        if entry.key == sample_key(1):
            raise BrokenSample("cut short")
        return read(path, entry, **options)

    monkeypatch.setattr(reader, "read_sample", broken_second)
    only_logs(monkeypatch)
    config = sla_config(teacher, tmp_path)
    with pytest.warns(UserWarning, match="cut short"):
        sla.train(config)
    assert column(config, "broken_samples")[-1] >= 1
