"""tracks.py: commands, cameras, drawing, meshes, tracks of clips, data sets, --make-tracks."""
import subprocess
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import oracles
import pytest
import test_dist
import torch
from PIL import Image

import das
import data
import tinyworld
import tracks
from data import read_video, video_info, write_video
from tinyworld import HELD_OUT

K = tracks.intrinsics(48, 72)
NEAR, FAR = np.array([0.2, -0.1, 2.0]), np.array([-0.2, 0.1, 8.0])
SCENE = np.stack([NEAR, FAR])


def seen(command, frame=-1, frames=49):
    """How NEAR and FAR move on the screen: (2, 3) differences of x, y, depth from the first frame."""
    poses = tracks.camera_path(command, frames)
    return tracks.project(SCENE, K, poses[frame]) - tracks.project(SCENE, K, poses[0])


# ---- cameras

def test_translations_move_near_points_more():
    for command, axis, sign in (("trans 0.5 0 0", 0, 1), ("trans -0.5 0 0", 0, -1), ("trans 0 0.5 0", 1, 1),
                                ("trans 0 -0.5 0", 1, -1)):
        near, far = sign * seen(command)[:, axis]
        assert near > 3 * far > 0, command  # depths of 2 and 8: a parallax of 4
        assert abs(seen(command)[:, 1 - axis]).max() < 1e-9
    # farther: everything shrinks towards the middle, the near point more
    from_middle = (tracks.project(SCENE, K, np.eye(4)) - [36, 24, 0])[:, :2]
    near, far = (seen("trans 0 0 1")[:, :2] / from_middle).mean(1)
    assert near < far < 0
    near, far = (seen("trans 0 0 -1")[:, :2] / from_middle).mean(1)
    assert near > far > 0
    assert (seen("trans 0 0 1")[:, 2] == 1).all()


def test_rotations_move_near_and_far_points_alike():
    """y > 0: x grows with z: to the right; x > 0: up; z > 0: clockwise on the screen, as y points down."""
    for command, axis, sign in (("rot y 10", 0, 1), ("rot y -10", 0, -1), ("rot x 10", 1, -1),
                                ("rot x -10", 1, 1)):
        near, far = sign * seen(command)[:, axis]
        assert near > 0 and far > 0 and 0.7 < near / far < 1.4, command
    p = tracks.project(SCENE, K, tracks.camera_path("rot z 90")[-1]) - [36, 24, 0]
    q = tracks.project(SCENE, K, np.eye(4)) - [36, 24, 0]
    assert np.allclose(p[:, 0], -q[:, 1]) and np.allclose(p[:, 1], q[:, 0])


def test_spiral_goes_round_and_comes_back():
    poses = tracks.camera_path("spiral 2")
    assert np.allclose(poses[[0, -1]], np.eye(4))
    turn = poses[:, :3, :3]
    assert np.allclose(turn @ turn.transpose(0, 2, 1), np.eye(3))
    x = poses[:, 0, 3]
    assert x.max() > 0.1 and x.min() < -0.1 and (poses[1:-1, 2, 3] < 0).all()


def test_ranges_and_products():
    poses = tracks.camera_path("trans 1 0 0 10 20", 49)
    assert not poses[:11, 0, 3].any() and np.isclose(poses[15, 0, 3], 0.5) and (poses[20:, 0, 3] == 1).all()
    assert np.array_equal(tracks.camera_path("TRANS 1 0 0 20 10"), poses)              # swapped
    assert np.array_equal(tracks.camera_path("trans 1 0 0 -5 99"), tracks.camera_path("trans 1 0 0"))
    both = tracks.camera_path("rot y 30; trans 1 0 0;")
    assert np.allclose(both[-1], tracks.camera_path("rot y 30")[-1] @ tracks.camera_path("trans 1 0 0")[-1])
    assert tracks.camera_path("rot x 5 0 8", 9).shape == (9, 4, 4)


