"""The command line around a pipeline that draws grey frames at once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from turbodit import video as video_module
from turbodit.cli import main
from turbodit.cli.generate import TASKS
from turbodit.config import PRESETS, ModelConfig
from turbodit.request import Settings
from turbodit.video import Video, sidecar

SMALL = ("--size", "64*64", "--frames", "5", "--seed", "3")


class GreyPipeline:
    """Stands in for Pipeline; keeps how it was loaded and what it was asked for."""

    def __init__(self, name: str, **options: object) -> None:
        self.name = name
        self.options = options
        self.device = torch.device("cpu")
        self.peak_memory: int | None = None
        self.made: list[Settings] = []
        self.error: BaseException | None = None
        self.fails_at = 0

    def generate(self, settings: Settings, progress) -> list[Video]:
        if self.error is not None and len(self.made) == self.fails_at:
            raise self.error
        self.made.append(settings)
        for done in range(settings.steps + 1):
            progress("denoise", done, settings.steps)
        frames = np.full((settings.frames, settings.height, settings.width, 3), 128, np.uint8)
        timings = {"text": 0.25, "denoise": 2.0, "decode": 0.5, "denoise_step": 0.125}
        return [Video(frames, settings.fps, settings.prompts[0], settings.seeds[0], {}, timings)]


def folder_of(model: ModelConfig, **stated: object) -> SimpleNamespace:
    """Stands in for the folder of a model whose files state that."""
    return SimpleNamespace(config=lambda _: model, stated=lambda _: stated)


@pytest.fixture
def pipe(monkeypatch, tmp_path) -> GreyPipeline:
    """The pipeline that `turbodit generate` loads; the current folder is `tmp_path`."""
    grey = GreyPipeline("")

    def load(name, *, progress, **options) -> GreyPipeline:
        grey.name, grey.options = name, options
        progress("load", 1, 1)
        return grey

    def find_model(name) -> SimpleNamespace:
        return folder_of(PRESETS[Path(name).name])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("turbodit.pipeline.Pipeline.from_pretrained", load)
    monkeypatch.setattr("turbodit.checkpoints.find_model", find_model)
    return grey


def written() -> list[str]:
    """All files but those that tests and sidecars write as text."""
    apart = (".json", ".jsonl", ".txt")
    return sorted(str(p) for p in Path().rglob("*") if p.is_file() and p.suffix not in apart)


def fails(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that ends in a user's error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("turbodit: ")
    assert "Traceback" not in err
    return err


def test_a_prompt_becomes_an_mp4(pipe, capsys):
    assert main(["generate", "A fox, running!", *SMALL]) == 0
    assert written() == ["outputs/a-fox-running-3.mp4"]
    out, _ = capsys.readouterr()
    assert "outputs/a-fox-running-3.mp4" in out
    for line in ("denoise", "2.00 s", "0.125 s", "peak memory", "GiB", "steps", "20"):
        assert line in out
    assert pipe.name == "spritewan"


def test_output_name_decides_the_format(pipe):
    for name in ("fox.gif", "fox.webp", "frames"):
        assert main(["generate", "--prompt", "a fox", *SMALL, "-o", name]) == 0
    assert len([p for p in written() if p.startswith("frames/")]) == 5
    with Image.open("fox.gif") as image:
        assert image.size == (64, 64)


def test_without_a_seed_every_run_has_its_own(pipe):
    for _ in range(2):
        assert main(["generate", "a fox", "--size", "64*64", "--frames", "5"]) == 0
    first, second = (settings.seeds for settings in pipe.made)
    assert first != second
    assert len(written()) == 2


def test_several_videos_count_their_seeds_on(pipe, capsys):
    arguments = ["generate", "a fox", *SMALL, "--num-videos", "3", "-o", "fox.gif", "--json"]
    assert main(arguments) == 0
    assert written() == ["fox-3.gif", "fox-4.gif", "fox-5.gif"]
    result = json.loads(capsys.readouterr().out)
    assert [video["seed"] for video in result["videos"]] == [3, 4, 5]


def test_json_is_all_that_stdout_gets(pipe, capsys):
    assert main(["generate", "a fox", *SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (video,) = result["videos"]
    assert video["path"] == "outputs/a-fox-3.mp4"
    assert video["prompt"] == "a fox"
    assert video["settings"]["width"] == 64
    assert video["settings"]["weights"] == "spritewan"
    assert set(video["seconds"]) == {"text", "denoise", "denoise_step", "decode", "write"}
    assert result["device"] == "cpu"
    assert result["peak_bytes"] > 2**20
    assert json.loads(Path("outputs/a-fox-3.mp4.json").read_text())["settings"] == video["settings"]


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--frame_num", "9"], "frames", 9),
        (["--num_frames", "9"], "frames", 9),
        (["--sample_steps", "4"], "steps", 4),
        (["--num_steps", "4"], "steps", 4),
        (["--sample_shift", "7.5"], "shift", 7.5),
        (["--sample_guide_scale", "2"], "guidance", 2.0),
        (["--sample_solver", "euler"], "solver", "euler"),
        (["--base_seed", "11"], "seeds", (11,)),
        (["--negative_prompt", "blur"], "negative_prompt", "blur"),
        (["--solver", "few-step", "--sigma_max", "200"], "sigma_max", 200),
        (["--solver", "few-step", "--num-steps", "3"], "mid_times", (1.5, 1.4)),
        (["--solver", "few-step", "--mid-times", "1.3", "0.9"], "mid_times", (1.3, 0.9)),
        (["--solver", "few-step", "--ode"], "ode", True),
        (["--resolution", "256p", "--aspect_ratio", "1:1"], "width", 256),
        (["--size", "96x64"], "width", 96),
        (["--fps", "8"], "fps", 8),
    ],
)
def test_flags_people_know(pipe, flags, field, value):
    assert main(["generate", "a fox", *flags, "--output", "fox.gif"]) == 0
    assert getattr(pipe.made[0], field) == value


@pytest.mark.parametrize(
    ("flags", "option", "value"),
    [
        (["--dit_path", "fox.pth"], "transformer", (Path("fox.pth"),)),
        (["--transformer", "a", "--transformer", "b"], "transformer", (Path("a"), Path("b"))),
        (["--offload_model", "True"], "offload", "model"),
        (["--offload_model", "False"], "offload", "none"),
        (["--offload", "sequential"], "offload", "sequential"),
        (["--dtype", "bfloat16"], "dtype", torch.bfloat16),
        (["--attention_type", "sdpa"], "attention", "sdpa"),
        ([], "attention", None),
        ([], "attention_settings", {}),
        (["--attention", "sla", "--sla_topk", "0.2"], "attention_settings", {"ratio": 0.2}),
        (["--linear", "fp8"], "linear", "fp8-channel"),
        (["--linear", "int8-block"], "linear", "int8-block"),
        ([], "linear", None),
        (["--residual", "bfloat16"], "residual", "bfloat16"),
        (["--no-graph"], "graph", False),
        ([], "graph", True),
        (["--vae-tiling"], "vae_tiling", True),
        (["--prompt-cache", "cache"], "prompt_cache", Path("cache")),
        (["--device", "cpu"], "device", "cpu"),
        ([], "transformer", None),
    ],
)
def test_loading_options(pipe, flags, option, value):
    assert main(["generate", *flags, "a fox", *SMALL]) == 0
    assert pipe.options[option] == value


def test_attention_is_what_the_files_state_unless_given(pipe, capsys, monkeypatch):
    """And is recorded: a video of another one is another video."""
    settings = {"ratio": 0.3, "block_q": 32, "block_k": 32}
    folder = folder_of(PRESETS["spritewan"], attention="sla", attention_settings=settings)
    monkeypatch.setattr("turbodit.checkpoints.find_model", lambda name: folder)
    command = ["generate", "a fox", *SMALL, "-o", "fox.gif"]

    def recorded(*flags: str) -> tuple[str, dict[str, object]]:
        assert main([*command, "--force", *flags, "--json"]) == 0
        (video,) = json.loads(capsys.readouterr().out)["videos"]
        return video["settings"]["attention"], video["settings"].get("attention_settings", {})

    assert recorded() == ("sla", settings)
    assert recorded("--sla-topk", "0.5") == ("sla", settings | {"ratio": 0.5})
    assert recorded("--attention", "sagesla") == ("sagesla", settings)
    assert recorded("--attention", "sage") == ("sage", {})
    assert main([*command, "--attention", "sage", "--resume"]) == 0
    assert "exists already" in fails_after_output(capsys, *command, "--resume")
    assert main([*command, "--force"]) == 0
    assert "attention" in (out := capsys.readouterr().out) and "sla" in out and "0.3" in out


def test_a_setting_without_its_attention_is_told_at_once(pipe, capsys):
    pipe.options = {"loaded": False}
    error = fails(capsys, "generate", "a fox", "--sla-topk", "0.5")
    assert "attention 'sdpa' has no setting ratio; supported: none" in error
    assert pipe.options == {"loaded": False}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_tasks_of_wan_name_models(pipe, task):
    image = ["--image", "frame.png"] if "i2v-" in task or "flf2v" in task else []
    last = ["--last_frame", "frame.png"] if "flf2v" in task else []
    Image.new("RGB", (64, 64)).save("frame.png")
    assert main(["generate", "a fox", "--task", task, *SMALL[2:], *image, *last]) == 0
    assert pipe.name == TASKS[task][0]
    assert all(name in PRESETS for name in TASKS[task])


def test_i2v_task_of_480p_is_the_480p_model(pipe):
    Image.new("RGB", (64, 64)).save("frame.png")
    flags = ["--task", "i2v-14B", "--image_path", "frame.png", "--frames", "5"]
    for size in (["--size", "480*832"], ["--resolution", "480p"]):
        assert main(["generate", "a fox", *flags, *size]) == 0
        assert pipe.name == "Wan2.1-I2V-14B-480P"


def test_task_checks_the_folder(pipe, capsys):
    flags = ["--task", "t2v-14B", "--ckpt_dir", "models/Wan2.1-T2V-1.3B"]
    error = fails(capsys, "generate", "a fox", *flags)
    assert "t2v-14B is Wan2.1-T2V-14B, but models/Wan2.1-T2V-1.3B holds Wan2.1-T2V-1.3B" in error
    assert main(["generate", "a fox", *flags[2:], "--task", "t2v-1.3B", *SMALL]) == 0
    assert pipe.name == "models/Wan2.1-T2V-1.3B"


def test_never_overwrites_without_force(pipe, capsys):
    command = ["generate", "a fox", *SMALL, "-o", "fox.gif"]
    assert main(command) == 0
    before = Path("fox.gif").read_bytes()
    assert "fox.gif exists already" in fails_after_output(capsys, *command)
    assert Path("fox.gif").read_bytes() == before
    assert len(pipe.made) == 1
    assert main([*command, "--frames", "9", "--force"]) == 0
    assert Path("fox.gif").read_bytes() != before


def fails_after_output(capsys, *arguments: str) -> str:
    capsys.readouterr()
    return fails(capsys, *arguments)


def test_warnings_are_one_line_each(pipe, capsys, monkeypatch):
    generate = pipe.generate

    def warn_and_generate(settings, progress):
        warnings.warn("the last 40 characters have no effect", stacklevel=2)
        return generate(settings, progress)

    monkeypatch.setattr(pipe, "generate", warn_and_generate)
    assert main(["generate", "a fox", *SMALL, "--num-videos", "2"]) == 0
    err = capsys.readouterr().err
    assert err.count("turbodit: warning: the last 40 characters have no effect\n") == 2


def test_prompt_with_brackets_is_no_markup(pipe, capsys):
    prompt = "a fox [bold] in [/red] brackets"
    assert main(["generate", prompt, *SMALL, "--negative-prompt", "[/blur]"]) == 0
    out, err = capsys.readouterr()
    assert "[/blur]" in out
    assert prompt in err


def test_ctrl_c_leaves_finished_videos_only(pipe, capsys):
    pipe.error, pipe.fails_at = KeyboardInterrupt(), 1
    command = ["generate", "a fox", *SMALL, "--num-videos", "3", "-o", "fox.mp4"]
    assert main(command) == 130
    assert written() == ["fox-3.mp4"]
    assert "interrupted" in capsys.readouterr().err


def test_memory_of_a_gpu_is_the_most_that_any_video_took(pipe, capsys, monkeypatch):
    generate, peaks = pipe.generate, iter([2**40, 2**30])

    def generate_on_gpu(settings, progress):
        pipe.peak_memory = next(peaks)
        return generate(settings, progress)

    monkeypatch.setattr(pipe, "generate", generate_on_gpu)
    assert main(["generate", "a fox", *SMALL, "--num-videos", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes"] == 2**40


def test_no_space_left(pipe, capsys, monkeypatch):
    def fail(video: Video, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(video_module._WRITERS, ".mp4", fail)
    assert main(["generate", "a fox", *SMALL, "-o", "fox.mp4"]) == 2
    err = capsys.readouterr().err
    assert "\nturbodit: cannot write fox.mp4: no space left; the frames are 61,440 bytes" in err
    assert written() == []


def test_out_of_memory_says_what_helps(pipe, capsys):
    pipe.error = torch.OutOfMemoryError("CUDA out of memory")
    assert main(["generate", "a fox", *SMALL]) == 2
    assert "--offload model" in capsys.readouterr().err


def test_values_that_are_not_finite_are_one_line(pipe, capsys):
    pipe.error = FloatingPointError("denoising gave NaN; try dtype float32")
    assert main(["generate", "a fox", *SMALL]) == 2
    assert "turbodit: denoising gave NaN; try dtype float32\n" in capsys.readouterr().err


def test_bugs_keep_their_traceback(pipe):
    pipe.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "a fox", *SMALL])


def test_debug_shows_the_traceback(pipe):
    with pytest.raises(ValueError, match="empty"):
        main(["generate", "", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one prompt"),
        (["a fox", "--prompt", "a cat"], "give one prompt"),
        (["a fox", "--prompt-file", "p.txt"], "give one prompt"),
        ([""], "the prompt is empty"),
        (["   "], "the prompt is empty"),
        (["a fox", "--size", "0*480"], "nearest: 32x480"),
        (["a fox", "--size", "-64*64"], "multiple of 32"),
        (["a fox", "--size", "1000000*1000000"], "up to 16384"),
        (["a fox", "--size", "250*250"], "nearest: 256x256"),
        (["a fox", "--size", "huge"], "width*height, such as 832*480, got 'huge'"),
        (["a fox", "--resolution", "8k"], "supported: 256p"),
        (["a fox", "--aspect-ratio", "2:1"], "supported: 1:1"),
        (["a fox", "--frames", "32"], "nearest: 29 and 33"),
        (["a fox", "--frames", "0"], "frames must be positive, got 0"),
        (["a fox", "--steps", "0"], "between 1 and 1000, got 0"),
        (["a fox", "--seed", "-1"], "got -1"),
        (["a fox", "--image", "none.png"], "image not found: none.png"),
        (["a fox", "--image", "text.png"], "cannot read image text.png"),
        (["a fox", "--task", "t2v-2B"], "unknown task 't2v-2B'; supported: t2v-1.3B"),
        (["a fox", "--task", "t2v-1.3B", "--image", "text.png"], "from text alone"),
        (["a fox", "-o", "fox.avi"], "'.avi' is not one of .mp4, .gif, .webp"),
        (["a fox", "-o", "text.png/fox.mp4"], "text.png is a file, expected a folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(pipe, capsys, arguments, message):
    Path("text.png").write_text("no image")
    pipe.options = {"loaded": False}
    assert message in fails(capsys, "generate", *arguments)
    assert pipe.options == {"loaded": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "Wan9.9"], "no model 'Wan9.9'"),
        (["--model", "./nowhere"], "no model folder at ./nowhere"),
        (["--model", "empty"], "empty is no model folder"),
    ],
)
def test_unknown_models(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert message in fails(capsys, "generate", "a fox", *arguments)


def test_usage_errors_leave_status_2(capsys):
    for arguments in (["generate", "a fox", "--stepps", "4"], ["serve-nothing"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "turbodit 0.1.0\n"


def write_prompts(name: str, *lines: str) -> str:
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def test_text_file_of_prompts(pipe):
    prompts = write_prompts("p.txt", "# foxes", "", "a red fox", "  a blue fox  ")
    assert main(["generate", "--prompt-file", prompts, *SMALL[:4]]) == 0
    assert written() == ["outputs/p/003-a-red-fox-0.mp4", "outputs/p/004-a-blue-fox-0.mp4"]
    assert [settings.prompts for settings in pipe.made] == [("a red fox",), ("a blue fox",)]


def test_lines_of_jsonl_have_their_own_settings(pipe):
    lines = [
        {"prompt": "one", "size": "96*64", "seed": 7, "steps": 3, "output": "one.gif"},
        {"prompt": "two", "guidance": 2, "negative_prompt": "blur", "output": "b/two.webp"},
        {"prompt": "three", "resolution": "256p", "num_videos": 2},
    ]
    prompts = write_prompts("p.jsonl", *map(json.dumps, lines))
    flags = ["--size", "64*64", "--frames", "5", "--steps", "2", "-o", "clips"]
    assert main(["generate", "--prompt-file", prompts, *flags]) == 0
    one, two, three, four = pipe.made
    assert (one.width, one.height, one.seeds, one.steps) == (96, 64, (7,), 3)
    assert (two.width, two.seeds, two.steps, two.guidance) == (64, (0,), 2, 2)
    assert two.negative_prompt == "blur"
    assert (three.width, three.frames) == (256, 5)
    assert (three.seeds, four.seeds) == ((0,), (1,))
    clips = ["b/two.webp", "one.gif", "003-three-0.mp4", "003-three-1.mp4"]
    assert set(written()) == {f"clips/{name}" for name in clips}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a fox", "speed": 3}', "unknown keys: speed; supported: prompt,"),
        ('{"prompt": "a fox"', "line 2: "),
        ('["a fox"]', "expected a JSON object"),
        ('{"seed": 3}', "there is no prompt"),
        ('{"prompt": 3}', "prompt must be text, got 3"),
        ('{"prompt": "a fox", "output": 3}', "output must be text, got 3"),
        ('{"prompt": "a fox", "steps": "four"}', "steps must be a whole number, got 'four'"),
        ('{"prompt": "a fox", "seed": 1.5}', "a seed must be a whole number"),
        ('{"prompt": "a fox", "num_videos": null}', "num_videos must be a positive whole number"),
        ('{"prompt": "a fox", "mid_times": 1.5}', "mid_times must be finite numbers, got 1.5"),
        ('{"prompt": "a fox", "frames": 6}', "nearest: 5 and 9"),
        ('{"prompt": "a fox", "size": "big"}', "got 'big'"),
        ('{"prompt": "a fox", "image": "none.png"}', "image not found: none.png"),
    ],
)
def test_bad_lines_are_named(pipe, capsys, line, message):
    prompts = write_prompts("p.jsonl", '{"prompt": "fine"}', line)
    error = fails(capsys, "generate", "--prompt-file", prompts)
    assert "p.jsonl line 2: " in error
    assert message in error
    assert pipe.made == []


def test_bad_prompt_files(pipe, capsys):
    Path("latin.txt").write_bytes("ein Füchslein".encode("latin-1"))
    for name, message in {
        write_prompts("p.csv", "a fox"): "must end in .txt or .jsonl",
        write_prompts("empty.txt", "# nothing"): "has no prompts",
        "none.txt": "prompt file not found",
        "latin.txt": "not UTF-8",
    }.items():
        assert message in fails(capsys, "generate", "--prompt-file", name)


def test_batch_outputs_are_a_folder_and_differ(pipe, capsys):
    same = json.dumps({"prompt": "a fox", "output": "fox.mp4"})
    prompts = write_prompts("p.jsonl", same, same)
    command = ["generate", "--prompt-file", prompts]
    assert "--output must be a folder" in fails(capsys, *command, "-o", "fox.mp4")
    error = fails(capsys, *command)
    assert "several videos would be written to outputs/p/fox.mp4" in error


def test_resume_does_what_is_left(pipe, capsys):
    prompts = write_prompts("p.txt", "one", "two", "three")
    command = ["generate", "--prompt-file", prompts, *SMALL[:4], "--json"]
    pipe.error, pipe.fails_at = KeyboardInterrupt(), 2
    assert main(command) == 130
    assert len(written()) == 2
    pipe.error = None
    assert "exists already" in fails_after_output(capsys, *command)
    assert main([*command, "--resume"]) == 0
    assert [settings.prompts for settings in pipe.made] == [("one",), ("two",), ("three",)]
    result = json.loads(capsys.readouterr().out)
    assert result["skipped"] == ["outputs/p/001-one-0.mp4", "outputs/p/002-two-0.mp4"]
    assert [video["prompt"] for video in result["videos"]] == ["three"]


def test_resume_trusts_nothing_but_equal_settings(pipe, capsys):
    command = ["generate", "a fox", *SMALL, "-o", "fox.mp4", "--resume"]
    assert main(command) == 0
    assert main(command) == 0
    assert len(pipe.made) == 1
    for change in (["--steps", "5"], ["--prompt-cache", "c", "--vae-tiling"], ["--seed", "4"]):
        assert "exists already" in fails_after_output(capsys, *command, *change)
    sidecar(Path("fox.mp4")).write_text("[]")
    assert "exists already" in fails_after_output(capsys, *command)
    assert main([*command, "--force"]) == 0
    assert len(pipe.made) == 2


def test_resumed_to_the_end_loads_nothing(pipe, capsys):
    command = ["generate", "a fox", *SMALL, "--resume", "-o", "fox.mp4"]
    assert main(command) == 0
    pipe.options = {}
    capsys.readouterr()
    assert main(command) == 0
    assert pipe.options == {}
    assert capsys.readouterr().out == "fox.mp4 (done before)\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
        (["--attention_type", "flash9"], "'flash9'; supported: sdpa"),
    ],
)
def test_what_is_not_there_is_told_before_weights_are_read(
    monkeypatch, tmp_path, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    folder = folder_of(PRESETS["spritewan"])
    monkeypatch.setattr("turbodit.checkpoints.find_model", lambda name: folder)
    assert main(["generate", "a fox", *flags]) == 2
    assert message in capsys.readouterr().err


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from turbodit.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'av', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for arguments in (["--help"], ["--version"], ["generate", "--help"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
