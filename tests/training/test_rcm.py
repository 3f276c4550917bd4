"""rCM distillation of tiny random teachers, whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
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

from turbodit.checkpoints import load_transformer
from turbodit.distributed import Mesh
from turbodit.model.wan import WanModel
from turbodit.noise_schedule import few_step_times
from turbodit.pipeline import Pipeline
from turbodit.training import losses, rcm, sla
from turbodit.training.data import LatentDataset
from turbodit.training.networks import Experts

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
def image(folder):
    return tiny_teacher(folder, "i2v")


@pytest.fixture(scope="module")
def two_experts(folder):
    return tiny_teacher(folder, "t2v-a14b")


@pytest.fixture(scope="module")
def two_image_experts(folder):
    return tiny_teacher(folder, "i2v-a14b")


@pytest.fixture
def logs(monkeypatch) -> None:
    """For tests that look at nothing else."""
    only_logs(monkeypatch)


def which(config) -> list[str]:
    """What was minimised in each update."""
    kinds = ("scm_loss", "dcm_loss", "dmd_distance", "fake_loss")
    return ["+".join(kind[:3] for kind in kinds if kind in entry) for entry in log_of(config)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("rcm", ["scm", "scm", "scm+dmd", "fak", "scm+dmd", "fak"]),
        ("scm", ["scm"] * 6),
        ("dmd", ["dmd", "fak"] * 3),
        ("dcm", ["dcm"] * 6),
    ],
)
def test_methods_take_their_turns(logs, teacher, tmp_path, method, expected):
    """Warm-up of two updates, then every second one is the fake score's."""
    config = rcm_config(teacher, tmp_path, method=method, steps=6)
    rcm.train(config)
    assert which(config) == expected
    for entry in log_of(config):
        assert not [name for name in entry if name.startswith("nan/")]
        own = "fake" if "fake_loss" in entry else "student"
        assert entry[f"{own}_skipped"] == 0 and entry[f"{own}_gradient_norm"] > 0
        assert ("student_gradient_norm" in entry) != ("fake_gradient_norm" in entry)


@pytest.mark.parametrize("tangent", ["exact", "semi-continuous", "finite-difference"])
def test_tangents(logs, teacher, tmp_path, tangent):
    """All three find about the same direction of the first update with a tangent."""
    config = rcm_config(
        teacher, tmp_path / tangent, method="scm", warmup=0, tangent=tangent, steps=3, lr=1e-9
    )
    rcm.train(config)
    exact = rcm_config(teacher, tmp_path / "reference", method="scm", warmup=0, steps=3, lr=1e-9)
    rcm.train(exact)
    assert all(broken == 0 for broken in column(config, "scm_broken_samples"))
    found, wanted = (column(run, "scm_tangent_norm") for run in (config, exact))
    assert found == pytest.approx(wanted, rel=1e-5 if tangent == "exact" else 0.05)
    assert min(wanted) > 1


def test_the_tangent_in_bfloat16(logs, teacher, tmp_path):
    shared = {"method": "scm", "warmup": 0, "steps": 2, "lr": 1e-6}
    half = rcm_config(teacher, tmp_path / "half", dtype="bfloat16", **shared)
    exact = rcm_config(teacher, tmp_path / "float32", **shared)
    for config in (half, exact):
        rcm.train(config)
    found, wanted = (column(config, "scm_tangent_norm") for config in (half, exact))
    assert found != wanted and found == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("name", ["student", "fake"])
def test_an_update_changes_one_network(logs, teacher, tmp_path, monkeypatch, name):
    """Of a student and a fake score, in each one's turn; the teacher never."""
    found = {}
    update = rcm.Session.update

    def noted(self, name, average_step=None):
        before = {key: weights_of(model) for key, model in self.state.models.items()}
        update(self, name, average_step)
        changed = [key for key, model in self.state.models.items() if not same(before[key], model)]
        found.setdefault(name, []).append(changed)

    monkeypatch.setattr(rcm.Session, "update", noted)
    rcm.train(rcm_config(teacher, tmp_path, method="dmd", steps=4))
    assert found[name] == [[name], [name]]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(before: dict[str, torch.Tensor], model) -> bool:
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def passes(monkeypatch) -> dict[str, list[bool]]:
    """Whether the texts of the teacher's passes were the negative prompt, by network."""
    found: dict[str, list[bool]] = {"teacher": [], "other": []}
    forward = WanModel.forward

    def noted(self, latents, t, context, features=None):
        name = "other" if next(self.parameters()).requires_grad else "teacher"
        found[name].append(bool((context == context[:1]).all()))
        return forward(self, latents, t, context, features)

    monkeypatch.setattr(WanModel, "forward", noted)
    return found


