"""What people feed it: trimmed, turned, stretched, cut and odd clips. All are made here, small."""
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import VideoDataset, read_video, video_info, write_video
from hostile import MANY, cases  # noqa: F401
from test_data import fails, put

RED = [200, 60, 30]


def make(path, pictures, codec="libx264", pix="yuv420p", rate=25, times=None, tags=(0, 0), sar=None, **options):
    """Pictures (numpy, rgb or rgba; or frames) -> a video. times: of each in 1/600 s; tags: matrix, range."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate, {k: str(v) for k, v in options.items()})
        first = pictures[0]
        h, w = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        stream.height, stream.width, stream.pix_fmt = h, w, pix
        context = stream.codec_context
        if sar:
            context.sample_aspect_ratio = sar
        if any(tags):
            context.colorspace, context.color_range = tags
        for i, frame in enumerate(pictures):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, "rgba" if frame.shape[2] == 4 else "rgb24")
                frame = frame.reformat(format=pix)
            frame.pts, frame.time_base = (times[i], Fraction(1, 600)) if times else (i, 1 / Fraction(rate))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def greys(n, h=32, w=48):
    """Frame i is grey 10 + 2 i."""
    return [np.full((h, w, 3), 10 + 2 * i, np.uint8) for i in range(n)]


def seen(video):
    """Which of greys() a clip shows, to a frame."""
    return ((video.mean((0, 2, 3)) + 1) * 127.5 - 10) / 2


def shows(path, wanted, rate, **choice):
    """The clip holds these frames of greys(), and video_info says so."""
    video, fps = read_video(path, **choice)
    torch.testing.assert_close(seen(video), torch.tensor(list(wanted)).float(), atol=0.8, rtol=0)
    assert fps == pytest.approx(rate, rel=1e-3)
    if not choice:
        assert video_info(path) == (video.shape[1], pytest.approx(rate, rel=1e-3), tuple(video.shape[2:]))


def pixel(path, y=0.5, x=0.5):
    """Colour of the first frame there."""
    frame = (read_video(path)[0][:, 0] + 1) * 127.5
    return frame[:, int(y * frame.shape[1]), int(x * frame.shape[2])].round().int().tolist()


def copy(source, target, change=lambda packet, i: packet, **options):
    """Packets of a clip -> another container, as ffmpeg -c copy; change(packet, number) -> packet or None."""
    with av.open(str(source)) as file, av.open(str(target), "w", **options) as out:
        stream = file.streams.video[0]
        copied = out.add_stream_from_template(stream)
        for i, packet in enumerate([p for p in file.demux(stream) if p.size]):
            packet = change(packet, i)
            if packet is not None:
                packet.stream = copied
                out.mux(packet)
    return target


def trim(source, target, first, count, **options):
    """As ffmpeg -ss -t -c copy: from the key frame before `first`, the lead-in hidden by an edit list."""
    def change(packet, i):
        step = int(Fraction(1, 25) / packet.time_base)
        if packet.pts >= (first + count) * step or packet.dts < key(first) * step - 2 * step:
            return None
        packet.pts, packet.dts = packet.pts - first * step, packet.dts - first * step
        return packet

    def key(first):
        with av.open(str(source)) as file:
            return max(round(p.pts * p.time_base * 25) for p in file.demux(video=0)
                       if p.size and p.is_keyframe and p.pts * p.time_base * 25 <= first)
    return copy(source, target, change, **options)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make(tmp_path_factory.mktemp("film") / "film.mp4", greys(100), g=50, bf=2)


# ---- times

@pytest.mark.parametrize("suffix,first,count", [(".mp4", 70, 20), (".mp4", 99, 1), (".mov", 50, 20), (".mp4", 0, 5)])
def test_trimmed_without_encoding(film, tmp_path, suffix, first, count):
    path = trim(film, tmp_path / f"a{suffix}", first, count)
    shows(path, range(first, first + count), 25)
    fails(["too few"], read_video, path, count, None, 1)
    rows = [(1, path, "x")]
    for number in range(5):  # training never draws a start past the end
        VideoDataset("list", max(1, count - 2), 16, 16, rows=rows)[0, number]


def test_lead_in_that_cannot_be_decoded(film, tmp_path, capfd):
    for name in ("a.mp4", "a.webm"):
        path = copy(film, tmp_path / name, lambda p, i: p if i >= 20 else None,
                    format="matroska" if name == "a.webm" else None)
        video = seen(read_video(path)[0])
        assert len(video) == video_info(path)[0] <= 51 and video[0] > 48 and video[-1] > 98
        assert "cannot be decoded" in capfd.readouterr().err
        assert read_video(path, 16, start=30)[0].shape[1] == 16


@pytest.mark.parametrize("fmt,codec", [("mpegts", "libx264"), ("h264", "libx264"), ("avi", "libx264"),
                                       ("flv", "libx264"), ("matroska", "libx264")])
def test_containers_under_a_wrong_name(tmp_path, fmt, codec):
    """Late starts, times that are missing, headers that do not count."""
    name = {"mpegts": "a.ts", "matroska": "a.mkv"}.get(fmt, f"a.{fmt}")
    path = make(tmp_path / name, greys(30), codec)
    shows(path.rename(tmp_path / "a.mp4"), range(30), 25)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 24, 25, 20, 30, Fraction(30000, 1001), 60, 120])
def test_read_fps(tmp_path, rate):
    path = make(tmp_path / "a.mp4", greys(70), rate=rate)
    assert video_info(path)[1] == pytest.approx(float(rate), rel=1e-9)
    times = np.arange(8) / 16 * float(rate)
    video, fps = read_video(path, 8, 16)
    assert fps == 16 and (seen(video) - torch.tensor(times)).abs().max() <= 0.5 + 0.8
    assert read_video(path, 4, 500)[1] == pytest.approx(float(rate))  # a slow clip keeps its rate


@pytest.mark.parametrize("suffix,codec", [(".mp4", "libx264"), (".webm", "libvpx-vp9"), (".webm", "libvpx")])
def test_variable_rate(tmp_path, suffix, codec):
    times = [20 * i for i in range(15)] + [300 + 120 * i for i in range(15)]  # 30 fps, then 5 fps
    path = make(tmp_path / f"a{suffix}", greys(30), codec, rate=30, times=times)
    count, rate, _ = video_info(path)
    assert count == 30 and 8.5 < rate < 10
    shows(path, range(30), rate)
    spread = make(tmp_path / f"b{suffix}", [x * 4 for x in greys(30)], codec, rate=30, times=times)
    video, fps = read_video(spread, 8, 4)
    found = ((video.mean((0, 2, 3)) + 1) * 127.5 - 40) / 8
    assert fps == 4 and found.tolist() == pytest.approx([0, 7, 15, 16, 17, 19, 20, 21], abs=0.4)
    assert read_video(path, 8, 16)[1] == 16  # as fast as its fast part


def test_a_frame_that_lasts_an_hour(tmp_path):
    still = make(tmp_path / "a.mp4", greys(8), times=[0, 24, 48, *range(2160000, 2160120, 24)])
    assert read_video(still, 4, 10)[0].shape[1] == 4
    fails(["a.mp4", "MEDIA_LIMIT"], read_video, still, fps=10, size=(64, 64))
    frames = [Image.fromarray(x) for x in greys(12)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[10] + [655350] * 11)
    fails(["a.gif", "655"], video_info, tmp_path / "a.gif")


# ---- pixels

@pytest.mark.parametrize("matrix,upright", [
    ((1, 0, 0, 1), lambda x: x), ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)), ((0, -1, 1, 0), np.rot90),
    ((-1, 0, 0, 1), lambda x: x[:, ::-1]), ((1, 0, 0, -1), lambda x: x[::-1]),
    ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    ((0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2))])
@pytest.mark.parametrize("sar", [1, Fraction(3, 2)])
def test_every_orientation(tmp_path, matrix, upright, sar):
    """Turned by quarters, mirrored (front cameras), with pixels that are not square."""
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :16], picture[16:, :24] = 255, 120
    path = make(tmp_path / "a.mp4", [picture] * 3, sar=sar)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    a, b, c, d = (v << 16 for v in matrix)
    raw[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    put(path, bytes(raw))
    wide = np.array(Image.fromarray(picture).resize((int(48 * sar), 32)))
    wanted = upright(wide)
    found = data.to_uint8(read_video(path)[0])[0]
    assert found.shape == wanted.shape and video_info(path)[2] == wanted.shape[:2]
    assert np.abs(found.astype(int) - wanted).mean() < 12


def test_absurd_pixels(tmp_path, monkeypatch):
    path = make(tmp_path / "a.mp4", greys(3), sar=Fraction(2, 1))
    assert video_info(path)[2] == (32, 96)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"pasp") + 4
    raw[at:at + 8] = struct.pack(">2I", 2000, 1)
    put(path, bytes(raw))
    fails(["a.mp4", "100 times"], read_video, path)
    Image.new("1", (8192, 8192)).save(tmp_path / "big.png")
    fails(["big.png", "8192x8192", "MEDIA_LIMIT=2"], data.read_image, tmp_path / "big.png", (8, 8))
    Image.new("1", (60000, 9)).save(tmp_path / "long.png")
    fails(["long.png", "crop"], data.read_image, tmp_path / "long.png", (720, 1280))
    Image.new("1", (9000, 9000)).save(tmp_path / "big.gif")
    fails(["big.gif", "9000x9000"], video_info, tmp_path / "big.gif")
    clip = make(tmp_path / "b.mp4", greys(20))
    monkeypatch.setattr(data, "FRAME_PIXELS", 32 * 48 - 1)
    fails(["b.mp4", "48x32", "MEDIA_LIMIT=2"], video_info, clip)
    monkeypatch.setenv("NANOVIDEO_MEDIA_LIMIT", "2")
    assert video_info(clip)[0] == 20
    monkeypatch.setattr(data, "CLIP_PIXELS", 5 * 32 * 48)
    fails(["b.mp4", "20 frame", "MEDIA_LIMIT=4"], read_video, clip)
    assert read_video(clip, 20, size=(8, 8))[0].shape[1] == 20  # small enough
    monkeypatch.setenv("NANOVIDEO_MEDIA_LIMIT", "much")
    fails(["MEDIA_LIMIT"], read_video, clip)


@pytest.mark.parametrize("name,codec,pix", [
    ("a.mov", "qtrle", "argb"), ("a.mov", "prores_ks", "yuva444p10le"), ("a.webm", "libvpx-vp9", "yuva420p"),
    ("a.webm", "libvpx", "yuva420p"), ("a.avi", "ffv1", "bgra"), ("a.mov", "png", "rgba")])
def test_alpha_lies_on_white(tmp_path, name, codec, pix):
    picture = np.full((32, 48, 4), (*RED, 255), np.uint8)
    picture[:, 24:, 3] = 0
    options = {"auto-alt-ref": 0} if name == "a.webm" else {}
    path = make(tmp_path / name, [picture] * 3, codec, pix, **options)
    assert pixel(path, x=0.2) == pytest.approx(RED, abs=3) and pixel(path, x=0.9) == [255] * 3


def red(pix, matrix, full=1, size=(64, 64)):
    """Two frames of RED by the formulas of BT.601, 709 or 2020; full: 1 is 16 to 235, 2 is 0 to 255."""
    kr, kb = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593), 7: (0.212, 0.087)}.get(matrix, (0.299, 0.114))
    r, g, b = (v / 255 for v in RED)
    y = kr * r + (1 - kr - kb) * g + kb * b
    y, u, v = 255 * y, 255 * (b - y) / 2 / (1 - kb), 255 * (r - y) / 2 / (1 - kr)
    levels = (y, 128 + u, 128 + v) if full == 2 else (16 + y * 219 / 255, 128 + u * 224 / 255, 128 + v * 224 / 255)
    frame, deep = av.VideoFrame(size[1], size[0], pix), "10" in pix
    for plane, level in zip(frame.planes, levels):
        kind = np.uint16 if deep else np.uint8
        value = round(level * (4 if deep else 1))
        plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
    return [frame] * 2


@pytest.mark.parametrize("pix,matrix,full,size", [
    ("yuv420p", 1, 1, (64, 64)), ("yuv420p", 6, 2, (64, 64)), ("yuv420p10le", 9, 1, (64, 64)),
    ("yuvj420p", 5, 2, (64, 64)), ("yuv444p", 1, 2, (64, 64)), ("yuv422p10le", 1, 1, (64, 64)),
    ("yuv420p", 6, 1, (720, 1280)), ("yuv420p", 7, 1, (64, 64))])
def test_colours_by_their_tags(tmp_path, pix, matrix, full, size):
    path = make(tmp_path / "a.mp4", red(pix, matrix, full, size), pix=pix, tags=(matrix, full), preset="ultrafast")
    assert pixel(path) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("size,matrix", [((720, 1280), 1), ((64, 64), 6)])
def test_colours_without_a_tag(tmp_path, size, matrix):
    """As a player shows them: BT.709 from 720 lines on."""
    path = make(tmp_path / "a.mp4", red("yuv420p", matrix, 1, size), preset="ultrafast")
    assert pixel(path) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize("size,matrix", [((720, 1280), 1), ((1280, 720), 1), ((480, 854), 6), ((32, 48), 6)])
def test_what_we_write_names_its_colours(tmp_path, size, matrix):
    video = (torch.tensor(RED) / 127.5 - 1).view(3, 1, 1, 1).expand(3, 2, *size)
    write_video(tmp_path / "a.mp4", video, 24000 / 1001)
    with av.open(str(tmp_path / "a.mp4")) as file:
        frame = next(file.decode(video=0))
        assert file.streams.video[0].average_rate == Fraction(24000, 1001)
        assert (frame.colorspace, frame.color_range) == (matrix, 1)
    assert pixel(tmp_path / "a.mp4") == pytest.approx(RED, abs=3)


def test_interlaced(tmp_path):
    combed = np.full((32, 48, 3), 50, np.uint8)
    combed[1::2] = 150  # the lower field is of another moment
    path = make(tmp_path / "a.mp4", [combed] * 3, flags="+ilme+ildct", **{"x264-params": "tff=1"})
    assert (read_video(path)[0] < -0.5).all()


def test_hdr_is_said(tmp_path, capfd):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", 25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p10le"
        stream.codec_context.color_trc = 16
        file.mux(stream.encode(av.VideoFrame.from_ndarray(greys(1)[0], "rgb24").reformat(format="yuv420p10le")))
        file.mux(stream.encode())
    for _ in range(2):
        read_video(tmp_path / "a.mp4")
    assert capfd.readouterr().err.count("HDR") == 1


# ---- streams and damage

def mux(path, kinds, default=None, fmt=None):
    """kinds: "sound", ("cover", grey) or ("clip", grey), a stream each; default: the number of the default one."""
    disposition, plain = av.stream.Disposition, av.stream.Disposition(0)
    with av.open(str(path), "w", format=fmt) as file:
        streams = []
        for k, (kind, _) in enumerate(kinds):
            stream = file.add_stream({"sound": "aac", "cover": "mjpeg", "clip": "libx264"}[kind],
                                     44100 if kind == "sound" else 25)
            if kind == "sound":
                stream.layout = "mono"
            else:
                stream.width, stream.height = 48, 32
                stream.pix_fmt = "yuvj420p" if kind == "cover" else "yuv420p"
            if default is not None:
                stream.disposition = disposition.default if k == default else plain
            if kind == "cover":
                stream.disposition = disposition.attached_pic
            streams.append(stream)
        for (kind, level), stream in zip(kinds, streams):
            for i in range(1 if kind == "cover" else 10):
                if kind == "sound":
                    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                    frame.sample_rate, frame.pts = 44100, 1024 * i
                else:
                    frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), level, np.uint8), "rgb24")
                    frame.pts = i
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    return path


def test_which_stream_is_the_clip(tmp_path):
    for kinds in ([("sound", 0)], [("sound", 0), ("cover", 200)]):
        fails(["a.mp4", "no picture stream"], video_info, mux(tmp_path / "a.mp4", kinds))
    for kinds, default, level in (
            ([("sound", 0), ("clip", 100)], None, 100), ([("cover", 200), ("clip", 50)], None, 50),
            ([("clip", 50), ("clip", 150)], 1, 150), ([("clip", 50), ("clip", 150)], 0, 50)):
        path = mux(tmp_path / "b.mp4", kinds, default)
        assert pixel(path) == pytest.approx([level] * 3, abs=2) and video_info(path)[0] == 10


@pytest.mark.parametrize("name,codec,end", [
    ("a.mp4", "libx264", "cut"), ("a.mp4", "libx264", "zeros"), ("a.webm", "libvpx", "cut"),
    ("a.avi", "mpeg4", "cut"), ("a.avi", "mjpeg", "zeros")])
def test_broken_tails(tmp_path, name, codec, end):
    """What can be decoded is there; the counts agree; what is lost is refused by name."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), np.uint8)
    path = make(tmp_path / name, list(noise), codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    if name == "a.mp4":
        copy(path, tmp_path / "front.mp4", options={"movflags": "+faststart"}).replace(path)
    raw = path.read_bytes()
    kept = len(raw) * 2 // 3
    put(path, raw[:kept] + (bytes(len(raw) - kept) if end == "zeros" else b""))
    count = video_info(path)[0]
    assert 15 < count <= 40 and read_video(path)[0].shape[1] == count
    assert read_video(path, 8)[0].shape[1] == 8
    if end == "cut":
        fails([name], read_video, path, 40)


def test_names_say_nothing(tmp_path):
    """A video called .gif, a gif called .mp4, streams without a container."""
    make(tmp_path / "a.mp4", greys(8))
    write_video(tmp_path / "b.gif", torch.arange(4).view(1, 4, 1, 1).expand(3, 4, 32, 32) / 4, 10)
    (tmp_path / "b.gif").rename(tmp_path / "b.mp4")
    (tmp_path / "a.mp4").rename(tmp_path / "a.gif")
    make(tmp_path / "c.h264", greys(8))
    assert [video_info(tmp_path / name)[:2] for name in ("a.gif", "b.mp4", "c.h264")] == [(8, 25), (4, 10), (8, 25)]


def test_rates_that_no_player_shows(tmp_path):
    for fps in (1e-9, 0, 90000, float("nan")):
        fails(["a.mp4", "fps"], write_video, tmp_path / "a.mp4", torch.zeros(3, 4, 32, 32), fps)
    write_video(tmp_path / "a.mp4", torch.zeros(3, 4, 32, 32), 1000)
    assert video_info(tmp_path / "a.mp4")[:2] == (4, 1000)


def test_frames_of_two_sizes(tmp_path):
    """A stream that changes its size is refused by frame."""
    small, large = (make(tmp_path / f"{w}.h264", greys(5, 32, w)) for w in (48, 96))
    path = put(tmp_path / "a.mp4", small.read_bytes() + large.read_bytes())
    fails(["a.mp4", "frame 5", "(32, 96)"], read_video, path)
    assert read_video(path, 5)[0].shape == (3, 5, 32, 48)


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    fails(["a.mp4", "FIFO"], video_info, tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to("/dev/zero")
    fails(["b.mp4", "device"], read_video, tmp_path / "b.mp4")
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / "a.png")
    fails(["a.png", "FIFO"], video_info, tmp_path / "c")
    fails(["too long"], video_info, tmp_path / ("n" * 300 + ".mp4"))
    write_video(tmp_path / "d.mp4", torch.zeros(3, 2, 16, 16))
    for text in ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nd.mp4\n#EXT-X-ENDLIST\n",
                 "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://localhost:9/d.mp4\n#EXT-X-ENDLIST\n",
                 "ffconcat version 1.0\nfile d.mp4\n"):
        fails(["e.mp4"], video_info, put(tmp_path / "e.mp4", text))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Bytes of a small clip of each kind."""
    folder, found = tmp_path_factory.mktemp("good"), {}
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mov", "mjpeg")):
        make(folder / name, greys(8), codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
        found[name] = (folder / name).read_bytes()
    write_video(folder / "a.gif", torch.rand(3, 8, 32, 48))
    return found | {"a.gif": (folder / "a.gif").read_bytes()}


@pytest.mark.slow
@MANY
@given(name=st.sampled_from(["a.mp4", "a.webm", "a.avi", "a.mov", "a.gif"]), seed=st.integers(0, 2 ** 32),
       changes=st.integers(0, 20), cut=st.floats(0.2, 1.0))
def test_made_up_clips(good, cases, name, seed, changes, cut):  # noqa: F811
    """Damaged clips: what is read agrees with what is said, or one line names the file."""
    random, raw = np.random.default_rng(seed), bytearray(good[name])
    raw = raw[:int(len(raw) * cut)] if cut < 0.9 else raw
    header = random.random() < 0.5  # half of the damage is in the first and the last bytes
    for _ in range(changes):
        at = int(random.integers(0, min(len(raw), 1500 if header else len(raw))))
        raw[at if random.random() < 0.5 else -at - 1] = random.integers(0, 256)
    path = put(cases.fresh() / name, bytes(raw))

    def read():
        count, fps, size = video_info(path)
        assert count > 0 and 0 < fps < float("inf")
        video = read_video(path)[0]
        assert video.shape == (3, count, *size) and torch.isfinite(video).all()
    cases.check(read, name)
