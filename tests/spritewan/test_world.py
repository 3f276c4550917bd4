"""SpriteWorld: the id decides every byte, labels are true of captions and pixels."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from turbodit.spritewan import captions
from turbodit.spritewan.build_sprites import EMOJI, SPRITES
from turbodit.spritewan.contact_sheet import sheet
from turbodit.spritewan.world import (
    BACKGROUNDS,
    FACING,
    FRAMES,
    HELD_OUT,
    MOTIONS,
    OBJECTS,
    SIZE,
    SIZES,
    Scene,
    canonical_caption,
    crowd,
    is_held_out,
    paraphrases,
    render,
    scene,
)

SCENES = [scene(i) for i in range(600)]
HELD_OUT_SCENES = [scene(HELD_OUT + i) for i in range(300)]


def first(motion: str, sprites: int = 1) -> Scene:
    return next(s for s in SCENES if MOTIONS[s.motion] == motion and len(s.objects) == sprites)


def test_the_world_is_as_large_as_promised():
    assert len(OBJECTS) >= 48 and len(MOTIONS) == 11 and len(BACKGROUNDS) == 12
    assert SIZES == ("small", "large")


def test_the_atlas_shows_every_object():
    info = json.loads((SPRITES / "sprites.json").read_text())
    assert sorted(info["names"]) == sorted(OBJECTS) == sorted(EMOJI)
    path = SPRITES / "sprites.png"
    assert path.stat().st_size < 600_000
    with Image.open(path) as atlas:
        alpha = np.asarray(atlas.getchannel("A"))
    side = info["size"]
    for index in range(len(OBJECTS)):
        row, column = divmod(index, info["columns"])
        cell = alpha[row * side :, column * side :][:side, :side]
        assert (cell > 200).mean() > 0.1
        assert not cell[[0, -1]].any() and not cell[:, [0, -1]].any()


def test_tables_speak_of_objects_that_exist():
    assert set().union(FACING, *captions.TRAVEL_VERBS.values()) <= set(OBJECTS)


def test_labels_are_uniform_and_a_fifth_shows_two_sprites():
    seen = np.bincount([s.motion for s in SCENES], minlength=len(MOTIONS))
    assert seen.min() > 0.5 * len(SCENES) / len(MOTIONS)
    seen = np.bincount([s.background for s in SCENES], minlength=len(BACKGROUNDS))
    assert seen.min() > 0.5 * len(SCENES) / len(BACKGROUNDS)
    assert {o for s in SCENES for o in s.objects} == set(range(len(OBJECTS)))
    assert 0.14 < np.mean([len(s.objects) == 2 for s in SCENES]) < 0.26
    assert all(len(set(s.objects)) == len(s.objects) for s in SCENES)


def test_the_id_alone_decides_a_scene():
    again = scene(17)
    assert again is not SCENES[17]
    assert again.caption == SCENES[17].caption
    np.testing.assert_array_equal(again.tracks, SCENES[17].tracks)
    np.testing.assert_array_equal(again.backdrop, SCENES[17].backdrop)
    assert len({s.tracks.tobytes() for s in SCENES}) == len(SCENES)


def test_negative_ids_are_refused():
    with pytest.raises(ValueError, match="got -1"):
        scene(-1)


def test_held_out_combinations_never_occur_in_training():
    def combinations(scenes: list[Scene]) -> set[tuple[int, int, int]]:
        return {(o, s.motion, s.background) for s in scenes for o in s.objects}

    assert not combinations(SCENES) & combinations(HELD_OUT_SCENES)
    assert all(is_held_out(*c) for c in combinations(HELD_OUT_SCENES))
    every = np.ndindex(len(OBJECTS), len(MOTIONS), len(BACKGROUNDS))
    assert 0.04 < np.mean([is_held_out(*c) for c in every]) < 0.06


def test_captions_name_every_label():
    for s in SCENES:
        text = s.caption.lower()
        assert all(any(w in text for w in captions.OBJECT_WORDS[OBJECTS[o]]) for o in s.objects)
        place = captions.BACKGROUND_WORDS[BACKGROUNDS[s.background]]
        assert any(w in text for w in place.anywhere + place.crossing + place.nouns)
        verbs = {v for v, _ in captions.MOTION_WORDS[MOTIONS[s.motion]]}
        verbs |= set(captions.TRAVEL_VERBS)
        assert any(
            re.search(rf"\b{form}\b", text)
            for verb in verbs
            for form in (verb, *captions.VERB_FORMS[verb])
        )


def test_a_caption_never_claims_another_size():
    for s in SCENES:
        other = captions.SIZE_WORDS[SIZES[1 - s.size]]
        assert not any(re.search(rf"\b{word}\b", s.caption.lower()) for word in other)


def test_motion_phrases_tell_motions_apart():
    phrases = [words for motion in MOTIONS for words in captions.MOTION_WORDS[motion]]
    assert len(set(phrases)) == len(phrases)
    assert {verb for verb, _ in phrases} | set(captions.TRAVEL_VERBS) == set(captions.VERB_FORMS)


def test_canonical_and_other_captions():
    assert (
        captions.canonical_caption(["apple", "dog"], "moving left", "snow", "small")
        == "a small apple and a small dog move to the left on a snowy field"
    )
    assert (
        captions.canonical_caption(["unicorn"], "standing still", "sunset")
        == "a unicorn stands still at sunset"
    )
    assert canonical_caption(SCENES[0]).startswith(("a ", "an "))
    several = paraphrases(SCENES[0], 20)
    assert several[0] == SCENES[0].caption and len(set(several)) > 15


def test_sprites_stay_in_the_frame_and_apart():
    for s in SCENES + HELD_OUT_SCENES:
        centre, half = s.tracks[..., :2], s.tracks[..., 2:3] / 2
        assert (centre - half).min() > -0.5 and (centre + half).max() < SIZE + 0.5
        if len(s.objects) == 2:
            distance = np.linalg.norm(centre[0] - centre[1], axis=-1)
            assert (distance > s.tracks[0, :, 2]).all()


def test_bytes_do_not_depend_on_the_batch():
    some = SCENES[20:23]
    together = render(some, frames=2)
    assert together.dtype == torch.uint8 and together.shape == (3, 2, 3, SIZE, SIZE)
    for clip, s in zip(together, some, strict=True):
        assert torch.equal(clip, render([s], frames=2)[0])


@pytest.mark.parametrize("frames", [0, FRAMES + 1])
def test_impossible_frame_counts_are_refused(frames: int):
    with pytest.raises(ValueError, match=f"got {frames}"):
        render(SCENES[:1], frames=frames)


def pixels_of_sprite(s: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Centroid (frames, 2) and area (frames,) of what moves: pixels off the empty background."""
    clip = render([s])[0].float()
    empty = Scene(**{**vars(s), "tracks": s.tracks + np.float32([1e4, 0, 0, 0])})
    mask = ((clip - render([empty], frames=1)[0].float()).abs().amax(dim=1) > 12).float()
    area = mask.sum(dim=(1, 2))
    line = torch.arange(SIZE) + 0.5
    x = (mask.sum(dim=1) @ line) / area
    y = (mask.sum(dim=2) @ line) / area
    return torch.stack([x, y], dim=-1).numpy(), area.numpy()