@pytest.mark.parametrize(("guidance", "expected"), [(1.0, [False]), (5.0, [False, True])])
def test_guidance_of_one_needs_no_second_pass(
    logs, teacher, tmp_path, monkeypatch, guidance, expected
):
    found = passes(monkeypatch)
    rcm.train(rcm_config(teacher, tmp_path, method="scm", guidance=guidance, steps=1))
    assert sorted(found["teacher"]) == expected
    assert found["other"] == [False, False], "one with the tangent, one with the gradient"


def test_the_negative_prompt_is_what_guidance_steers_away_from(logs, teacher, tmp_path):
    """At r = 0 the direction is the distance to the guided teacher."""
    norms = []
    for number, text in enumerate(("the red car", "a fox jumps", "the red car")):
        config = rcm_config(
            teacher, tmp_path / str(number), method="scm", negative_prompt=text, steps=1
        )
        rcm.train(config)
        norms += column(config, "scm_tangent_norm")
    assert norms[0] == norms[2] != norms[1]


@pytest.mark.parametrize("fixed", [True, False])
def test_roll_outs_take_one_more_step_each_time(logs, teacher, tmp_path, monkeypatch, fixed):
    taken = []
    rollout = losses.rollout

    def noted(student, noise, times, generators, *, with_gradient):
        taken.append((times, with_gradient))
        return rollout(student, noise, times, generators, with_gradient=with_gradient)

    monkeypatch.setattr(losses, "rollout", noted)
    rcm.train(
        rcm_config(
            teacher, tmp_path, method="dmd", steps=8, rollout_steps=3, fixed_times=fixed,
            sigma_max=50.0,
        )
    )  # fmt: skip
    assert [len(times) - 1 for times, _ in taken] == [1, 1, 2, 2, 3, 3, 1, 1]
    assert [with_gradient for _, with_gradient in taken] == [True, False] * 4
    own = [times == few_step_times(len(times) - 1, 50.0) for times, _ in taken]
    assert all(own) if fixed else not any(own)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("method", ["rcm", "dcm"])
def test_given_first_frames_are_masked_everywhere(logs, ti2v, tmp_path, monkeypatch, method, share):
    masks = []
    for name in ("scm", "dcm", "dmd", "fake_score"):
        original = getattr(losses, name)

        def noted(*args, original=original, **kwargs):
            masks.append(kwargs["mask"] if "mask" in kwargs else args[-1])
            return original(*args, **kwargs)

        monkeypatch.setattr(losses, name, noted)
    asked = spy(monkeypatch, WanModel, "forward")
    config = rcm_config(ti2v, tmp_path, method=method, image_share=share, warmup=1)
    rcm.train(config)
    # Updates: consistency; the fake score; both losses; the fake score.
    assert len(masks) == (5 if method == "rcm" else 4)
    times = [t for _, _, t, *_ in asked]
    if share == 0:
        assert masks == [None] * len(masks) and all(t.ndim == 1 for t in times)
        return
    for mask in masks:
        assert mask.flatten(2).squeeze(1).tolist() == [[0, 1, 1]] * 2
    assert all((t[:, 0] == 0).all() and (t[:, 1:] > 0).all() for t in times)


def test_clip_features_and_channels_reach_every_network(logs, image, tmp_path, monkeypatch):
    """Of a teacher that takes an image: in both of rCM's updates, in every pass."""
    asked = spy(monkeypatch, WanModel, "forward")
    config = rcm_config(image, tmp_path, warmup=0, steps=2)
    rcm.train(config)
    assert which(config) == ["scm+dmd", "fak"]
    assert column(config, "student_skipped") == column(config, "fake_skipped") == [0]
    assert len({id(model) for model, *_ in asked}) == 3
    features = [args[-1] for args in asked]
    channels = [latents[:, 16:].float() for _, latents, *_ in asked]
    for seen in (features, channels):
        batches = {tuple(x.flatten().tolist()) for x in seen}
        assert len(batches) == 2, "those of an update's batch"


