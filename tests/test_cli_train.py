"""`turbodit train`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from statistics import mean
from typing import Any

import pytest
import torch
from tests.training.tiny_training import tiny_teacher

from turbodit.cli import main
from turbodit.cli.train import TrainRCM, TrainSLA, _plan, show, with_data
from turbodit.config import preset
from turbodit.plan import Plan, Training
from turbodit.recipes import RCM, SLA
from turbodit.training.config import RCMConfig, SLAConfig

ALL = [(method, name) for method, recipes in (("sla", SLA), ("rcm", RCM)) for name in recipes]


@pytest.fixture(autouse=True)
def in_empty_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ran(monkeypatch) -> list[TrainSLA | TrainRCM]:
    """Commands that were to run."""
    commands: list[TrainSLA | TrainRCM] = []
    for kind in (TrainSLA, TrainRCM):
        monkeypatch.setattr(kind, "run", lambda self: commands.append(self))
    return commands


@pytest.mark.parametrize("method", ["sla", "rcm"])
@pytest.mark.parametrize("name", ["spritewan", "Wan2.2-I2V-A14B-low"])
def test_a_recipe_gives_the_flags_their_defaults(ran, method, name):
    assert main(["train", method, "--recipe", name]) == 0
    (command,) = ran
    assert command.config == {"sla": SLA, "rcm": RCM}[method][name]()
    assert command.recipe == name


def test_a_recipe_of_one_method_is_none_of_the_other(ran, capsys):
    assert main(["train", "rcm", "--recipe", "Wan2.2-T2V-A14B"]) == 0
    (command,) = ran
    assert command.config == RCM["Wan2.2-T2V-A14B"]() and command.config.expert is None
    assert main(["train", "sla", "--recipe", "Wan2.2-T2V-A14B"]) == 2
    assert "unknown recipe 'Wan2.2-T2V-A14B'; supported: " in capsys.readouterr().err


def test_flags_win_over_the_recipe(ran):
    flags = ["--steps", "7", "--lr", "3e-4", "--data", "a", "b/*.tar", "--ratio", "0.2"]
    assert main(["train", "sla", "--recipe=Wan2.1-T2V-14B", *flags, "--ema", "0.05", "0.1"]) == 0
    (command,) = ran
    config, recipe = command.config, SLA["Wan2.1-T2V-14B"]()
    assert (config.steps, config.lr, config.ratio) == (7, 3e-4, 0.2)
    assert config.data == ("a", "b/*.tar") and config.ema == (0.05, 0.1)
    assert (config.context, config.accumulate) == (recipe.context, recipe.accumulate) == (8, 32)


def test_without_a_recipe_it_is_the_embedded_teacher(ran):
    assert main(["train", "rcm", "--method", "dmd", "--fixed-times"]) == 0
    (command,) = ran
    assert command.config.model == "spritewan-teacher"
    assert (command.config.method, command.config.fixed_times) == ("dmd", True)


def test_unknown_recipes_and_flags(ran, capsys):
    assert main(["train", "sla", "--recipe", "Wan3"]) == 2
    message = capsys.readouterr().err
    assert "unknown recipe 'Wan3'" in message and "Wan2.1-T2V-1.3B" in message
    for flags, told in ((["--no-such-flag", "1"], "no-such-flag"), (["--steps", "0"], "positive")):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "sla", *flags])
        assert stopped.value.code == 2
        assert told in capsys.readouterr().err
    assert not ran


@pytest.mark.parametrize(("method", "name"), ALL)
def test_every_recipe_has_a_plan(method, name, capsys):
    config = {"sla": SLA, "rcm": RCM}[method][name]()
    show(config)
    out = printed(capsys)
    method = getattr(config, "method", method)
    assert f'"{config.model}"' in out and f"{method} training of {config.model}" in out
    for word in ("student: AdamW", "teacher: weights", "tokens", "80 GB"):
        assert word in out, word
    assert ("fake score: AdamW" in out) == (method in ("rcm", "dmd"))
    assert ("both experts" in out) == name.endswith("-A14B")
    assert ("one expert" in out) == name.endswith(("-high", "-low"))


def printed(capsys) -> str:
    """On one line: lines end where they are full."""
    return " ".join(capsys.readouterr().out.split())


def planned(config: SLAConfig | RCMConfig, **changes: Any) -> Plan:
    return _plan(replace(config, **changes), preset(config.model))


def test_a_plan_is_of_the_configuration() -> None:
    """What the run takes more of, or less, so does its plan."""
    sla, rcm = SLA["Wan2.1-T2V-1.3B"](), RCM["Wan2.1-T2V-1.3B"]()
    video = (preset(sla.model), 832, 480, 81)
    more: dict[str, Any]
    for config, changes, job, more in (
        (sla, {"ratio": 0.5}, "sla", {"ratio": 0.5}),
        (sla, {"train": "lora", "lora_rank": 8}, "sla", {"part": "lora", "rank": 8}),
        (sla, {"objective": "black-box"}, "sla", {"objective": "black-box"}),
        (sla, {"ema": ()}, "sla", {"averages": 0}),
        (sla, {"ema": (0.05, 0.1)}, "sla", {"averages": 2}),
        (rcm, {"method": "scm"}, "scm", {}),
        (rcm, {"method": "dcm"}, "dcm", {}),
        (rcm, {"method": "dmd"}, "dmd", {}),
        (rcm, {"joint_ratio": 0.1}, "rcm", {"attention": "sla", "ratio": 0.1}),
        (rcm, {"student_every": 3}, "rcm", {"student_every": 3}),
        (rcm, {"rollout_steps": 2}, "rcm", {"rollout_steps": 2}),
        (rcm, {"master_weights": False}, "rcm", {"master_weights": False}),
    ):
        plan = planned(config, **changes)
        assert plan == Training(*video, method=job, batch=config.batch, **more).plan(), changes
        assert plan != planned(config), changes


def test_two_experts_take_their_turns() -> None:
    plan = planned(RCM["Wan2.2-T2V-A14B"]())
    student, fake, mean = plan.seconds.values()
    assert mean == pytest.approx((student + 9 * fake) / 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sla", "--expert", "low-noise"], "expert is low-noise; spritewan-teacher wants none"),
        (
            ["rcm", "--recipe", "Wan2.2-T2V-A14B-high", "--method", "rcm"],
            "one expert trains with method scm, got rcm",
        ),
        (["rcm", "--recipe", "Wan2.2-T2V-A14B", "--method", "dcm"], "got dcm with exact"),
    ],
)
def test_a_dry_run_refuses_what_the_run_does(capsys, arguments, message):
    assert main(["train", *arguments, "--dry-run"]) == 2
    out, error = capsys.readouterr()
    assert message in error and not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sla", "--ratio", "1.5"], "ratio must be in (0, 1], got 1.5"),
        (["sla", "--ema", "0.5"], "ema must be"),
        (["sla", "--keep", "0"], "keep must be positive, got 0"),
        (["sla", "--train", "lora", "--lora-rank", "0"], "lora_rank must be positive, got 0"),
        (["sla", "--lora-rank", "8"], "lora_rank is that of train lora"),
        (["rcm", "--p-std", "0"], "p_std must be positive, got 0"),
        (["rcm", "--method", "scm", "--fixed-times"], "fixed_times are those of"),
    ],
)
def test_a_dry_run_refuses_values_that_cannot_be(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments, "--dry-run"])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_first_process_prints(monkeypatch, capsys):
    for rank, prints in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "rcm", "--dry-run"]) == 0
        assert bool(capsys.readouterr().out) == prints
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "sla", "--dry-run", "--expert", "low-noise"]) == 2


@pytest.mark.parametrize(("method", "recipes"), [("sla", SLA), ("rcm", RCM)])
def test_every_flag_has_a_help(monkeypatch, capsys, method, recipes):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["train", method, "--help"])
    lines = [line.strip("│| ") for line in capsys.readouterr().out.splitlines()]  # in boxes
    helps = {}
    for entry in re.split(r"\n(?=--[a-z])", "\n".join(lines))[1:]:
        flag, _, told = re.sub(r" {2,}", "\n", entry).partition("\n")
        helps[flag.split()[0]] = " ".join(told.split())
    config = recipes["spritewan"]()
    names = [
        "no-" * (getattr(config, field.name) is True) + field.name
        for field in dataclasses.fields(config)
    ]
    names += ["recipe", "dry_run", "debug"]
    assert helps.keys() == {"--" + name.replace("_", "-") for name in names}
    for flag, told in helps.items():
        assert told and not told.startswith("(default"), flag
    assert all(name in helps["--recipe"] for name in recipes)
    assert "with --no-master-weights it is stored in the dtype" in helps["--no-master-weights"]
    assert "with --no-compile nothing is fused" in helps["--no-compile"]


def test_a_dry_run_writes_nothing(capsys):
    assert main(["train", "sla", "--dry-run", "--steps", "123"]) == 0
    out = capsys.readouterr().out
    assert "123" in out and "student: AdamW" in out
    assert not list(Path().iterdir())


def test_help_and_dry_run_need_no_torch():
    for arguments in (["train", "sla", "--help"], ["train", "rcm", "--dry-run"]):
        code = (
            "import sys\nfrom turbodit.cli import main\n"
            f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr


def test_spriteworld_stands_for_clips_in_the_runs_folder(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(
        "turbodit.spritewan.shards.write_clips", lambda *arguments: written.append(arguments)
    )
    config = SLAConfig(model="", out=tmp_path, data=("more", "spriteworld:12"), device="cpu")
    assert with_data(config).data == ("more", str(tmp_path / "data-12"))
    assert written == [(tmp_path / "data-12", 12, "cpu")]
    with pytest.raises(ValueError, match="takes a number of clips, got 'many'"):
        with_data(SLAConfig(model="", data=("spriteworld:many",)))


@pytest.mark.parametrize("method", ["sla", "rcm"])
def test_the_clips_are_what_is_trained_on(monkeypatch, tmp_path, method):
    teacher = tiny_teacher(tmp_path)
    monkeypatch.setattr(
        "turbodit.spritewan.shards.write_clips",
        lambda folder, count, device: copytree(teacher["data"][0], folder),
    )
    flags = ["--model", teacher["model"], "--data", "spriteworld:4", "--device", "cpu"]
    assert main(["train", method, *flags, "--out", "run", "--steps", "1"]) == 0
    assert Path("run/data-4/shard_000000.tar").exists()


@pytest.mark.parametrize("method", ["sla", "rcm"])
def test_a_run_and_the_same_command_again(tmp_path, capsys, method):
    teacher = tiny_teacher(tmp_path)
    flags = ["--model", teacher["model"], "--data", *teacher["data"], "--out", "run"]
    flags += ["--batch", "2", "--log-every", "1", "--device", "cpu"]
    own = {"sla": ["--block-q", "16", "--block-k", "16"], "rcm": ["--method", "scm"]}[method]
    for steps in (2, 3):
        assert main(["train", method, *flags, *own, "--steps", str(steps)]) == 0
    lines = Path("run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert Path("run/transformer/config.json").exists()
    assert "3/3" in capsys.readouterr().err


def test_the_whole_way(tmp_path, capsys):
    """Sparse attention and few steps, trained apart and merged, are one model that says so."""
    teacher = tiny_teacher(tmp_path)
    transformer = str(Path(teacher["model"], "transformer"))
    flags = ["--model", teacher["model"], "--data", *teacher["data"], "--device", "cpu"]
    flags += ["--steps", "2", "--lr", "1e-2", "--ema"]
    sla = ["sla", "--block-q", "16", "--block-k", "16", "--ratio", "0.3", "--out", "sla"]
    assert main(["train", *sla, *flags]) == 0
    assert main(["train", "rcm", "--method", "scm", "--out", "rcm", *flags]) == 0
    parts = ["--base", "rcm/transformer", "--diff-base", transformer]
    assert main(["merge", *parts, "--diff-target", "sla/transformer", "-o", "turbo"]) == 0
    stated = json.loads(Path("turbo/config.json").read_text())
    assert stated["attention_settings"]["ratio"] == 0.3
    assert stated["sampling"]["steps"] == 4
    student = ["--model", teacher["model"], "--transformer", "turbo", "--device", "cpu"]
    video = ["--size", "64*64", "--frames", "5", "-o", "fox.mp4", "--json"]
    capsys.readouterr()
    assert main(["generate", "a red fox", *student, *video]) == 0
    settings = json.loads(capsys.readouterr().out)["videos"][0]["settings"]
    assert (settings["steps"], settings["solver"]) == (4, "few-step")
    assert settings["attention"] == "sla"


def test_lora_is_merged(tmp_path):
    teacher = tiny_teacher(tmp_path)
    flags = ["--model", teacher["model"], "--data", *teacher["data"], "--device", "cpu"]
    flags += ["--steps", "2", "--train", "lora", "--lora-rank", "2", "--lr", "1e-2"]
    assert main(["train", "sla", "--out", "run", *flags]) == 0
    base = ["--base", str(Path(teacher["model"], "transformer"))]
    assert main(["merge", *base, "--lora", "run/lora.safetensors", "-o", "sparse"]) == 0
    stated = json.loads(Path("sparse/config.json").read_text())
    assert stated["attention"] == "sla"


def test_mistakes_are_one_line(tmp_path, capsys):
    teacher = tiny_teacher(tmp_path)
    flags = ["--model", teacher["model"], "--device", "cpu"]
    capsys.readouterr()
    assert main(["train", "sla", *flags, "--data", "nowhere"]) == 2
    assert capsys.readouterr().err == "turbodit: no shards (*.tar) in nowhere\n"
    assert main(["train", "sla", *flags, "--data", *teacher["data"], "--shard", "2"]) == 2
    assert "there are 1 processes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_first_training(tmp_path):
    """Of the embedded model, in less than five minutes on a CPU, and its loss falls."""
    program = [sys.executable, "-c", "import sys; from turbodit.cli import main; sys.exit(main())"]
    command = [*program, "train", "sla", "--recipe", "spritewan", "--steps", "20"]
    flags = ["--log-every", "1", "--out", str(tmp_path / "run"), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([*command, *flags], check=True, timeout=300, env=environment)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 20
    assert mean(losses[-5:]) < mean(losses[:5])
    assert (tmp_path / "run" / "transformer" / "config.json").exists()


def test_out_of_memory_says_what_helps_a_training(capsys, monkeypatch):
    def fail(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("turbodit.training.sla.train", fail)
    assert main(["train", "sla", "--data", "data"]) == 2
    error = capsys.readouterr().err
    assert "--accumulate" in error and "--offload" not in error