@pytest.mark.parametrize("command, words", [
    ("", "empty"), (" ; ", "empty"), ("pan 1", "'pan 1': unknown; known are trans dx dy dz"),
    ("trans 1 2", "2 values; expected trans dx dy dz [first last]"), ("trans 1 2 3 4", "4 values"),
    ("rot w 5", "axis is x, y or z"), ("rot x ten", "expected numbers"), ("rot x nan", "finite"),
    ("trans 0 0 inf", "finite"), ("spiral 0", "radius"), ("rot x 5 3 3", "same frame (3 of 0 to 48)"),
    ("rot x 5 60 70", "same frame (48"), ("rot x 5 1.5 3", "expected numbers"),
    ("rot y 5; zoom 3", "'zoom 3'")])
def test_bad_camera_commands(command, words, message):
    assert words in message(tracks.camera_path, command)


def test_there_and_back_again():
    rng = np.random.default_rng(0)
    camera = tracks.camera_path("rot y 20; rot x -9; trans 0.3 0.2 1", 5)
    points = np.concatenate([rng.uniform(0, 40, (5, 7, 2)), rng.uniform(1, 9, (5, 7, 1))], axis=2)
    points[2, 3, 2] = 0
    world = tracks.lift(points, K, camera)
    assert not world[2, 3].any()
    back = tracks.project(world, K, camera)
    back[2, 3] = points[2, 3]
    assert np.allclose(back, points)


def test_points_behind_the_camera_vanish():
    poses = tracks.camera_path("trans 0 0 -5")  # past the near point, not past the far one
    p = np.stack([tracks.project(SCENE, K, m) for m in poses])
    assert (p[-1, 0] == 0).all() and p[-1, 1, 2] == 3
    frames = tracks.draw_tracks(p, np.array([[255, 0, 0], [0, 255, 0]], np.uint8), (48, 72))
    assert frames[0, ..., 0].any() and not frames[-1, ..., 0].any() and frames[-1, ..., 1].any()


def test_the_clips_own_camera():
    own, path = tracks.camera_path("rot y 10", 3), tracks.camera_path("trans 1 0 0", 3)
    assert np.allclose(tracks.view(path, own, "append"), path @ own)
    assert np.array_equal(tracks.view(path, own, "override"), path)
    assert np.array_equal(tracks.view(None, own)[2], own[0])


def test_objects_move_by_one_unit_on_all_axes(message):
    start = SCENE.mean(0)
    for name, direction in tracks.DIRECTIONS.items():
        path = tracks.object_path(f"{name} 0.5", 49, unit=4.0)
        path = tracks.about_centre(path, SCENE, np.array([True, True]))
        moved = tracks.move_object(SCENE, np.array([True, False]), path[-1])
        assert np.allclose(moved[0] - SCENE[0], 2 * np.array(direction))
        assert np.array_equal(moved[1], SCENE[1])
    path = tracks.about_centre(tracks.object_path("rot 90"), SCENE, np.array([True, True]))
    turned = tracks.move_object(SCENE, np.array([True, True]), path[-1])
    assert np.allclose(turned.mean(0), start) and np.allclose(turned[0, 0] - start[0], NEAR[2] - start[2])
    points = np.concatenate([SCENE, [[np.inf, 0, 1]]])  # counts for nothing
    path = tracks.about_centre(tracks.object_path("rot 90"), points, np.ones(3, bool))
    assert np.allclose(tracks.move_object(SCENE, np.ones(2, bool), path[-1]), turned)
    assert "'fly 3': unknown" in message(tracks.object_path, "fly 3")
    assert "expected up distance" in message(tracks.object_path, "up")


# ---- colours and drawing

def painter(points, colours, size, half, visible):
    """Far to near, each mark whole: the drawing, one point at a time."""
    frames = np.zeros((len(points), *size, 3), np.uint8)
    for k, frame in enumerate(points):
        for i in sorted(range(len(frame)), key=lambda i: -frame[i, 2]):
            x, y, z = frame[i]
            if not z > 0 or not visible[k, i] or np.isnan(x + y):
                continue
            x, y = int(x), int(y)
            if 0 <= x < size[1] and 0 <= y < size[0]:
                top, left = max(0, y - half[1]), max(0, x - half[0])
                frames[k, top:y + half[1] + 1, left:x + half[0] + 1] = colours[i]
    return frames