def test_a_joint_student_is_sparse(teacher, tmp_path):
    config = rcm_config(teacher, tmp_path, joint_ratio=0.25, steps=4, lr=1e-2)
    rcm.train(config)
    assert column(config, "scm_broken_samples") == [0, 0, 0]
    stated = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert stated["attention"] == "sla" and stated["attention_settings"]["ratio"] == 0.25
    assert stated["sampling"]["solver"] == "few-step"
    branch = [x for name, x in weights(tmp_path / "transformer").items() if LINEAR_BRANCH in name]
    assert len(branch) == 4 and all(x.any() for x in branch)


def test_the_student_begins_where_it_is_told(teacher, two_experts, tmp_path):
    """The teacher's weights, or those of a file; either way its shape is the teacher's."""
    other = Path(two_experts["model"], "transformer_2")
    for student, source in ((None, Path(teacher["model"], "transformer")), (other, other)):
        out = tmp_path / str(student is None)
        rcm.train(rcm_config(teacher, out, method="scm", student=student, steps=1, lr=1e-9))
        wanted = load_transformer(source, dtype=torch.bfloat16).state_dict()
        found = weights(out / "transformer")
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor.float(), rtol=0, atol=1e-6)


def test_a_student_with_sparse_attention_goes_on_being_sparse(teacher, tmp_path):
    tuned = sla_config(teacher, tmp_path / "sla", steps=2, lr=1e-2)
    sla.train(tuned)
    student = tmp_path / "sla" / "transformer"
    with pytest.raises(ValueError, match="trained with sparse-linear attention"):
        rcm.train(rcm_config(teacher, tmp_path / "dense", student=student, steps=1))
    out = tmp_path / "joint"
    rcm.train(
        rcm_config(teacher, out, student=student, joint_ratio=0.1, method="scm", steps=1, lr=1e-9)
    )
    found, wanted = weights(out / "transformer"), weights(student)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_what_is_exported_says_how_to_sample_it(teacher, tmp_path):
    rcm.train(rcm_config(teacher, tmp_path, method="scm", sigma_max=120.0, steps=1))
    stated = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert stated["sampling"] == {
        "solver": "few-step",
        "steps": 4,
        "sigma_max": 120.0,
        "guidance": 1.0,
    }
    assert "attention" not in stated
    assert not any(LINEAR_BRANCH in name for name in weights(tmp_path / "transformer"))


def test_averages_count_the_students_updates_alone(teacher, tmp_path, monkeypatch):
    calls = spy(monkeypatch, rcm.PowerEMA, "update")
    config = rcm_config(teacher, tmp_path, steps=6, ema=(0.1,), save_every=3)
    rcm.train(config)
    assert [step for _, _, step in calls] == [0, 1, 2, 3]
    longer = rcm_config(teacher, tmp_path, steps=9, ema=(0.1,), save_every=3)
    rcm.train(longer)
    assert [step for _, _, step in calls[4:]] == [4, 5]


@pytest.mark.parametrize(
    ("expert", "low", "high"), [("high-noise", 0.875, 1.0), ("low-noise", 0.0, 0.875)]
)
def test_an_expert_sees_its_own_times(logs, two_experts, tmp_path, monkeypatch, expert, low, high):
    asked = spy(monkeypatch, WanModel, "forward")
    config = rcm_config(two_experts, tmp_path, method="scm", expert=expert, batch=4)
    rcm.train(config)
    t = torch.cat([torch.as_tensor(times.detach()) for _, _, times, *_ in asked])
    assert low - 1e-9 <= t.min() < t.max() <= high + 1e-9


def test_an_expert_has_no_roll_out(logs, two_experts, tmp_path):
    with pytest.raises(ValueError, match="one expert trains with method scm, got rcm"):
        rcm.train(rcm_config(two_experts, tmp_path, expert="low-noise"))


# Two experts in one run


class Update(NamedTuple):
    """What happened until an optimizer's step.

    Attributes:
        name: of the network that it is of.
        passes: (expert, whether there was a gradient, times) of each pass, in order.
        graded, changed: experts with gradients; with other weights after the step.
    """

    name: str
    passes: list[tuple[str, bool, torch.Tensor]]
    graded: set[str]
    changed: set[str]


