"""Reads videos frame by frame with mmcv, and writes them as MP4."""

from pathlib import Path

import cv2
import mmcv
import numpy as np

from mmdet_lors.errors import UserError

DEFAULT_FPS = 25.0
"""Frames per second of a video that does not state its own."""


def open_video(path: str) -> mmcv.VideoReader:
    """A video's frames (H, W, 3), BGR, as an iterable that also has ``fps`` and an estimated ``frame_cnt``.

    Raises:
        UserError: a file that OpenCV cannot read as a video.
    """
    video = mmcv.VideoReader(path)
    if not video.opened or video.width < 1 or video.height < 1:
        raise UserError(f"{path} cannot be read as a video")
    return video


class VideoFile:
    """An MP4 file that is opened at its first frame, and has that frame's size.

    Args:
        path: the file.
        fps: frames per second; 0 or less means 25.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps if fps > 0 else DEFAULT_FPS
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()

    def write(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3), RGB.

        Raises:
            UserError: the file cannot be written.
        """
        if self._writer is None:
            height, width = frame.shape[:2]
            code = cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self.path), code, self.fps, (width, height))
            if not self._writer.isOpened():
                raise UserError(f"{self.path} cannot be written as a video")
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))