@pytest.mark.parametrize("half", [(0, 0), (1, 1), (3, 2)])
def test_drawing_equals_a_painter(half):
    rng = np.random.default_rng(1)
    depth = rng.permutation(600).reshape(3, 200, 1) + 1.0
    points = np.concatenate([rng.uniform(-4, 34, (3, 200, 2)), depth], axis=2)
    points[0, 0, 2], points[0, 1, 0], points[1, 2, 2] = -1, np.nan, np.inf
    colours, visible = rng.integers(1, 256, (200, 3)).astype(np.uint8), rng.random((3, 200)) < 0.9
    ours = tracks.draw_tracks(points, colours, (24, 30), visible, half)
    assert np.array_equal(ours, painter(points, colours, (24, 30), half, visible))


def test_colours():
    colours = tracks.dense_colours(np.linspace(1, 9, 12), (3, 4)).reshape(3, 4, 3)
    assert colours[0, 0, 0] == 0 and colours[2, 3, 0] == 255 and colours[2, 3, 1] == 255
    assert colours[0, 0, 2] == 255 and colours[2, 3, 2] == 0  # near is blue
    flat = tracks.dense_colours(np.full(12, 3.0), (3, 4))
    assert (flat[:, 2] == 127).all()
    assert np.isfinite(tracks.track_colours(np.zeros(3), np.zeros(3), np.array([np.inf, np.inf, 2.0]))).all()


def test_49_dense_frames_of_480x720_take_under_5_seconds():
    y, x = np.mgrid[:480, :720] + 0.5
    depth = 3 + np.sin(x / 50) + np.cos(y / 70)
    points = np.stack([x, y, depth], axis=-1).reshape(1, -1, 3).astype(np.float32)
    args = Namespace(camera="rot y 15; trans 0.3 0 -0.4", poses=None, object=None, frames=49,
                     camera_mode="append", source_poses=None)
    start = time.process_time()
    frames = tracks.moved(args, points, tracks.intrinsics(480, 720))
    video = tracks.draw_tracks(frames, tracks.dense_colours(points[0, :, 2], (480, 720)), (480, 720))
    assert video.shape == (49, 480, 720, 3) and time.process_time() - start < 5


# ---- meshes

def test_rasteriser(message):
    """Two squares: the near one over the far one, colours interpolated as in space, not as on the screen."""
    def square(x, y, s, z):
        return np.array([[x, y, z], [x + s, y, z], [x + s, y + s, z], [x, y + s, z]], dtype=float)
    k = np.array([[10.0, 0, 0], [0, 10, 0], [0, 0, 1]])
    vertices = np.concatenate([square(0, 0, 4, 2), square(0.2, 0.2, 1, 1)])
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    colours = np.repeat([[200.0, 0, 0], [0, 100, 0]], 4, axis=0)
    for order in (faces, faces[::-1]):
        image = tracks.rasterise(vertices, order, colours, k, (24, 26))
        assert (image[:20, :20].reshape(20, 20, 3)[2:12, 2:12] == [0, 100, 0]).all()
        assert (image[0, :20] == [200, 0, 0]).all() and (image[13, 13] == [200, 0, 0]).all()
        assert not image[20:].any() and not image[:, 20:].any()
    slanted = np.array([[0.0, 0, 1], [0, 2, 1], [8, 0, 4], [8, 8, 4]])  # 0 to 20 on the screen, z 1 to 4
    image = tracks.rasterise(slanted, np.array([[0, 1, 2], [1, 3, 2]]),
                             np.array([[0.0, 0, 0], [0, 0, 0], [240, 0, 0], [240, 0, 0]]), k, (10, 20))
    # on the screen half way is 1/5 of the way in space
    assert abs(int(image[5, 9, 0]) - 240 * (0.475 / 4) / (0.475 / 4 + 0.525)) < 3
    behind = vertices - [0, 0, 1.5]
    image = tracks.rasterise(behind, faces, colours, k, (24, 26))
    assert (image[..., 1] == 0).all() and image[..., 0].any()  # the near square is gone
    assert not tracks.rasterise(vertices - [0, 0, 9], faces, colours, k, (8, 8)).any()


def test_mesh_colours_follow_the_first_frame():
    k = tracks.intrinsics(48, 72)
    vertices = np.array([[0.0, 0, 2], [0.3, 0, 2.5], [50, 0, 2], [0, 0, -1]])
    colours = tracks.mesh_colours(vertices, k, (48, 72))
    assert colours[0, 0] == 127 and colours[1, 0] > 127 and not colours[2:].any()