@pytest.fixture
def updates(monkeypatch) -> list[Update]:
    """Of a run, as they come; each looked at whether its experts see times of their own."""
    found: list[Update] = []
    passes: list[tuple[str, bool, torch.Tensor]] = []
    expert_at, update = Experts.at, rcm.Session.update

    def noted_at(self, t):
        expert = expert_at(self, t)
        name = "high" if expert is self.high_noise else "low"
        assert ((t >= self.boundary) == (name == "high")).all()
        passes.append((name, torch.is_grad_enabled(), t.detach().clone()))
        return expert

    def noted_update(self, name, average_step=None):
        model = self.state.models[name]
        before = weights_of(model)
        graded = experts_of(name for name, p in model.named_parameters() if p.grad is not None)
        update(self, name, average_step)
        changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
        found.append(Update(name, list(passes), graded, experts_of(changed)))
        passes.clear()

    monkeypatch.setattr(Experts, "at", noted_at)
    monkeypatch.setattr(rcm.Session, "update", noted_update)
    return found


def experts_of(names) -> set[str]:
    return {name.partition("_")[0] for name in names}


def with_gradient(update: Update) -> list[str]:
    return [expert for expert, graded, _ in update.passes if graded]


@pytest.mark.parametrize("method", ["scm", "dmd", "rcm"])
def test_gradients_reach_the_experts_that_worked(logs, two_experts, tmp_path, updates, method):
    """sCM's own; DMD's that of the last step; the other one stays as it is, without decay."""
    config = rcm_config(two_experts, tmp_path, method=method, warmup=0, steps=8)
    rcm.train(config)
    assert len(updates) == 8
    for update in updates:
        assert update.graded == update.changed == set(with_gradient(update)), update.name
        expected = 2 if (method, update.name) == ("rcm", "student") else 1
        assert len(with_gradient(update)) == expected
    assert set.union(*(update.graded for update in updates)) == {"high", "low"}
    assert all(norm > 0 for norm in column(config, "student_gradient_norm"))


def test_a_roll_out_passes_from_one_expert_to_the_other(logs, two_experts, tmp_path, updates):
    rcm.train(rcm_config(two_experts, tmp_path, method="dmd", steps=8, fixed_times=True))
    # t of atan(80), 1.5, 1.4, 1.0: 0.99, 0.93, 0.85, 0.61
    path = ["high", "high", "low", "low"]
    for number, update in enumerate(updates):
        taken = [expert for expert, *_ in update.passes]
        steps = 1 + number // 2
        assert taken[:steps] == path[:steps]
        after = taken[steps:]
        assert len(after) == (3 if update.name == "student" else 1) and len(set(after)) == 1


def test_all_processes_ask_the_same_experts(logs, two_experts, tmp_path, monkeypatch, updates):
    """At their own noise levels, but in roll-outs, whose times decide."""
    monkeypatch.setattr(Mesh, "data_count", 2)
    for rank in (0, 1):
        monkeypatch.setattr(Mesh, "data_rank", rank)
        rcm.train(rcm_config(two_experts, tmp_path / str(rank), warmup=0, steps=6, rollout_steps=2))
    passes = [
        [one for update in half for one in update.passes] for half in (updates[:6], updates[6:])
    ]
    asked, times = ([[one[place] for one in own] for own in passes] for place in (0, 2))
    assert asked[0] == asked[1] and set(asked[0]) == {"high", "low"}
    assert not all(torch.equal(*both) for both in zip(*times, strict=True))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_both_experts_are_written_and_generate(request, tmp_path, task):
    """Each where a pipeline looks for it; after updates of next to nothing it is its teacher's."""
    name = {"t2v": "two_experts", "i2v": "two_image_experts"}[task]
    teacher = request.getfixturevalue(name)
    config = rcm_config(teacher, tmp_path, warmup=0, steps=2, lr=1e-9, ema=(0.1,))
    rcm.train(config)
    assert which(config) == ["scm+dmd", "fak"]
    for entry in log_of(config):
        assert not [name for name in entry if name.startswith("nan/")]
    folders = [tmp_path / "transformer", tmp_path / "transformer_2"]
    for folder in folders:
        wanted = load_transformer(Path(teacher["model"], folder.name), dtype=torch.bfloat16)
        found = weights(folder)
        for key, tensor in wanted.state_dict().items():
            torch.testing.assert_close(found[key], tensor.float(), rtol=0, atol=1e-6)
    pipe = Pipeline.from_pretrained(teacher["model"], transformer=folders, device="cpu")
    image = {"i2v": Image.new("RGB", (64, 64), "red"), "t2v": None}[task]
    video = pipe("a red fox", width=64, height=64, frames=5, image=image)
    assert video.frames.shape == (5, 64, 64, 3)
    assert (video.settings["solver"], video.settings["steps"]) == ("few-step", 4)