@pytest.mark.parametrize("motion", MOTIONS)
def test_pixels_move_as_the_label_says(motion: str):
    centre, area = pixels_of_sprite(first(motion))
    dx, dy = centre[-1] - centre[0]
    span_x, span_y = np.ptp(centre, axis=0)
    far, near = 40, 8
    if motion in ("moving left", "moving right"):
        assert (dx if motion == "moving right" else -dx) > far and span_y < near
    elif motion in ("moving up", "moving down"):
        assert (dy if motion == "moving down" else -dy) > far and span_x < near
    elif motion == "moving diagonally":
        assert min(abs(dx), abs(dy)) > far and abs(abs(dx) - abs(dy)) < near
    elif motion == "bouncing":
        assert span_x < near and span_y > far
        turns = np.diff(np.sign(np.diff(centre[:, 1])))
        assert np.count_nonzero(turns) >= 3
    elif motion == "circling":
        radius = np.linalg.norm(centre - SIZE / 2, axis=-1)
        assert min(span_x, span_y) > far and np.ptp(radius) < 2 * near
    else:
        assert max(span_x, span_y) < 2 * near
        growth = area[-1] / area[0]
        if motion == "growing":
            assert growth > 4
        elif motion == "shrinking":
            assert growth < 1 / 4
        else:
            assert 0.8 < growth < 1.25
            changes = np.abs(np.diff(render([first(motion)])[0].float().numpy(), axis=0)).mean()
            assert (changes > 0.05) == (motion == "spinning")


def test_contact_sheet():
    clips = render(SCENES[:2], frames=9)
    picture = sheet(clips, ["one", "two"])
    assert picture.mode == "RGB" and picture.size == (8 * 132 + 4, 2 * 152 + 4)
    with pytest.raises(ValueError, match="1 captions for 2 videos"):
        sheet(clips, ["one"])


def test_a_crowd_shows_its_scene_and_more_sprites() -> None:
    own, full = scene(5), crowd(5, 4)
    assert len(full.objects) >= 4 and full.objects[: len(own.objects)] == own.objects
    plain, crowded = render([own]), render([full])
    assert plain.shape == crowded.shape and not torch.equal(plain, crowded)
    pair = render([own, full])  # clips with different numbers of sprites in one batch
    assert torch.equal(pair, torch.cat([plain, crowded]))
