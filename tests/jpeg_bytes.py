"""An example of a reward without a gradient: minus the size of each frame as a JPEG, in 100 bytes.

    python grpo.py --base tiny --reward tests/jpeg_bytes.py:jpeg_bytes
"""
import io

from PIL import Image


def jpeg_bytes(frames, prompts):
    """Frames (n,3,h,w) in [0,1] -> n plain numbers."""
    sizes = []
    for frame in (255 * frames).round().byte().cpu().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=75)
        sizes.append(file.tell())
    return [-size / 100 for size in sizes]