# ---- tracks of a clip

def test_flow_is_chained_and_checked():
    video = torch.zeros(3, 4, 20, 30)

    def flow(a, b):
        """Right by 3, and back again, but not in the upper half: there the flow back leads astray."""
        forward = flow.calls % 2 == 0
        flow.calls += 1
        field = torch.zeros(1, 2, 20, 30)
        field[:, 0] = 3.0 if forward else -3.0
        if not forward:
            field[:, 0, :10] = 3.0
        return field
    flow.calls = 0
    xy, visible = tracks.follow(video, np.array([[2.0, 15], [25, 15], [2, 4]]), flow)
    assert np.allclose(xy[:, 0], [[2, 15], [5, 15], [8, 15], [11, 15]])
    assert visible[:, 0].all() and visible[:, 1].tolist() == [True, True, False, False]  # has left
    assert visible[:, 2].tolist() == [True, False, False, False]


def test_grid_is_the_published_one():
    xy = tracks.grid_points(480, 720).reshape(70, 70, 2)
    assert np.allclose(xy[0, 0], 11.25) and np.allclose(xy[-1, -1], [720 - 11.25, 480 - 11.25])
    assert np.allclose(xy[3, 5], [(9 + 5 / 69 * 558) * 1.25, (9 + 3 / 69 * 366) * 1.25])


def test_depth_by_transformers(tmp_path, message):
    """A small network of random weights in each of the two kinds of output: nearness and distances."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )
    video = torch.rand(3, 2, 30, 40) * 2 - 1
    depths = []
    for kind in ("relative", "metric"):
        backbone = Dinov2Config(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, patch_size=14, image_size=56,
            out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True)
        torch.manual_seed(0)
        DepthAnythingForDepthEstimation(DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8, head_hidden_size=4, depth_estimation_type=kind,
            max_depth=20)).save_pretrained(tmp_path / kind)
        prepare = DPTImageProcessor(size={"height": 56, "width": 56}, ensure_multiple_of=14)
        prepare.save_pretrained(tmp_path / kind)
        depths.append(tracks.depth_estimator(str(tmp_path / kind))(video).numpy())
        near = tracks.depth_estimator(str(tmp_path / kind), inverse=True)(video)  # VideoComposer's range
        assert near.dtype == torch.float32 and abs(float(near.max()) - 2) < 1e-6 and near.min() > 0
    assert all(d.shape == (2, 30, 40) and np.isfinite(d).all() for d in depths)
    assert depths[0].min() >= 1 - 1e-9 and depths[0].max() <= 10 + 1e-9 and 0 < depths[1].max() <= 20
    assert "--depth-model none" in message(tracks.depth_estimator, "none")


def test_depth_by_midas(tmp_path, monkeypatch):
    """Its public file gives VideoComposer's range as published, and distances for cameras, at any size."""
    case = oracles.Case(Path(__file__).parent / "oracle_data" / "tft2v_unet" / "midas_tiny.json")
    state = {key: oracles.fill_tensor(key, shape) for key, shape in case.params.items()}
    torch.save(state, tmp_path / "midas.pth")
    small = partial(tracks.MiDaS, 32, 4, 4, 16, 64, (8, 16, 32, 32), 16)
    monkeypatch.setattr(tracks, "MiDaS", small)
    video = torch.rand(3, 2, 32, 64) * 2 - 1
    with torch.no_grad():
        raw = small().from_public(state, "test")(video.transpose(0, 1))
    near = tracks.depth_estimator(tmp_path / "midas.pth", inverse=True)(video)
    assert torch.allclose(near, (raw / 20).clamp(0, 10), atol=1e-6) and raw.std() > 0
    distance = tracks.depth_estimator(tmp_path / "midas.pth")
    assert torch.allclose(distance(video), 1 / (0.1 + 0.9 * raw / raw.max()), atol=1e-4)
    assert distance(torch.rand(3, 2, 40, 60) * 2 - 1).shape == (2, 40, 60)


# ---- data sets

