"""The moving pictures of the README, from folders of clips. By hand:

    python vader.py --base tiny
    python tests/pictures.py assets/vader.gif before=out/vader/before after=out/vader/after --clips 0 1 4 5 7 8 9 13

A row per folder, under its title, and a column per clip; pixels are enlarged without blur.
"""
import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from PIL import Image  # noqa: E402

import data  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("gif", help="file to write")
    p.add_argument("rows", nargs="+", metavar="TITLE=FOLDER", help="folders of 0000.mp4 ...")
    p.add_argument("--clips", nargs="+", type=int, required=True, help="numbers of the clips to show")
    p.add_argument("--scale", type=int, default=4, help="size of a pixel")
    p.add_argument("--rate", type=int, default=6, help="frames per second")
    args = p.parse_args()
    titles, folders = zip(*(row.split("=", 1) for row in args.rows))
    rows = [[data.read_video(Path(folder, f"{n:04d}.mp4"))[0] for n in args.clips] for folder in folders]
    pages = []
    with tempfile.TemporaryDirectory() as folder:
        for t in range(rows[0][0].shape[1]):
            page = Path(folder, f"{t}.png")
            data.contact_sheet([[video[:, t:t + 1] for video in row] for row in rows], page, titles, frames=1,
                               scale=args.scale)
            pages.append(Image.open(page).convert("RGB").quantize(256, dither=Image.Dither.NONE))
    pages[0].save(args.gif, save_all=True, append_images=pages[1:], duration=1000 // args.rate, loop=0)


if __name__ == "__main__":
    main()
