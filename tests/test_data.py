"""Reading and writing of videos, pictures, prompts and data sets. All clips are made here, small."""
import builtins
import json
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import SampleNumbers, UserError
from data import (
    VideoDataset,
    center_crop_wide,
    check_dataset,
    clip_image,
    contact_sheet,
    image_tensor,
    opensora_size,
    read_image,
    read_image_prompts,
    read_prompts,
    read_video,
    resize_crop,
    video_info,
    write_video,
)


def ramp(frames=20, h=32, w=48):
    """Grey frames whose level tells their index: frame i is -0.9 + 0.08 i."""
    return (-0.9 + 0.08 * torch.arange(frames)).view(1, -1, 1, 1).expand(3, frames, h, w).contiguous()


def indices(video):
    """Inverse of ramp."""
    return ((video.mean((0, 2, 3)) + 0.9) / 0.08).round().int().tolist()


def fails(what, call, *args, **kw):
    """The call raises a UserError of one line that holds each of `what`."""
    with pytest.raises(UserError) as e:
        call(*args, **kw)
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in what), text


def put(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- pixels

@pytest.mark.parametrize("h,w", [(240, 320), (320, 240), (7, 300), (300, 7), (31, 33), (256, 448), (1, 1)])
@pytest.mark.parametrize("size", [(256, 448), (448, 256), (32, 32), (31, 447)])
def test_resize_crop_covers(h, w, size):
    x = torch.ones(3, 2, h, w)
    y = resize_crop(x, size)
    assert y.shape == (3, 2, *size)
    assert torch.allclose(y, torch.ones(()), atol=1e-5)  # VGen: 320x240 -> 448 leaves a black column
    assert torch.equal(resize_crop(x[:, 0], size), y[:, 0])


@pytest.mark.parametrize("h,w", [(240, 320), (336, 596), (1024, 1024), (7, 300), (300, 7), (31, 33), (1, 1)])
@pytest.mark.parametrize("size", [(256, 448), (704, 1280), (32, 32), (31, 447)])
def test_center_crop_wide_covers(h, w, size):
    white = Image.new("RGB", (w, h), "white")
    for filter in (Image.BOX, Image.NEAREST):
        y = image_tensor(center_crop_wide(white, size, filter))
        assert y.shape == (3, *size) and y.min() == 1  # VGen: a black line at some of these sizes
    clip = clip_image(white, (448, 448)) * torch.tensor(data.CLIP_STD).view(3, 1, 1)
    torch.testing.assert_close(clip.mean((1, 2)) + torch.tensor(data.CLIP_MEAN), torch.ones(3))


def test_resize_crop_is_centred_undistorted_and_antialiased():
    y, x = (torch.arange(100) + 0.5) / 50 - 1, (torch.arange(200) + 0.5) / 50 - 2
    y, x = torch.meshgrid(y, x, indexing="ij")
    disc = ((x ** 2 + y ** 2).sqrt() < 0.5).float().expand(3, 100, 200)
    small = resize_crop(disc, (50, 50))[0]
    assert torch.allclose(small, small.T, atol=1e-4)                     # still round
    assert torch.allclose(small, small.flip(1), atol=1e-4)               # still in the middle
    assert small.mean().item() == pytest.approx(np.pi * 0.5 ** 2 / 4, rel=0.03)
    stripes = torch.arange(64).remainder(2).float().expand(3, 64, 64)
    assert (resize_crop(stripes, (16, 16)) - 0.5).abs().max() < 0.1     # without antialias: all 0 or all 1
    assert resize_crop(disc, (100, 200)) is disc


@pytest.mark.parametrize("names, size", [
    (("2s", "240p", "3:4"), (51, 276, 368)), (("4s", "240p", "9:16"), (102, 240, 426)),
    (("8s", "240p", "1:1"), (204, 320, 320)), (("16s", "360p", "3:4"), (408, 416, 554)),
    (("2s", "480p", "9:16"), (51, 480, 854)), (("2s", "480p", "3:4"), (51, 554, 738)),
    (("2s", "720p", "3:4"), (51, 832, 1110)), (("2s", "144p", "9:16"), (51, 144, 256)),
    (("2s", "240p", "4:3"), (51, 368, 276)), (("2s", "720p", "16:9"), (51, 1280, 720))])
def test_open_soras_names_of_sizes(names, size):
    """The published ones."""
    assert opensora_size(*names) == size


def test_unknown_names_of_sizes():
    fails(["3s", "2s, 4s"], opensora_size, "3s")
    fails(["240", "144p, 240p"], opensora_size, "2s", "240")
    fails(["wide", "9:16"], opensora_size, "2s", "240p", "wide")


def test_read_image(tmp_path):
    red = np.zeros((20, 40, 4), np.uint8)
    red[:, :20] = (255, 0, 0, 255)
    Image.fromarray(red).save(tmp_path / "a.png")
    x = read_image(tmp_path / "a.png")
    assert x.shape == (3, 20, 40) and x.dtype == torch.float32
    assert x[:, 0, 0].tolist() == [1, -1, -1] and x[:, 0, -1].tolist() == [1, 1, 1]  # transparent: white
    assert read_image(tmp_path / "a.png", (33, 17)).shape == (3, 33, 17)
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # shown turned clockwise
    Image.fromarray(red[..., :3]).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.shape == (3, 40, 20) and turned[0, 0].min() == 1 and turned[0, -1].max() == -1
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    fails(["deep.png", "8 bits"], read_image, tmp_path / "deep.png")
    fails(["no.png"], read_image, tmp_path / "no.png")
    fails(["bad.png"], read_image, put(tmp_path / "bad.png", "text"))
    Image.new("L", (5, 4), 255).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").min() == 1


# ---- videos

@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_write_then_read(tmp_path, name):
    path = tmp_path / "new" / name
    t = torch.linspace(0, 1, 12)
    video = torch.sin(t.view(1, 12, 1, 1) * 3 + torch.arange(48) / 10 + torch.arange(3).view(3, 1, 1, 1))
    video = video.expand(3, 12, 32, 48).contiguous()
    write_video(path, video * 1.2, fps=8)                                # out of range: clamped
    back, fps = read_video(path)
    assert back.shape == video.shape and back.dtype == torch.float32 and fps == pytest.approx(8)
    assert video_info(path) == (12, pytest.approx(8), (32, 48))
    assert (back - (video * 1.2).clamp(-1, 1)).abs().mean() < 0.05
    assert -1 <= back.min() and back.max() <= 1
    assert [p.name for p in path.parent.iterdir()] == [name]             # nothing temporary is left
    write_video(path, ramp(5), fps=12.5)                                 # replaces
    assert video_info(path)[:2] == (5, pytest.approx(12.5))
    write_video(path, ramp(1), fps=8)
    assert read_video(path)[0].shape == (3, 1, 32, 48)


def test_mp4_quality_and_odd_sizes(tmp_path):
    torch.manual_seed(0)
    # Grey: what yuv420p loses of the colours (34.6 dB here even without loss) would hide the encoder's part.
    video = resize_crop((torch.rand(1, 4, 32, 43) * 2 - 1).repeat(3, 1, 1, 1), (63, 85))
    write_video(tmp_path / "a.mp4", video)
    back, _ = read_video(tmp_path / "a.mp4")
    assert back.shape == (3, 4, 64, 86)
    psnr = 10 * torch.log10(4 / (back[..., :63, :85] - video).square().mean())
    assert psnr > 40  # measured: 43.0 at our crf 12, 33.4 at x264's default 23
    fails(["NaN"], write_video, tmp_path / "b.mp4", video * float("nan"))
    fails(["(3, frames"], write_video, tmp_path / "b.mp4", video[:, 0])
    fails([".mp4", ".gif"], write_video, tmp_path / "b.avi", video)
    assert not (tmp_path / "b.mp4").exists()


def test_gif_keeps_merged_frames(tmp_path):
    video = ramp(9)
    video[:, 3:7] = video[:, 3:4]                                        # writers merge equal neighbours
    write_video(tmp_path / "a.gif", video, fps=8)
    assert indices(read_video(tmp_path / "a.gif")[0]) == [0, 1, 2, 3, 3, 3, 3, 7, 8]


@pytest.mark.parametrize("suffix,codec", [(".mp4", "libx264"), (".mov", "libx264"), (".avi", "mpeg4"),
                                          (".webm", "libvpx-vp9")])
def test_exact_frames(tmp_path, suffix, codec):
    """The frames VGen's loader loses: exactly F, the first one included, also where headers do not count."""
    path = tmp_path / f"a{suffix}"
    encode(path, data.to_uint8(ramp(20)), codec, rate=16)
    assert video_info(path) == (20, pytest.approx(16), (32, 48))
    assert indices(read_video(path)[0]) == list(range(20))
    video, fps = read_video(path, frames=5, fps=8)
    assert indices(video) == [0, 2, 4, 6, 8] and fps == pytest.approx(8)
    assert indices(read_video(path, frames=5, fps=4, start=3)[0]) == [3, 7, 11, 15, 19]  # up to the last one
    assert indices(read_video(path, frames=3, fps=32, start=17)[0]) == [17, 18, 19]        # stride is never 0
    assert indices(read_video(path, fps=4, start=1)[0]) == [1, 5, 9, 13, 17]
    assert read_video(path, frames=2, size=(40, 24))[0].shape == (3, 2, 40, 24)
    fails(["a" + suffix, "20 frames", "too few"], read_video, path, frames=5, fps=4, start=4)
    fails(["too few"], read_video, path, frames=21)
    fails(["too few"], read_video, path, start=20)


def test_folder_of_pictures(tmp_path):
    for i, frame in enumerate(data.to_uint8(ramp(12))):
        Image.fromarray(frame).save(tmp_path / f"f{i}.png")              # f10 sorts after f9
    put(tmp_path / "notes.txt", "not a frame")
    assert video_info(tmp_path) == (12, 8.0, (32, 48))
    assert indices(read_video(tmp_path, 6, start=5)[0]) == [5, 6, 7, 8, 9, 10]
    Image.new("RGB", (30, 30)).save(tmp_path / "f5.png")
    fails(["frame 5", "(30, 30)"], read_video, tmp_path)
    (tmp_path / "empty").mkdir()
    fails(["empty", "no pictures"], read_video, tmp_path / "empty")


def test_phone_video_is_turned(tmp_path):
    video = ramp(3)
    video[:, :, :8] = 1                                                  # bright upper edge
    write_video(tmp_path / "a.mp4", video)
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = raw.index(b"tkhd") + 4 + 40                                 # version 0: matrix after 40 bytes
    assert raw[matrix:matrix + 4] == b"\0\1\0\0"
    raw[matrix:matrix + 36] = b"".join(int(v).to_bytes(4, "big", signed=True) for v in
                                       (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30))  # clockwise
    put(tmp_path / "a.mp4", bytes(raw))
    assert video_info(tmp_path / "a.mp4")[2] == (48, 32)
    back, _ = read_video(tmp_path / "a.mp4")
    assert back.shape == (3, 3, 48, 32)
    assert back[..., -6:].min() > 0.8 and back[..., :20].max() < 0       # the upper edge is at the right now


def test_bad_videos(tmp_path):
    fails(["no.mp4", "no such"], read_video, tmp_path / "no.mp4")
    fails(["a.mkv3", ".mp4"], read_video, put(tmp_path / "a.mkv3", "x"))
    for name in ("a.mp4", "a.gif", "a.webm"):
        fails([name, "cannot be decoded"], read_video, put(tmp_path / name, "not a video"))
        fails([name, "cannot be decoded"], video_info, put(tmp_path / name, ""))
    write_video(tmp_path / "b.mp4", ramp(20))
    raw = (tmp_path / "b.mp4").read_bytes()
    fails(["b.mp4"], read_video, put(tmp_path / "b.mp4", raw[:len(raw) // 2]))


def encode(path, frames, codec="libx264", fmt="yuv420p", source="rgb24", rate=8, times=None):
    """Frames (numpy, pixel format `source`) -> a video file; times: when each is shown, in 1/rate s."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], fmt
        stream.codec_context.time_base = stream.time_base = Fraction(1, rate)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, source)
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, rate)
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return path


def levels(n, *shape):
    return [np.full(shape, (20 + 10 * i) % 256, np.uint8) for i in range(n)]


def test_hard_videos(tmp_path):
    """Gray, with alpha, of odd size, of changing frame rate: read as any other."""
    gray = encode(tmp_path / "gray.avi", levels(12, 32, 48), "ffv1", "gray", "gray")
    opaque = [np.dstack([level, np.full((32, 48), 255, np.uint8)]) for level in levels(12, 32, 48, 3)]
    alpha = encode(tmp_path / "alpha.mov", opaque, "png", "rgba", "rgba")
    odd = encode(tmp_path / "odd.avi", levels(12, 31, 47), "ffv1", "gray", "gray")
    times = [0, 1, 2, 3, 10, 11, 12, 40, 41, 42, 43, 44]
    uneven = encode(tmp_path / "uneven.mp4", levels(12, 32, 48, 3), rate=24, times=times)
    for path in (gray, alpha, odd, uneven):
        video, _ = read_video(path, 6, start=3, size=(16, 24))
        seen = (video.mean((0, 2, 3)) + 1) * 127.5
        assert video.shape == (3, 6, 16, 24)
        torch.testing.assert_close(seen, 50 + 10.0 * torch.arange(6), atol=3, rtol=0)


def test_cut_off_and_empty_videos(tmp_path):
    whole = encode(tmp_path / "whole.mp4", levels(40, 64, 64, 3)).read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    stream = encode(tmp_path / "noise.avi", list(noise), "mpeg4").read_bytes()
    for name, content in (("half.mp4", whole[:len(whole) // 2]), ("zero.mp4", b""), ("text.mp4", b"<html>"),
                          ("half.avi", stream[:len(stream) // 2])):
        fails([name], read_video, put(tmp_path / name, content), 40)
    assert read_video(tmp_path / "half.avi", 8)[0].shape == (3, 8, 64, 64)  # what is there can be used


def numbered(frame):
    """32 x 96 pixels that show a number below 4,096 as stripes."""
    stripes = np.array([255 * (frame >> b & 1) for b in range(12)], np.uint8)
    return np.kron(stripes, np.ones((32, 8), np.uint8))[..., None].repeat(3, -1)


@pytest.mark.parametrize("times", ["even", "late", "sparse, then dense"])
def test_a_long_film(times, tmp_path):
    """Searched by time where the rate is constant; else counted, or where time does not start at 0."""
    n = 2100 if times == "even" else 800
    at = {"even": range(n), "late": range(450, 450 + n),
          "sparse, then dense": [*range(0, 4 * 400, 4), *range(1600, 1600 + n - 400)]}[times]
    path = encode(tmp_path / "film.mp4", [numbered(i) for i in range(n)], rate=30, times=list(at))
    for start in (0, 299, 301, 310, 500, n - 300, n - 8):
        video, _ = read_video(path, 8, start=start)
        bits = (video[0, :, 16, 4::8] > 0).long()
        assert (bits << torch.arange(12)).sum(1).tolist() == list(range(start, start + 8))


def test_rows_that_stand_twice(clips, capfd):
    put(clips / "a.csv", "video,caption\nc0.mp4,x\nc1.mp4,y\nc0.mp4,x\nc0.mp4,z\n")
    assert len(VideoDataset(clips / "a.csv", 4, 16, 24)) == 4
    assert "row 4" in (err := capfd.readouterr().err) and "1 such" in err
    put(clips / "b.csv", 'video,caption\nc0.mp4,"ein Käse, größer"\nc1.mp4,"猫が走る"\n')
    seen = items(VideoDataset(clips / "b.csv", 4, 16, 24))
    assert [x["text"] for x in seen] == ["ein Käse, größer", "猫が走る"]
    assert not capfd.readouterr().err


def test_without_pyav(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", ramp(3))
    real = builtins.__import__

    def without(name, *args, **kw):
        if name == "av" or name.startswith("av."):
            raise ImportError(f"No module named {name}")
        return real(name, *args, **kw)
    for name in [m for m in sys.modules if m == "av" or m.startswith("av.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    fails(["pip install av", "gif"], write_video, tmp_path / "b.mp4", ramp(3))
    fails(["pip install av", "gif"], read_video, tmp_path / "a.mp4")
    write_video(tmp_path / "a.gif", ramp(3))
    assert indices(read_video(tmp_path / "a.gif")[0]) == [0, 1, 2]


def test_contact_sheet(tmp_path):
    contact_sheet([ramp(20), ramp(3, 16, 16)], tmp_path / "s.png", ["one", "a long caption " * 40], frames=5)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape[1] == 12 + 5 * 96 + 4 * 2 + 12                    # 48 wide, enlarged twice
    assert (sheet[:8] == 255).all() and (sheet[:, :10] == 255).all() and (sheet[-8:] == 255).all()
    levels = sheet[12 + 18 + 30, 12 + 48::98, 0][:5] / 127.5 - 1
    wanted = -0.9 + 0.08 * np.array([0, 5, 10, 14, 19])                  # the first and the last one included
    assert levels == pytest.approx(wanted, abs=0.01)
    contact_sheet([[ramp(8), ramp(8)], [ramp(8), ramp(8)]], tmp_path / "p.png", ["a", "b"], frames=4,
                  headers=["before", "after"], scale=1)
    size = Image.open(tmp_path / "p.png").size
    assert size == (2 * 12 + 2 * (4 * 48 + 3 * 2) + 20, 2 * 12 + 18 + 2 * 50 + 10)
    contact_sheet([torch.zeros(3, 1, 600, 300)], tmp_path / "i.png")     # a large picture is made smaller
    assert Image.open(tmp_path / "i.png").size == (240, 256 + 24)
    fails(["2 rows", "1 captions"], contact_sheet, [ramp(3), ramp(3)], tmp_path / "s.png", ["one"])


# ---- prompts

@pytest.mark.parametrize("name,text", [
    ("a.txt", "# comment\n\n a cat, walking \r\na dog\n"),
    ("a.txt", b"\xef\xbb\xbfa cat, walking\na dog"),
    ("a.csv", 'id,prompt\n0,"a cat, walking"\n\n1,a dog\n'),
    ("a.csv", 'prompt\r\n"a cat, walking"\r\na dog\r\n'),
    ("a.jsonl", '{"prompt": "a cat, walking"}\n\n{"prompt": "a dog", "seed": 3}\n'),
    ("a.json", {"000000.mp4": "a cat, walking", "000001.mp4": "a dog"}),
    ("a.json", ["a cat, walking", "a dog"]),
    ("a.json", [{"prompt": "a cat, walking"}, {"prompt": "a dog"}]),
    ("a.json", [{"path": "x.mp4", "en_caption": "a cat, walking"}, {"caption": "a dog"}]),
    ("a.json", [{"prompt_en": "a cat, walking", "dimension": ["color"]}, {"prompt_en": "a dog"}]),
    ("a.json", {"prompts": {"000000.mp4": "a cat, walking", "000001.mp4": "a dog"}}),
    ("a.json", {"prompts": [{"000000.mp4": "a cat, walking"}, {"000001.mp4": "a dog"}]}),
])
def test_read_prompts(tmp_path, name, text):
    text = text if isinstance(text, (str, bytes)) else json.dumps(text)
    assert read_prompts(put(tmp_path / name, text)) == ["a cat, walking", "a dog"]


@pytest.mark.parametrize("name,text,what", [
    ("a.txt", "", ["a.txt", "empty"]),
    ("a.txt", "\n# only\n", ["a.txt", "comments"]),
    ("a.txt", "caf\u00e9".encode("latin-1"), ["a.txt", "UTF-8"]),
    ("a.txt", "ok\nimg.png|||a cat", ["a.txt row 2", "image-to-video"]),
    ("a.csv", "prompt\na cat, walking\n", ["a.csv row 2", "2 fields", "quotes"]),
    ("a.csv", "id,prompt\n1,a\n\n2\n", ["a.csv row 4", "1 fields"]),
    ("a.csv", "id,prompt\n1,\n", ["a.csv row 2", "prompt", "empty"]),
    ("a.csv", "id,words\n1,a\n", ["a.csv row 2", "`prompt`", "id, words"]),
    ("a.csv", "prompt\n", ["a.csv", "without rows"]),
    ("a.csv", "prompt,prompt\na,b\n", ["a.csv row 1", "twice"]),
    ("a.csv", 'prompt\n"open\n', ["a.csv row", "not valid csv"]),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["a.jsonl row 2", "JSON"]),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', ["a.jsonl row 2", "not a text"]),
    ("a.jsonl", '"a"\n', ["a.jsonl row 1", "object"]),
    ("a.json", "[]", ["a.json"]),
    ("a.json", '"a"', ["a.json"]),
    ("a.json", "{", ["a.json", "JSON"]),
    ("a.json", '["a", ""]', ["a.json entry 2", "empty"]),
    ("a.json", '["a", ["b"]]', ["a.json entry 2", "not a text"]),
    ("a.json", '[{"x": "a", "y": "b"}]', ["a.json entry 1", "x, y"]),
    ("a.yaml", "a", ["a.yaml", ".jsonl"]),
])
def test_bad_prompt_files(tmp_path, name, text, what):
    fails(what, read_prompts, put(tmp_path / name, text))


def test_image_prompts(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a b.png")
    path = put(tmp_path / "list.txt", "# i2v\na b.png|||a cat\n")
    assert read_image_prompts(path) == [(tmp_path / "a b.png", "a cat")]
    fails(["list.txt row 1", "image|||caption"], read_image_prompts, put(path, "a b.png a cat\n"))
    fails(["list.txt row 1", "image|||caption"], read_image_prompts, put(path, "a b.png|||\n"))
    fails(["list.txt row 2", "no.png"], read_image_prompts, put(path, "a b.png|||x\nno.png|||x\n"))
    fails(["none.txt"], read_prompts, tmp_path / "none.txt")


# ---- data sets

@pytest.fixture
def clips(tmp_path):
    for i in range(3):
        write_video(tmp_path / f"c{i}.mp4", ramp(20), fps=8)
        put(tmp_path / f"c{i}.txt", f"clip {i}\n")
    return tmp_path


def items(dataset, epoch=0):
    """Each clip once, as numbers epoch n ... of a run."""
    return [dataset[i, epoch * len(dataset) + i] for i in range(len(dataset))]


def starts(dataset, epoch=0):
    return [indices(item["video"])[0] for item in items(dataset, epoch)]


def test_sources_agree(clips):
    captions = [f"clip {i}" for i in range(3)]
    folder = VideoDataset(clips, 4, 16, 24)
    assert [x["text"] for x in items(folder)] == captions
    assert folder[0, 0]["video"].shape == (3, 4, 16, 24) and folder[1, 1]["path"] == str(clips / "c1.mp4")
    lists = {"a.csv": "video,caption\n" + "".join(f'c{i}.mp4,"clip {i}"\n' for i in range(3)),
             "b.csv": "text,path\n" + "".join(f"clip {i},c{i}.mp4\n" for i in range(3)),
             "c.jsonl": "".join(f'{{"video": "c{i}.mp4", "caption": "clip {i}"}}\n' for i in range(3)),
             "d.txt": "".join(f"c{i}.mp4|||clip {i}\n" for i in range(3))}
    for name, text in lists.items():
        other = VideoDataset(put(clips / name, text), 4, 16, 24)
        assert [x["text"] for x in items(other)] == captions
        assert starts(other) == starts(folder)
        (clips / name).unlink()
    put(clips / "metadata.csv", "file_name,text\nc2.mp4,only this\n")
    assert [x["text"] for x in items(VideoDataset(clips, 4, 16, 24))] == ["only this"]


def test_starts_depend_on_seed_and_number_alone(clips):
    make = lambda seed: VideoDataset(clips, 4, 16, 24, fps=8, seed=seed)
    a = make(0)
    assert starts(a) == starts(a) == starts(make(0)) and starts(make(1)) != starts(a)
    assert starts(a, epoch=1) != starts(a)
    seen = []
    for number in range(100):
        video = a[0, number]["video"]
        assert np.diff(indices(video)).tolist() == [1, 1, 1]
        seen.append(indices(video)[0])
    assert min(seen) == 0 and max(seen) == 16                            # the whole range, both ends


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_where_a_run_stopped(clips, workers):
    """Samples 0, 1, 2 ... of a run, by one process or two, or after a resume: the same clips and starts."""
    def read(*numbers):
        batches = data.read_batches(VideoDataset(clips, 4, 16, 24), list(numbers), seed=5, workers=workers)
        return [(text, indices(v)[0]) for b in batches for text, v in zip(b["text"], b["video"])]
    whole = read([0, 1, 2, 3], [4, 5, 6, 7])
    assert len(set(whole)) > 4 and sorted(t for t, _ in whole[:3]) == ["clip 0", "clip 1", "clip 2"]
    assert read([4, 5], [6, 7]) == whole[4:]
    one, two = read([0, 1], [4, 5]), read([2, 3], [6, 7])
    assert one[:2] + two[:2] + one[2:] + two[2:] == whole


def test_pictures_are_clips_of_one_frame(clips):
    Image.new("RGB", (20, 30), "white").save(clips / "d.jpg")
    put(clips / "d.txt", "white")
    seen = items(VideoDataset(clips, 1, 16, 24))
    assert [x["video"].shape for x in seen] == [(3, 1, 16, 24)] * 4 and seen[3]["video"].min() > 0.9
    fails(["d.jpg", "--frames 1"], VideoDataset, clips, 4, 16, 24)


def test_folder_of_frames_as_clip(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "masks").mkdir()                                         # has no caption: not a clip
    for i, frame in enumerate(data.to_uint8(ramp(6))):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{i}.png")
    put(tmp_path / "frames.txt", "six frames")
    (item,) = items(VideoDataset(tmp_path, 6, 16, 24))
    assert item["text"] == "six frames" and indices(item["video"]) == list(range(6))


@pytest.mark.parametrize("name,text,what", [
    ("a.csv", "video,caption\nc0.mp4,x\nno.mp4,x\n", ["a.csv row 3", "no.mp4"]),
    ("a.csv", "video,caption\nc0.mp4,x\nc1.mp4, \n", ["a.csv row 3", "caption"]),
    ("a.csv", "video,caption\nc0.mp4,x, y\n", ["a.csv row 2", "quotes"]),
    ("a.csv", "clip,caption\nc0.mp4,x\n", ["a.csv row 2", "`video`", "clip"]),
    ("a.jsonl", '{"video": "c0.mp4"}\n', ["a.jsonl row 1", "`caption`"]),
    ("a.txt", "c0.mp4|||x\nc0.mp4\n", ["a.txt row 2", "video|||caption"]),
    ("a.yaml", "x", ["a.yaml", ".csv"]),
])
def test_bad_lists(clips, name, text, what):
    fails(what, VideoDataset, put(clips / name, text), 4, 16, 24)


def test_bad_folders(tmp_path):
    fails(["no such"], VideoDataset, tmp_path / "none", 4, 16, 24)
    fails(["no clips"], VideoDataset, tmp_path, 4, 16, 24)
    write_video(tmp_path / "a.mp4", ramp(5))
    fails(["a.mp4", "a.txt"], VideoDataset, tmp_path, 4, 16, 24)


def test_bad_clips_are_named_skipped_counted_and_limited(clips, capfd):
    put(clips / "c1.mp4", "corrupt")
    a = VideoDataset(clips, 4, 16, 24)
    assert [x["text"] for x in items(a)] == ["clip 0", "clip 2", "clip 2"]      # the next one stands in
    assert int(a.bad.sum()) == 1
    err = capfd.readouterr().err
    assert err.count("bad clip") == 1 and "row 2" in err and "c1.mp4" in err and err.count("\n") == 1
    write_video(clips / "c2.mp4", ramp(3))                               # too short
    b = VideoDataset(clips, 4, 16, 24)
    fails(["2 of 3", "--check", "--frames 4"], lambda: b[1, 1])
    c = VideoDataset(clips, 4, 16, 24)
    with pytest.raises(UserError, match="2 of 3 clips are bad") as e:    # the text survives the worker
        list(data.read_batches(c, [[0, 1, 2]], workers=1))
    assert "Traceback" not in str(e.value) and "\n" not in str(e.value)
    assert int(c.bad.sum()) == 2                                         # and the count
    put(clips / "one.txt", "c1.mp4|||x\n")
    fails(["1 of 1"], lambda: VideoDataset(clips / "one.txt", 4, 16, 24)[0, 0])


# ---- clips of several sizes

@pytest.fixture
def mixed(tmp_path):
    """A list of wide clips of 20 and of 6 frames, a tall one and two pictures, of which one counts three times."""
    for name, frames, h, w in (("w0", 20, 32, 48), ("w1", 20, 32, 48), ("short", 6, 32, 48), ("tall", 20, 48, 32)):
        write_video(tmp_path / f"{name}.mp4", ramp(frames, h, w), fps=8)
    for name in ("p", "q"):
        Image.new("RGB", (48, 32), "white").save(tmp_path / f"{name}.png")
    put(tmp_path / "bad.mp4", "corrupt")
    names = ["w0.mp4", "w1.mp4", "short.mp4", "tall.mp4", "p.png", "q.png", "bad.mp4"]
    return put(tmp_path / "list.csv", "video,caption,repeats\n" + "".join(
        f"{name},{name.split('.')[0]},{3 if name == 'q.png' else 1}\n" for name in names))


SIZES = [(8, 16, 24), (8, 24, 16), (16, 16, 24), (1, 32, 48)]


def test_clips_go_to_the_size_nearest_in_aspect(mixed, capsys):
    def named(sizes, fps=None):
        opened = data.open_clips(mixed, sizes, fps)
        return {size: [row[2] for row in part.rows] for size, part in zip(opened.sizes, opened.parts)}
    pictures = ["short", "p", "q", "bad"]  # one is too short for the others, one cannot be opened
    assert named(SIZES) == {(1, 32, 48): pictures, (8, 24, 16): ["tall"], (16, 16, 24): ["w0", "w1"]}
    said = capsys.readouterr().out
    assert "4 as 1x32x48, 0 as 8x16x24, 1 as 8x24x16, 2 as 16x16x24" in said and said.count("\n") == 1
    assert named(SIZES, fps=4) == {(1, 32, 48): pictures, (8, 16, 24): ["w0", "w1"], (8, 24, 16): ["tall"]}
    fails(["row 6", "--buckets 1x"], data.open_clips, mixed, SIZES[:2])  # none for pictures
    assert data.open_clips(mixed, SIZES[:1] * 2 + SIZES[3:])[4, 0]["size"].tolist() == [1, 32, 48]


def test_repeated_rows_count_so_often_in_an_epoch(mixed):
    (mixed.parent / "bad.mp4").unlink()
    put(mixed, mixed.read_text().replace("bad.mp4,bad,1\n", ""))
    opened = data.open_clips(mixed, [(1, 16, 24)])
    assert len(opened.rows) == 6 and len(opened) == 8
    assert len(opened.parts[0].bad) == 6  # a bad clip is found once
    numbers = numbers_of(batch=8)
    batch, = data.read_batches(opened, numbers)
    assert sorted(batch["text"]) == sorted(["w0", "w1", "short", "tall", "p", "q", "q", "q"])


def numbers_of(batch, accum=1, rank=0, world=1, steps=1, start=0, read=0):
    args = SimpleNamespace(batch=batch, accum=accum, steps=steps)
    return SampleNumbers(args, SimpleNamespace(rank=rank, world=world), start, read)


def test_an_update_reads_one_size_however_it_is_split(mixed):
    opened, steps = data.open_clips(mixed, SIZES), 12

    def read(**how):
        return [list(zip(batch["text"], batch["size"].tolist(), batch["video"].mean((1, 2, 3, 4)).tolist()))
                for batch in data.read_batches(opened, numbers_of(steps=steps, **how), seed=5)]
    whole = read(batch=4)
    assert all(len({tuple(size) for _, size, _ in update}) == 1 for update in whole)
    assert {tuple(size) for update in whole for _, size, _ in update} == {(1, 32, 48), (8, 24, 16), (16, 16, 24)}
    micro = read(batch=1, accum=4)
    assert [sum(micro[i:i + 4], []) for i in range(0, len(micro), 4)] == whole
    one, two = (read(batch=1, accum=2, rank=rank, world=2) for rank in (0, 1))
    turns = [row for pair in zip(one, two) for batch in pair for row in batch]
    assert turns == sum(whole, [])                                       # two processes
    assert read(batch=4, start=5, read=20) == whole[5:]                  # resumed
    fails(["--resume", "--batch"], data.read_batches, opened, numbers_of(batch=3, read=20))


def test_check(clips, capsys):
    assert check_dataset(clips, 4, 16, 24, fps=8) == 0
    assert "3 clips, 0 bad" in capsys.readouterr().out
    put(clips / "c1.mp4", "corrupt")
    write_video(clips / "c2.mp4", ramp(3))
    assert check_dataset(clips, 4, 16, 24) == 2
    out = capsys.readouterr().out
    assert "row 2" in out and "row 3" in out and "too few" in out and "3 clips, 2 bad" in out


def test_check_command(clips):
    def run(*args):
        command = [sys.executable, data.__file__, "--check", str(clips), "--height=16", "--width=24", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    good = run("--frames", "4")
    assert good.returncode == 0 and "3 clips, 0 bad" in good.stdout, good.stderr
    bad = run("--frames", "21")
    assert bad.returncode == 1 and "3 clips, 3 bad" in bad.stdout and "Traceback" not in bad.stderr