@pytest.fixture
def listed(tmp_path):
    """A data set in DaS's layout: five clips of 9 and three of 20 frames of 16 x 24 pixels."""
    names = {"prompt.txt": [], "videos.txt": [], "trackings.txt": []}
    for i in range(8):
        frames = 9 if i < 5 else 20
        shade = torch.linspace(-1, 1, frames)[None, :, None, None].expand(3, frames, 16, 24)
        write_video(tmp_path / f"videos/{i}.mp4", shade)
        write_video(tmp_path / f"tracking/{i}.mp4", -shade)
        for name, line in zip(names, (f"clip {i}", f"videos/{i}.mp4", f"tracking/{i}.mp4")):
            names[name].append(line)
    for name, lines in names.items():
        (tmp_path / name).write_text("\n\n".join(lines) + "\n")
    return tmp_path


def test_published_layout_csv_and_buckets(listed, message):
    short, = tracks.in_buckets(listed, [(9, 16, 24)])
    assert len(short) == 8
    short, long = tracks.in_buckets(listed, [(17, 16, 24), (9, 16, 24), (17, 480, 720)])
    assert (len(short), len(long)) == (5, 3)
    item = long[1, 0]
    assert item["video"].shape == item["tracks"].shape == (3, 17, 16, 24) and item["text"] == "clip 6"
    assert (item["video"] + item["tracks"]).abs().max() < 0.05  # the same frames of both
    item = tracks.in_buckets(listed, [(9, 16, 24)])[0][7, 0]    # 20 frames as 9: every second
    assert abs(float(item["video"][0, 8].mean()) - (-1 + 2 * 16 / 19)) < 0.05
    (listed / "list.csv").write_text("video,tracking,caption\nvideos/6.mp4,tracking/6.mp4,a clip\n")
    assert len(tracks.in_buckets(listed / "list.csv", [(9, 16, 24)])[0]) == 1
    (listed / "prompt.txt").write_text("one\ntwo\n")
    assert "prompt.txt 2, videos.txt 8" in message(tracks.in_buckets, listed, [(9, 16, 24)])
    (listed / "list.csv").write_text("video,caption\nvideos/6.mp4,a clip\n")
    assert "no `tracking`" in message(tracks.in_buckets, listed / "list.csv", [(9, 16, 24)])
    assert "no such folder" in message(tracks.in_buckets, listed / "none", [(9, 16, 24)])


def test_bad_pairs_of_clips(listed, message, capsys):
    (listed / "list.csv").write_text("video,tracking,caption\nvideos/6.mp4,tracking/0.mp4,a\n")
    part, = tracks.in_buckets(listed / "list.csv", [(9, 16, 24)])
    assert "1 of 1 clips are bad" in message(part.__getitem__, (0, 0))
    assert "20 frames, but its tracking video 0.mp4 has 9" in capsys.readouterr().err
    (listed / "list.csv").write_text("video,tracking,caption\nvideos/6.mp4,none.mp4,a\n")
    assert "row 2" in message(tracks.in_buckets, listed / "list.csv", [(9, 16, 24)])
    part, = tracks.in_buckets(listed, [(33, 16, 24)])  # all too short
    assert "clips are bad" in message(part.__getitem__, (0, 0))
    assert "too few for 33" in capsys.readouterr().err


def test_held_out_clips_are_not_trained_on(listed, tmp_path, message, capsys):
    size = 9, 16, 24
    parts = tracks.in_buckets(listed, [size, (17, 16, 24)])
    training, held_out = tracks.hold_out(parts, size, 2)
    assert [len(part) for part in training] == [3, 3] and len(held_out) == 2
    assert [held_out[i, i]["text"] for i in range(2)] == ["clip 3", "clip 4"]
    assert [training[0][i, i]["text"] for i in range(3)] == ["clip 0", "clip 1", "clip 2"]
    training[0].bad[0] = True  # workers and training share what they know of bad clips
    assert parts[0].bad.tolist() == [True] + 4 * [False] and not held_out.bad.any()
    assert not capsys.readouterr().err
    training, held_out = tracks.hold_out(parts, size, 5)
    assert training is parts and held_out is parts[0]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "evaluation is on training clips" in warning
    (listed / "list.csv").write_text("video,tracking,caption\nvideos/6.mp4,tracking/6.mp4,another\n")
    others = tracks.in_buckets(listed / "list.csv", [size])
    training, held_out = tracks.hold_out(parts, size, 5, others)
    assert training is parts and held_out[0, 0]["text"] == "another"
    assert "a smaller --frames" in message(tracks.hold_out, parts, (33, 16, 24), 1)