def test_both_experts_go_on_bit_by_bit(two_experts, tmp_path):
    shared = {"warmup": 0, "ema": (0.1,)}
    whole = rcm_config(two_experts, tmp_path / "whole", steps=4, **shared)
    rcm.train(whole)
    for steps in (2, 4):
        stopped = rcm_config(two_experts, tmp_path / "stopped", steps=steps, **shared)
        rcm.train(stopped)
    assert log_of(stopped) == log_of(whole)
    for name in ("transformer", "transformer_2"):
        found, wanted = weights(stopped.out / name), weights(whole.out / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_both_experts_train_with_sparse_attention(two_experts, tmp_path):
    config = rcm_config(two_experts, tmp_path, method="scm", joint_ratio=0.25, steps=1)
    rcm.train(config)
    for name in ("transformer", "transformer_2"):
        stated = json.loads((tmp_path / name / "config.json").read_text())
        assert stated["attention"] == "sla" and stated["attention_settings"]["ratio"] == 0.25


# What goes wrong


def test_a_broken_sample_is_left_out_and_counted(teacher, tmp_path, monkeypatch):
    """NaN in one of two samples of the second batch: the other one still teaches."""
    collate, number = LatentDataset._collate, iter(range(100))

    def poisoned(self, samples):
        batch = collate(self, samples)
        if next(number) == 1:
            batch.latents[0, 3, 1, 2, 2] = float("nan")
        return batch

    monkeypatch.setattr(LatentDataset, "_collate", poisoned)
    config = rcm_config(teacher, tmp_path, method="scm", steps=3)
    rcm.train(config)
    assert column(config, "scm_broken_samples") == [0, 0.5, 0]
    assert column(config, "student_skipped") == [0, 0, 0]
    assert all(norm > 0 for norm in column(config, "student_gradient_norm"))
    assert all(x.isfinite().all() for x in weights(tmp_path / "transformer").values())


def test_the_fake_scores_own_rate(logs, teacher, tmp_path, monkeypatch):
    rates = []
    adamw = rcm.Run.adamw

    def noted(self, parameters, lr):
        rates.append(lr)
        return adamw(self, parameters, lr)

    monkeypatch.setattr(rcm.Run, "adamw", noted)
    rcm.train(rcm_config(teacher, tmp_path / "a", steps=1, lr=1e-4))
    rcm.train(rcm_config(teacher, tmp_path / "b", steps=1, lr=1e-4, fake_lr=3e-4))
    rcm.train(rcm_config(teacher, tmp_path / "c", steps=1, lr=1e-4, method="scm"))
    assert rates == pytest.approx([1e-4, 2e-5, 1e-4, 3e-4, 1e-4])


def test_the_direction_warms_up(logs, teacher, tmp_path, monkeypatch):
    weights_seen = []
    scm = losses.scm

    def noted(*args, **kwargs):
        weights_seen.append(kwargs["warmup"])
        return scm(*args, **kwargs)

    monkeypatch.setattr(losses, "scm", noted)
    config = rcm_config(teacher, tmp_path, method="scm", warmup=3, steps=5, loss_scale=7.0)
    rcm.train(config)
    assert weights_seen == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    # The loss is the length of a direction that is nearly 1, squared and scaled.
    for loss, norm in zip(
        column(config, "scm_loss"), column(config, "scm_tangent_norm"), strict=True
    ):
        assert loss <= 7.0 and math.isclose(loss, 7.0, rel_tol=0.5) and norm > 0


@pytest.mark.parametrize("tangent", ["semi-continuous", "finite-difference"])
def test_differences_are_refused_where_rounding_would_drown_them(teacher, tmp_path, tangent):
    """Also where nobody asked for bfloat16: it is the default on a GPU."""
    config = rcm_config(teacher, tmp_path, tangent=tangent, dtype="bfloat16")
    with pytest.raises(ValueError, match="supported: dtype float32, or tangent 'exact'"):
        rcm.train(config)
