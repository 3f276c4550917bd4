"""The judge: shapes, scores, files; and that its training learns and goes on after a stop."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from turbodit.spritewan import train_judge
from turbodit.spritewan.judge import (
    Judge,
    JudgeConfig,
    Verdict,
    load_judge,
    save_judge,
    score,
)
from turbodit.spritewan.train_judge import Options, augment, judge_loss, train
from turbodit.spritewan.world import BACKGROUNDS, MOTIONS, OBJECTS, Scene, render, scene

SMALL = JudgeConfig(frames=9, size=32, widths=(8, 8, 16, 16))


def certain(scenes) -> Verdict:
    """The verdict of a judge that is always right."""
    objects = torch.zeros(len(scenes), len(OBJECTS))
    motions = torch.zeros(len(scenes), len(MOTIONS))
    backgrounds = torch.zeros(len(scenes), len(BACKGROUNDS))
    for i, s in enumerate(scenes):
        objects[i, list(s.objects)] = 9.0
        motions[i, s.motion] = backgrounds[i, s.background] = 9.0
    return Verdict(objects, motions, backgrounds, torch.zeros(len(scenes), 256))


def test_size_and_shapes():
    judge = Judge()
    assert 1.0e6 < sum(p.numel() for p in judge.parameters()) < 1.5e6
    judge = Judge(SMALL)
    for frames, side in ((9, 48), (33, 40)):
        verdict = judge.predict(torch.zeros(3, frames, 3, side, side, dtype=torch.uint8), batch=2)
        assert verdict.object_logits.shape == (3, len(OBJECTS))
        assert verdict.motion_logits.shape == (3, len(MOTIONS))
        assert verdict.background_logits.shape == (3, len(BACKGROUNDS))
        assert verdict.features.shape == (3, 256)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8), "at least 9 frames, got 8"),
        (torch.zeros(1, 9, 3, 32, 32), "expected uint8"),
        (torch.zeros(1, 3, 9, 32, 32, dtype=torch.uint8), "expected uint8"),
    ],
)
def test_other_inputs_are_refused(video: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        Judge(SMALL).predict(video)


def test_score_counts_both_sprites():
    scenes = [scene(i) for i in range(40)]
    verdict = certain(scenes)
    assert score(verdict, scenes) == {"object": 1.0, "motion": 1.0, "background": 1.0}
    two = next(i for i, s in enumerate(scenes) if len(s.objects) == 2)
    verdict.object_logits[two, scenes[two].objects[1]] = -9.0
    verdict.motion_logits[0] *= -1
    assert score(verdict, scenes) == {"object": 39 / 40, "motion": 39 / 40, "background": 1.0}
    with pytest.raises(ValueError, match="40 verdicts for 39 scenes"):
        score(verdict, scenes[1:])


def test_files_round_trip(tmp_path):
    torch.manual_seed(0)
    judge = Judge(SMALL)
    save_judge(judge, tmp_path)
    again = load_judge(tmp_path)
    assert again.config == SMALL
    video = torch.randint(0, 256, (2, 9, 3, 32, 32), dtype=torch.uint8)
    before, after = judge.predict(video), again.predict(video)
    # bfloat16 keeps 8 bits: each weight moves by at most 2^-9 of itself.
    torch.testing.assert_close(before.features, after.features, rtol=0.05, atol=0.05)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_judge(tmp_path)
    save_judge(Judge(SMALL), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["motions"] = config["motions"][1:]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other motions"):
        load_judge(tmp_path)


def test_augmentation_keeps_the_clip_recognisable():
    frames = Judge(SMALL).prepare(render([scene(0), scene(1)], frames=9))
    changed = augment(frames, torch.Generator().manual_seed(0))
    assert changed.shape == frames.shape and not torch.equal(changed, frames)
    for a, b in zip(frames, changed, strict=True):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9


def test_a_few_steps_fit_a_few_clips():
    torch.manual_seed(0)
    judge = Judge(SMALL)
    scenes = [scene(i) for i in range(4)]
    frames = judge.prepare(render(scenes, frames=9))
    optimizer = torch.optim.AdamW(judge.parameters(), 5e-3)
    totals = []
    for _ in range(15):
        total = torch.stack(list(judge_loss(judge(frames), scenes).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def run(name: str) -> dict[str, torch.Tensor]:
        options = Options(
            tmp_path / name,
            steps=3,
            batch=2,
            evaluation_clips=2,
            save_minutes=0,
            workers=0,
            device="cpu",
        )
        train(options, SMALL)
        return load_file(tmp_path / name / "judge" / "model.safetensors")

    def stopping(clip_id: int) -> Scene:
        if clip_id == 4:
            raise KeyboardInterrupt
        return scene(clip_id)

    straight = run("straight")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_judge, "scene", stopping)
        run("stopped")
    resumed = run("stopped")
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name
    last = json.loads((tmp_path / "stopped" / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "evaluation" and {"object", "motion", "background"} < last.keys()