def test_batches_of_buckets():
    lengths, group = [10, 3, 1], 4
    epoch = 3 + 1 + 1
    whole = data.bucket_indices(lengths, 0, 20 * epoch * group, group)
    parts = [x for i in range(0, len(whole), 2) for x in data.bucket_indices(lengths, i, 2, group)]
    assert parts == whole                                                      # however it is split
    places = [(k, i) for k, n in enumerate(lengths) for i in range(n)]
    whole = [places[i] for i in whole]
    groups = [whole[i:i + group] for i in range(0, len(whole), group)]
    assert all(len({bucket for bucket, _ in g}) == 1 for g in groups)          # one size an update
    order = [g[0][0] for g in groups]
    assert all(sorted(order[i:i + epoch]) == [0, 0, 0, 1, 2] for i in range(0, len(order), epoch))
    assert len({tuple(order[i:i + epoch]) for i in range(0, len(order), epoch)}) > 5   # shuffled
    for bucket, n in enumerate(lengths):
        items = [i for b, i in whole if b == bucket]
        assert all(sorted(items[i:i + n]) == list(range(n)) for i in range(0, len(items) - n, n))
    single = data.bucket_indices([7], 3, 20, 4, seed=5)
    assert single == data.batch_indices(7, 3, 20, 5)                         # one bucket: as everywhere


# ---- the tiny world

@pytest.mark.parametrize("motion", tinyworld.TINY_TRACKS)
def test_tiny_tracks_are_where_the_object_is(motion):
    from tinyworld import position_error
    for i in range(20):
        item, scene = tinyworld.tiny_track_clip((0, HELD_OUT, i), motion, 9)
        assert position_error(item["video"], scene.x, scene.y) < 0.02
        blue = (item["tracks"][2] > 0.5).float()
        x = (blue.sum(1) * (torch.arange(32) + 0.5)).sum(1) / blue.sum((1, 2))
        assert abs(x.numpy() - scene.x).max() < 1.2
        corner = item["tracks"][:, :, 0, 0]  # of the background: still, but for the camera
        assert motion == "camera" or scene.x.min() < 12 or (corner == corner[:, :1]).all()
        assert scene.x.min() > 4 and scene.x.max() < 28
        assert not {"zigzagging", "camera"} & set(item["text"].split())


def test_position_error_of_nothing_is_half_a_frame():
    from tinyworld import position_error
    assert position_error(torch.zeros(3, 9, 32, 32), np.full(9, 16.0), np.full(9, 16.0)) == 0.5


# ---- das.py --make-tracks

@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a picture, its depth and masks, a clip, tracks, a mesh and a tracker."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save("photo.png")
    depth = np.full((40, 60), 6.0)
    depth[10:30, 20:40] = 2
    np.save("depth.npy", depth)
    mask = np.zeros((40, 60), np.uint8)
    Image.fromarray(mask).save("empty.png")
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save("mask.png")
    np.save("zero.npy", depth * 0)
    depth[10:30, 20:40] = np.inf
    np.save("hole.npy", depth)
    write_video("clip.mp4", torch.rand(3, 20, 40, 60) * 2 - 1, 10)
    (tmp_path / "clips").mkdir()
    for name, frames in (("a", 12), ("b", 4)):
        write_video(f"clips/{name}.mp4", torch.rand(3, frames, 40, 60) * 2 - 1)
        (tmp_path / f"clips/{name}.txt").write_text(f"a clip {name}")
    xy = np.stack(np.broadcast_arrays(np.arange(9)[:, None] + [5.0, 20, 40], [[9.0, 9, 9]]), axis=-1)
    np.save("flat.npy", xy)
    triangle = np.array([[-1, -1, 3], [1, -1, 3], [0, 1, 4.0]])
    vertices = triangle + np.linspace(0, 1, 9)[:, None, None] * [1, 0, 0]
    np.savez("mesh.npz", vertices=vertices, faces=[[0, 1, 2]])
    np.save("poses.npy", tracks.camera_path("trans 0.5 0 0", 9))
    np.save("crooked.npy", np.tile(2 * np.eye(4), (9, 1, 1)))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def right(video, queries):\n"
        "    steps = np.arange(video.shape[1])[:, None, None] * [1.0, 0.0]\n"
        "    return queries + steps, np.ones((video.shape[1], len(queries)))\n"
        "def short(video, queries):\n    return queries[None], None\n")
    return tmp_path


