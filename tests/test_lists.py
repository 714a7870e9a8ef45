"""Lists of clips and of prompts as other projects write them: read, or refused in one line by name.

list_clips() opens no clip, so most clips here are empty files.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import common
import data
import metrics
import rewards
import sample
import weights
from bases import base_row
from common import generator, setup
from data import TABLES, VIDEOS, clips_with_prompts, list_clips, read_prompts, read_seeded_prompts
from hostile import MANY, cases  # noqa: F401
from text_encoders import t5_tokenizer, tokenize

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def say_again():
    """Warnings that are said once per run are said once per test."""
    common.warn_once.cache_clear()
    import text_encoders
    text_encoders.lengths_said.clear()


def fill(folder, **files):
    """Files of a folder, {name with / and . as in the keys of a dict: text}; clips are empty."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def rows(source, *args, **kw):
    """[(clip's name, caption)]"""
    return [(row[1].name, row[-1]) for row in list_clips(source, *args, **kw)[1]]


A_B = [("a.mp4", "one"), ("b.mp4", "two")]
CLIPS = {"a.mp4": "", "b.mp4": ""}
BELOW = {"videos/a.mp4": "", "videos/b.mp4": ""}
PAIRED = {**BELOW, "videos.txt": "videos/a.mp4\nvideos/b.mp4\n"}
LAYOUTS = {
    "same names": {**CLIPS, "a.txt": "one", "b.txt": "two\n"},
    "CogVideoX, lists": {**PAIRED, "prompts.txt": "one\ntwo\n", "images.txt": "images/a.png\nimages/b.png"},
    "CogVideoX, labels": {**BELOW, "labels/a.txt": "one", "labels/b.txt": "two"},
    "DaS": {**PAIRED, "prompt.txt": "one\r\ntwo\r\n", "trackings.txt": "t/a.mp4\nt/b.mp4"},
    "a byte order mark": {**PAIRED, "prompt.txt": "\ufeffone\ntwo"},
    "lines with blank lines between": {**BELOW, "videos.txt": "videos/a.mp4\n\nvideos/b.mp4", "prompt.txt": "one\n \ntwo"},
    "csv": {**CLIPS, "metadata.csv": "video,caption\na.mp4,one\nb.mp4,two"},
    "tsv": {**CLIPS, "metadata.tsv": "\ufefffile_name\ttext\r\na.mp4\tone\r\nb.mp4\ttwo\r\n"},
    "index.jsonl": {**CLIPS, "index.jsonl": '{"file": "a.mp4", "prompt": "one"}\n{"file": "b.mp4", "prompt": "two"}'},
    "Excel's": {**CLIPS, "metadata.csv": "\ufeffvideo;caption\r\na.mp4;one\r\n;\r\nb.mp4;two\r\n;\r\n"},
    "tabs in a .csv": {**CLIPS, "metadata.csv": "video\tcaption\na.mp4\tone\nb.mp4\ttwo"},
    "Windows' paths": {**BELOW, "videos.txt": "videos\\a.mp4\r\nvideos\\b.mp4\r\n", "prompts.txt": "one\r\ntwo\r\n"},
    "two joined lists": {**CLIPS, "metadata.csv": "\ufeffvideo,caption\na.mp4,\ufeffone\nb.mp4,two"},
    "old Mac's line ends": {**PAIRED, "prompt.txt": "one\rtwo\r"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    fill(tmp_path, **LAYOUTS[layout])
    assert rows(tmp_path) == A_B == rows(tmp_path, "found")
    assert [caption for _, caption in rows(tmp_path, "ignored")] == ["", ""]


LISTED = {
    "list.csv": 'id,path,text\n1,a.mp4,"one"\n2,b.mp4,two', "list.jsonl": '{"video_path": "a.mp4", "caption": "one"}\n'
    '{"video_path": "b.mp4", "caption": "two"}', "list.json": '[{"file_path": "a.mp4", "text": "one"}, '
    '{"file_path": "b.mp4", "text": "two"}]', "list.txt": "# VGen\na.mp4|||one\nb.mp4 ||| two", "list.tsv":
    "video\tcaption\na.mp4\tone\nb.mp4\ttwo", "webvid.csv": "videoid,contentUrl,name,page_dir\na,http://x,one,.\nb,http://y,two,."}


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("place", ["beside", "working directory", "root"])
def test_lists_and_where_their_paths_start(name, place, tmp_path, monkeypatch):
    fill(tmp_path / "lists", **{name: LISTED[name]})
    fill(tmp_path / ("lists" if place == "beside" else "set"), **CLIPS)
    monkeypatch.chdir(tmp_path / ("set" if place == "working directory" else "."))
    assert rows(tmp_path / "lists" / name, root=tmp_path / "set" if place == "root" else None) == A_B


REFUSED = {
    "two lists": ({**CLIPS, "metadata.csv": "video,caption\na.mp4,one", "index.jsonl": "{}"}, "listed twice, in index.jsonl and in metadata.csv"),
    "lists and labels": ({**PAIRED, "prompt.txt": "one\ntwo", "labels/a.txt": "x"}, "listed twice, in prompt.txt, videos.txt and in labels/"),
    "two files of prompts": ({**PAIRED, "prompt.txt": "one\ntwo", "prompts.txt": "one\ntwo"}, "prompt.txt and prompts.txt are both there"),
    "labels and clips beside them": ({**BELOW, "labels/a.txt": "x", "labels/b.txt": "y", "c.mp4": ""}, "in labels/ and in clips beside"),
    "no list of clips": ({**BELOW, "prompts.txt": "one\ntwo"}, "videos.txt: no such file, but prompts.txt"),
    "no prompts": (PAIRED, "prompt.txt: no such file, but videos.txt"),
    "a short list": ({**PAIRED, "prompt.txt": "one"}, "(prompt.txt 1, videos.txt 2)"),
    "a short list of pictures": ({**PAIRED, "prompt.txt": "one\ntwo", "images.txt": "a.png"}, "images.txt 1"),
    "an empty line": ({**PAIRED, "prompt.txt": "one\n\ntwo"}, "row 2 of a list is an empty line of another"),
    "a clip is gone": ({"a.mp4": "", "metadata.csv": "video,caption\na.mp4,x\nb.mp4,y"}, "metadata.csv row 3: "),
    "one caption, two clips": ({"a.mp4": "", "a.mov": "", "a.txt": "one"}, "a.mov and a.mp4 share a name"),
    "two captions, one clip": ({"a.MP4": "", "a.txt": "one", "a.TXT": "two"}, "share a name"),
    "a clip and its thumbnail": ({"a.mp4": "", "a.jpg": "", "a.txt": "one"}, "a.jpg and a.mp4 share a name"),
    "no caption": ({**CLIPS, "a.txt": "one"}, "b.mp4: no caption beside it; write b.txt"),
    "an empty caption": ({"a.mp4": "", "a.txt": " \n"}, "a.mp4: no caption beside it; write a.txt"),
    "no label": ({**BELOW, "labels/a.txt": "one"}, "b.mp4: no caption"),
    "a folder of clips as a clip": ({"clips/a.mp4": "", "clips.txt": "a.mp4"}, "clips: no pictures in this folder"),
    "hidden files alone": ({"._a.mp4": "", "._a.txt": "one"}, "no clips in this folder"),
    "a name too long": ({"metadata.csv": f"video,caption\n{'a' * 300}.mp4,one"}, "row 2: "),
    "a NUL in a path": ({"metadata.jsonl": '{"video": "a\\u0000.mp4", "caption": "one"}'}, "U+0000"),
    "half a character": ({"a.mp4": "", "metadata.jsonl": '{"video": "a.mp4", "caption": "one \\ud83d"}'}, "metadata.jsonl row 1: `caption`: character 5 is U+D83D"),
    "UTF-16": ({"a.mp4": "", "a.txt": "one".encode("utf-16")}, "not UTF-8"),
    "UTF-16 without a mark": ({"a.mp4": "", "a.txt": "one".encode("utf-16-le")}, "U+0000"),
    "nested JSON": ({"metadata.jsonl": "[" * 100000}, "row 1: not valid JSON (nested too deeply)"),
    "a huge number": ({"metadata.jsonl": '{"video": ' + "9" * 5000 + "}"}, "row 1: not valid JSON"),
    "a key twice": ({"a.mp4": "", "metadata.jsonl": '{"video": "a.mp4", "caption": "x", "caption": "y"}'}, "same key twice"),
    "a backslash before a quote": ({"metadata.csv": 'video,caption\na.mp4,"a \\"big\\" cat"'}, "row 2: not valid csv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, message):
    files, words = REFUSED[case]
    assert words in message(list_clips, fill(tmp_path, **files))


BARE = {"list.csv": "video,caption\na.mp4,one\nb.mp4,\nb.mp4, \n", "list.txt": "a.mp4|||one\nb.mp4\nb.mp4|||",
        "list.jsonl": '{"video": "a.mp4", "caption": "one"}\n{"video": "b.mp4"}\n{"video": "b.mp4", "text": null}'}


@pytest.mark.parametrize("name", [*BARE, "clips"])
def test_missing_captions_are_counted(name, tmp_path, message, capsys):
    fill(tmp_path, **CLIPS)
    if name == "clips":
        fill(tmp_path / name, **CLIPS, **{"a.txt": "one", "b.txt": "", "c.mp4": ""})
    else:
        fill(tmp_path, **{name: BARE[name]})
    text = message(list_clips, tmp_path / name)
    assert "2 of 3 clips have no caption; --empty-captions" in text
    assert not capsys.readouterr().err
    assert [caption for _, caption in rows(tmp_path / name, "empty")] == ["one", "", ""]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "2 of 3 clips have no caption" in warning


def test_columns_without_captions(tmp_path, capsys):
    assert [caption for _, caption in rows(fill(tmp_path, **PAIRED), "empty")] == ["", ""]
    assert "2 of 2 clips have no caption" in capsys.readouterr().err


def test_repeats(tmp_path, message):
    fill(tmp_path, **CLIPS, **{"list.csv": "video,caption,repeats\na.mp4,one,3\nb.mp4,two,\n"})
    assert rows(tmp_path / "list.csv") == [A_B[0]] * 3 + [A_B[1]]
    assert rows(tmp_path / "list.csv", "found") == A_B  # to score or enlarge them once is enough
    fill(tmp_path, **{"list.jsonl": '{"video": "b.mp4", "caption": "two", "repeats": 2}'})
    assert rows(tmp_path / "list.jsonl") == [A_B[1]] * 2
    for bad in ("0", "-1", "1.5", "x", "10000"):
        fill(tmp_path, **{"list.csv": f"video,caption,repeats\na.mp4,one,1\nb.mp4,two,{bad}\n"})
        assert f"list.csv row 3: `repeats` is '{bad}'" in message(list_clips, tmp_path / "list.csv")
    fill(tmp_path, **{"list.jsonl": '{"video": "b.mp4", "caption": "two", "repeats": true}'})
    assert "list.jsonl row 1: `repeats` is 'True'" in message(list_clips, tmp_path / "list.jsonl")


def test_odd_things_in_a_folder(tmp_path, message):
    fill(tmp_path, **CLIPS, **{"a.txt": "one", "b.txt": "two"})
    (tmp_path / "c.mp4").symlink_to(tmp_path / "c.mp4")
    (tmp_path / "c.txt").write_text("three")
    assert "c.mp4: cannot be read" in message(list_clips, tmp_path)
    (tmp_path / "c.mp4").unlink()
    os.mkfifo(tmp_path / "c.mp4")
    assert "c.mp4: a FIFO" in message(list_clips, tmp_path)
    (tmp_path / "c.mp4").unlink()
    (tmp_path / "c.mp4").symlink_to(tmp_path)  # a folder in itself
    assert len(rows(tmp_path)) == 2
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop: cannot be read" in message(list_clips, tmp_path / "loop")
    assert "cannot be read" in message(list_clips, tmp_path / ("a" * 300 + ".csv"))


def test_what_may_not_be_read(tmp_path, message):
    fill(tmp_path / "set", **LAYOUTS["same names"])
    fill(tmp_path, **{"a.csv": "x", "a.txt": "x"})
    locked = [tmp_path / "set", tmp_path / "a.csv", tmp_path / "a.txt"]
    user = os.geteuid()
    for path in locked:
        path.chmod(0)
    try:
        os.seteuid(user or 65534)  # root may read everything
        for read, path in ((list_clips, "set"), (list_clips, "set/a.mp4"), (list_clips, "a.csv"), (read_prompts, "a.txt"),
                           (data.read_image_prompts, "a.txt"), (data.list_pictures, "set"), (data.read_clips, "set")):
            assert "cannot be read (Permission denied)" in message(read, tmp_path / path)
    finally:
        os.seteuid(user)
        for path in locked:
            path.chmod(0o755)


def test_what_is_left_out_is_said_once(tmp_path, capfd):
    fill(tmp_path, **LAYOUTS["same names"], **{"._a.mp4": "", ".c.tmp.mp4": "", "d.mp4.part": "", "e.txt": "", "f.temp.mp4": ""})
    assert rows(tmp_path) == A_B == rows(tmp_path)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "are left out (5): ._a.mp4, .c.tmp.mp4, d.mp4.part, ..." in err
    (tmp_path / "index.jsonl").write_text('{"file": "b.mp4", "prompt": "new"}\n')
    assert rows(tmp_path) == [("b.mp4", "new")]
    assert "a.mp4" in capfd.readouterr().err
    below = fill(tmp_path / "x", **LAYOUTS["CogVideoX, labels"], **{"labels/c.txt": "", "videos/.d.mp4": ""})
    assert rows(below) == A_B
    assert "are left out (2): .d.mp4, c.txt" in capfd.readouterr().err
    fill(below / "y", **LAYOUTS["DaS"], **{"videos/c.mp4": ""})
    assert rows(below / "y") == A_B
    assert "are left out (1): c.mp4" in capfd.readouterr().err


def test_every_ending_and_its_case(tmp_path):
    fill(tmp_path, **{f"{i}{end.upper() if i % 2 else end}": "" for i, end in enumerate(VIDEOS)})
    assert len(rows(tmp_path, "found")) == len(VIDEOS) == len(set(VIDEOS))


def test_a_folder_that_may_be_listed_but_not_entered(message):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # below tmp_path, only its owner may enter
        fill(Path(folder), **LAYOUTS["same names"])
        os.chmod(folder, 0o444)
        try:
            os.seteuid(user or 65534)
            for read in (list_clips, data.list_pictures, weights.load_checkpoint, weights.lora_file, common.check_writable):
                assert "no permission to list and enter" in message(read, folder)
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)


def test_a_name_of_a_file_and_of_a_number(tmp_path):
    fill(tmp_path, **{name: "" for name in ("10.mp4", "9.mp4", "09.mp4", "a.mp4", "a1.mp4")})
    assert [name for name, _ in rows(tmp_path, "found")] == ["09.mp4", "9.mp4", "10.mp4", "a1.mp4", "a.mp4"]


def test_accents_of_two_kinds(tmp_path):
    assert rows(fill(tmp_path, **{"\u00e9.mp4": "", "e\u0301.txt": "one"})) == [("\u00e9.mp4", "one")]
    assert rows(fill(tmp_path, **{"list.csv": "video,caption\ne\u0301.mp4,one"}) / "list.csv") == [("\u00e9.mp4", "one")]


def test_a_backslash_in_a_name(tmp_path):
    """Such a file is found before Windows' paths are thought of."""
    fill(tmp_path, **{"x\\a.mp4": "", "x/a.mp4": "", "metadata.csv": "video,caption\nx\\a.mp4,one"})
    assert rows(tmp_path) == [("x\\a.mp4", "one")]


def test_ambiguous_paths(tmp_path, monkeypatch, message):
    fill(tmp_path / "lists", **CLIPS, **LISTED)
    fill(tmp_path, **CLIPS)
    monkeypatch.chdir(tmp_path)
    assert "a.mp4 is both in the list's folder and" in message(list_clips, "lists/list.csv")
    assert len(list_clips("lists/list.csv", root="lists")[1]) == 2


def test_prompts_of_clips_to_score(tmp_path, message, capfd, monkeypatch):
    fill(tmp_path, **CLIPS, **{"a.txt": "one"})
    assert clips_with_prompts(tmp_path) == [(tmp_path / "a.mp4", "one"), (tmp_path / "b.mp4", None)]
    assert clips_with_prompts(tmp_path, prompt="")[0][1] == ""
    named = tmp_path / "named.json"
    named.write_text('{"b.mp4": "two", "a.mp4": "one"}')
    parsed, parse = [], data.parse_json
    monkeypatch.setattr(data, "parse_json", lambda *args: parsed.append(args) or parse(*args))
    assert [prompt for _, prompt in clips_with_prompts(tmp_path, named)] == ["one", "two"]
    assert len(parsed) == 1  # such a file may be large
    named.write_text('{"b.mp4": "two", "c.mp4": "one"}')
    assert "1 prompts for 2 clips" in message(clips_with_prompts, tmp_path, named)
    assert "b.mp4: no prompt" in message(metrics.main, [str(tmp_path)])
    data.write_video(tmp_path / "b.mp4", data.torch.zeros(3, 2, 32, 32))
    rewards.main(["--video", str(tmp_path / "b.mp4"), "--reward", "size"])
    assert "1 clips have no prompt (b.mp4" in capfd.readouterr().err


# ---- prompts

def test_seeds(tmp_path, message, capfd):
    file = fill(tmp_path, **{"a.txt": f"a cat|{2 ** 64 - 1}\na dog | 0\na | b\na fox\n"}) / "a.txt"
    assert read_seeded_prompts(file) == [("a cat", 2 ** 64 - 1), ("a dog", 0), ("a | b", None), ("a fox", None)]
    assert read_prompts(file) == ["a cat", "a dog", "a | b", "a fox"]
    assert "its seeds are not used here" in capfd.readouterr().err
    for seed in (2 ** 64, -1):
        file.write_text(f"a fox\na cat|{seed}\n")
        assert f"a.txt row 2: seed '{seed}' is not a whole number from 0 to 2^64 - 1" in message(read_prompts, file)
    file.write_text(f"a red circle|{2 ** 64 - 1}\na red circle\n")
    args = ["--base", "tiny", "--sample-steps", "1", "--seed", str(2 ** 64 - 1)]
    seeds = [[clip.seed for clip in sample.read_clips(sample.get_args([*args, *more]), base_row("tiny"), None)]
             for more in (["--prompts", str(file)], ["--prompt", "a red circle"])]
    assert seeds == [[f"{2 ** 64 - 1}-0-0", f"{2 ** 64 - 1}-1-0"], [f"{2 ** 64 - 1}-0-0"]]  # the first: the same clip
    assert setup("cpu", seed=2 ** 64 - 1).rank == 0 and generator(2 ** 64 - 1)


def test_seeds_in_a_column(tmp_path, message):
    fill(tmp_path, **{"a.csv": "prompt,seed\na cat,7\na dog,\n", "b.jsonl": '{"prompt": "a cat", "seed": 7}\n{"prompt": "a dog", "seed": "0-1-0"}',
                      "c.csv": "prompt,seed\na cat,some"})
    assert read_seeded_prompts(tmp_path / "a.csv") == read_seeded_prompts(tmp_path / "b.jsonl") == [("a cat", 7), ("a dog", None)]
    assert "c.csv row 2: seed 'some' is not" in message(read_prompts, tmp_path / "c.csv")
    fill(tmp_path, **{"d.txt": "a cat|" + "9" * 10 ** 6})
    assert len(message(read_prompts, tmp_path / "d.txt")) < 2000


def test_an_empty_prompt_is_a_prompt(tmp_path, message, capfd):
    sample.main(["--base", "tiny", "--sample-steps", "1", "--prompt", "", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "index.jsonl").read_text())["prompt"] == ""
    rewards.main(["--video", str(tmp_path), "--reward", "size"])
    assert "no prompt" not in capfd.readouterr().err
    assert "give only one" in message(sample.main, ["--base", "tiny", "--prompt", "", "--judge", "1"])


def test_text_that_no_tokenizer_reads(tmp_path, message):
    half, nul = '{"prompt": "a cat \\ud83d"}', '{"prompt": "a \\u0000cat"}'
    fill(tmp_path, **{"a.jsonl": f'{{"prompt": "a cat"}}\n{half}', "b.jsonl": nul, "c.json": f"[{half}]", "d.txt": "a\0cat",
                      "e.csv": "prompt\na\0cat\n", "f.json": '["a \\udc00"]', "g.tsv": "prompt\ncaf\0\n"})
    for name, words in {"a.jsonl": "row 2: `prompt`: character 7 is U+D83D", "b.jsonl": "row 1", "c.json": "entry 1",
                        "d.txt": "row 1: character 2 is U+0000", "e.csv": "row 2", "f.json": "entry 1", "g.tsv": "row 2"}.items():
        assert f"{name} {words}" in message(read_prompts, tmp_path / name)
    for flag in ("--prompt", "--negative", "--suffix"):
        assert f"{flag}: the text: character 1 is U+DCFF" in message(sample.main, ["--base", "tiny", flag, os.fsdecode(b"\xff")])


def test_what_an_encoder_does_not_read_is_said_once(tmp_path, capfd):
    words = " ".join(["dog"] * 74)
    tokenize([f"{words} fits"])
    assert capfd.readouterr().err == ""
    tokenize([f"{words} fits", f"{words} and all at night", f"{words} this is cut, too"])
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "2 of 3 prompt(s) are longer than the 77 tokens" in err and "'all at night'" in err
    tokenize([f"{words} and all at night"])
    assert capfd.readouterr().err == ""
    spm = pytest.importorskip("sentencepiece")
    fill(tmp_path, corpus="\n".join(f"a red circle moving left, number {i}" for i in range(300)))
    spm.SentencePieceTrainer.train(input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "t5"), vocab_size=50,
                                   pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    read = t5_tokenizer(tmp_path / "t5.model", 12)
    read(["a red"])
    assert capfd.readouterr().err == ""
    for _ in range(2):
        read(["a red circle moving left, a red circle moving left"])
    err = capfd.readouterr().err
    assert err.count("longer than the 12 tokens") == 1 and "red circle moving left'" in err


def test_a_text_too_large(tmp_path, message, monkeypatch):
    file = fill(tmp_path, **{"a.txt": "a cat\n" * 1000}) / "a.txt"
    monkeypatch.setenv("NANOVIDEO_TEXT_LIMIT", "0.000001")
    assert "a.txt: a text of 0 MB; NANOVIDEO_TEXT_LIMIT=" in message(read_prompts, file)
    for wrong in ("much", "nan", "-1", ""):
        monkeypatch.setenv("NANOVIDEO_TEXT_LIMIT", wrong)
        assert f"NANOVIDEO_TEXT_LIMIT={wrong}: not a number" in message(read_prompts, file)


def test_utf8_in_an_ascii_locale(tmp_path):
    fill(tmp_path, **{"a.txt": "a café, ένα, 犬"})
    code = ("import sys, tracks; text = tracks.read_text(sys.argv[1])\n"
            "tracks.write_list(tracks.Path(sys.argv[1] + '.txt'), [text])")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.txt.txt").read_text("utf-8") == "a café, ένα, 犬\n"


PIECES = st.lists(st.sampled_from([
    "video", "caption", "prompt", "file", "a.mp4", "b.mp4", "a cat", ",", "\t", '"', "\n", "\r", "|||", "|7", "{", "}",
    "[", "]", ":", '"video": "a.mp4"', '"caption": "x"', "\\ud800", "\0", "\ufeff", "\u2028", "videos/a.mp4", "é"]), max_size=14)
NAMES = st.sampled_from([*data.LISTS, "list.csv", "list.json", "list.txt", "videos.txt", "prompt.txt", "prompts.txt", "images.txt",
                         "trackings.txt", "a.txt", "b.TXT", "._a.mp4", "a.mov", "labels/a.txt", "videos/a.mp4", "a.mp4", "a.png"])


@pytest.mark.slow
@MANY
@given(files=st.dictionaries(NAMES, PIECES, max_size=5), captions=st.sampled_from(["needed", "found", "ignored"]), tracks=st.booleans())
def test_any_folder(cases, files, captions, tracks):  # noqa: F811
    """Folders of any lists: rows whose clips are there, or one line."""
    folder = fill(cases.fresh(), **{name: "".join(text) for name, text in files.items()})

    def read(source):
        for row in list_clips(source, captions, tracks)[1]:
            assert row[1].exists() and (captions != "needed" or row[-1])
    for source in (folder, *folder.glob("*.*")):
        if source.suffix in (*TABLES, ".txt", "") or source.is_dir():
            cases.check(lambda: read(source), str(folder))