SMALL = ["--frames", "9", "--height", "40", "--width", "60", "--out", "out"]


def make(*words):
    das.main(["--make-tracks", *words, *SMALL])
    return read_video("out/tracks.mp4")[0]


def centre(mask):
    """x of the centre of what is true in (h,w)."""
    return float((mask.float().sum(0) * torch.arange(mask.shape[1])).sum() / mask.sum())


def test_of_a_picture(place):
    video = make("photo.png", "--depth", "depth.npy", "--camera", "trans 0.5 0 0")
    near = video[2] > 0.5
    assert near[0].sum() > 350 and centre(near[-1]) - centre(near[0]) > 8
    assert (video[:, -1, 20, :2] < -0.8).all()  # uncovered: black
    assert Image.open("out/first.png").size == (60, 40) and (place / "out/sheet.png").exists()
    same = make("photo.png", "--depth", "depth.npy", "--poses", "poses.npy")
    assert torch.equal(same, video)
    video = make("photo.png", "--depth", "depth.npy", "--mask", "mask.png", "--object", "right 0.3 0 4")
    near = video[2] > 0.5
    focal = tracks.intrinsics(40, 60)[0, 0]
    assert abs(centre(near[-1]) - centre(near[0]) - 0.3 * focal) < 1.5  # 0.3 of its depth
    assert (near[4] == near[8]).float().mean() > 0.99
    assert (video[:, :, 2, 2] - video[:, :1, 2, 2]).abs().max() < 0.1
    video = make("photo.png", "--depth", "hole.npy", "--camera", "rot z 3", "--fov", "70")
    assert video[:, 0, 20, 30].max() < -0.8  # no depth, no point


def test_of_a_clip_of_tracks_and_of_a_mesh(place, capsys):
    video = make("clip.mp4", "--tracker", "mine.py:right", "--grid", "10")
    assert video_info("out/tracks.mp4")[:2] == (9, 5) and (video > 0).any()
    moved = make("clip.mp4", "--tracker", "mine.py:right", "--grid", "10", "--depth", "depth.npy",
                 "--camera", "trans 0 1 0", "--source-poses", "poses.npy", "--camera-mode", "override")
    assert not torch.equal(video, moved)
    video = make("flat.npy")
    lit = (video > -0.8).any(0)
    assert abs(centre(lit[8, :, :18]) - centre(lit[0, :, :18]) - 8) < 1.5
    video = make("mesh.npz")
    assert centre((video[:, 8] > -0.8).any(0)) > centre((video[:, 0] > -0.8).any(0)) + 8
    (place / "mesh").mkdir()
    for k in range(9):
        corners = f"v -1 -1 3\nv 1 -1 3\nv {k / 9} 1 4\nv 9 9 9\n"
        (place / f"mesh/frame_{k}.obj").write_text(corners + "f 1/1 2/1 -2/3\n")
    make("mesh", "--camera", "rot z 20")
    capsys.readouterr()
    make("photo.png", "--depth", "depth.npy", "--camera", "trans 0 0 -7")  # through everything
    assert "nearly no points" in capsys.readouterr().err


def test_raft_takes_weights_from_a_file(place):
    """Of random weights: what it finds is nothing, but it finds it for each point."""
    from torchvision.models.optical_flow import raft_small
    torch.save(raft_small().state_dict(), "raft.pth")
    das.main(["--make-tracks", "clip.mp4", "--flow-weights", "raft.pth", "--flow-size", "small", "--frames",
              "2", "--height", "40", "--width", "60", "--grid", "6", "--out", "out"])
    assert video_info("out/tracks.mp4")[0] == 2


def test_of_a_folder_of_clips(place, capsys):
    das.main(["--make-tracks", "clips", "--tracker", "mine.py:right", "--grid", "5", *SMALL])
    assert "row 2" in capsys.readouterr().err  # b is too short
    part, = tracks.in_buckets("out", [(9, 40, 60)])
    assert len(part) == 1 and part[0, 0]["text"] == "a clip a"
    stamp = (place / "out/tracking/00001_tracking.mp4").stat().st_mtime_ns
    das.main(["--make-tracks", "clips", "--tracker", "mine.py:right", "--grid", "5", *SMALL])
    assert (place / "out/tracking/00001_tracking.mp4").stat().st_mtime_ns == stamp  # kept


@pytest.mark.slow
def test_processes_share_the_clips_of_a_data_set(place):
    """Two processes make the data set that one makes: each clip once, none lost, the lists in order."""
    for i in range(5):
        write_video(f"many/{i}.mp4", torch.rand(3, 9 if i != 3 else 4, 40, 60) * 2 - 1)
        (place / f"many/{i}.txt").write_text(f"clip {i}")
    written = {}
    for processes in (1, 2):
        words = test_dist.command(
            processes, str(test_dist.ROOT / "das.py"), "--make-tracks", "many", "--tracker", "mine.py:right",
            "--grid", "5", *SMALL[:-1], f"out{processes}")
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("4 clips with tracks, 1 left out") == 1
        assert done.stderr.count("many row 4: ") == 1 and "cannot be written" not in done.stderr
        out = place / f"out{processes}"
        written[processes] = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert written[1].keys() == written[2].keys() and len(written[1]) == 3 + 2 * 4
    for name in ("prompt.txt", "videos.txt", "trackings.txt"):
        assert written[1][name] == written[2][name]
    assert written[1]["prompt.txt"].decode().split("\n")[:4] == ["clip 0", "clip 1", "clip 2", "clip 4"]


def test_one_process_makes_one_video(place):
    words = test_dist.command(2, str(test_dist.ROOT / "das.py"), "--make-tracks", "flat.npy", *SMALL)
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("tracks.mp4") == 1 and video_info("out/tracks.mp4")[0] == 9


@pytest.mark.parametrize("words, text", [
    ("none.png", "no such file"), ("mine.py", "wanted a picture"), ("photo.png", "say what moves"),
    ("photo.png --camera 'rot y 5'", "needs depth"), ("clip.mp4 --camera 'rot y 5'", "needs depth"),
    ("photo.png --camera 'pan 5'", "'pan 5': unknown"),
    ("photo.png --camera 'rot y 5' --poses poses.npy", "leave one out"),
    ("photo.png --object 'up 1'", "--mask and --object"),
    ("photo.png --mask mask.png", "--mask and --object"),
    ("photo.png --depth depth.npy --mask mask.png --object 'fly 1'", "'fly 1'"),
    ("photo.png --depth depth.npy --mask empty.png --object 'up 1'", "empty.png: empty: no pixel is white"),
    ("photo.png --depth hole.npy --mask mask.png --object 'up 1'", "no point with a depth"),
    ("photo.png --depth zero.npy --camera 'rot y 5'", "no value above 0"),
    ("photo.png --depth text.npy --camera 'rot y 5'", "not a .npy"),
    ("photo.png --depth flat.npy --camera 'rot y 5' --intrinsics 500 500 30 20", "shares of width"),
    ("photo.png --depth depth.npy --poses crooked.npy", "no rotation"),
    ("photo.png --depth depth.npy --poses flat.npy", "world-to-camera"),
    ("clip.mp4 --tracker mine.py:left", "no function left"), ("clip.mp4 --tracker none.py:f", "no such file"),
    ("clip.mp4 --tracker mine.py:short", "tracks of shape"),
    ("clips/b.mp4 --tracker mine.py:right", "4 frames"),
    ("clip.mp4 --frames 25 --tracker mine.py:right", "20 frames instead of 25; try --frames 17"),
    ("clips --camera 'rot y 5'", "as they are"), ("flat.npy --frames 12", "9 frames instead of 12"),
    ("mesh.npz --frames 12", "9 frames of a mesh"),
    ("mesh.npz --mask mask.png --object 'up 1'", "the mesh itself")])
def test_bad_sources(words, text, place, message):
    import shlex
    words = shlex.split(words)
    small = SMALL[2:] if "--frames" in words else SMALL
    assert text in message(das.main, ["--make-tracks", *words, *small])
    assert not (place / "out").exists()
