"""Where the faces of a picture are, and how one becomes an upright square and goes back; without torch.

Points of a picture are complex numbers, x + iy, in pixels from its top left corner. A face's place is (a, b): a·z + b is
where point z of the picture lies in the face's square.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from PIL import Image

from renderfarm.errors import InvalidJob

# Eyes, nose and corners of the mouth in FFHQ's aligned faces of 512 px, for which GFPGAN was trained; the picture's left first
TEMPLATE_PX = 512
TEMPLATE = (192.98138 + 239.94708j, 318.90277 + 240.1936j, 256.63416 + 314.01935j, 201.26117 + 371.41043j, 313.08905 + 371.15118j)
OUTSIDE = (132, 133, 135)  # the grey that GFPGAN is used to beyond a picture's edge
FEATHER = 0.1  # of a face's side, along which it fades into the picture
SEEN_PX = 640  # YuNet's own input, whatever the picture: it knows faces of 10 to 300 px
SMALLEST_PX = 5  # between the eyes; less is no face that could be restored
OUTPUTS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}  # numbers in each cell; cells of 8, 16 and 32 px

Place = tuple[complex, complex]


def _opencv() -> Any:
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # it warns of settings that nobody made
    try:
        import cv2
    except ImportError as error:
        raise InvalidJob(f"restore_faces needs OpenCV ({error}): pip install 'renderfarm[faces]'") from None
    return cv2


def check_detector(data: bytes) -> None:
    """Raises ValueError, with the reason, for an ONNX file that OpenCV's detector cannot take: it trusts what a network gives."""
    cv2 = _opencv()
    wanted = {f"{name}_{cell}": (SEEN_PX // cell) ** 2 * numbers for name, numbers in OUTPUTS.items() for cell in (8, 16, 32)}
    try:
        network = cv2.dnn.readNetFromONNX(np.frombuffer(data, np.uint8))
        network.setInput(np.zeros((1, 3, SEEN_PX, SEEN_PX), np.float32))
        given = network.forward(list(wanted))
    except cv2.error as error:
        why = " ".join(error.err.split())
        raise ValueError(f"is no face detector of YuNet's kind, or damaged (OpenCV: {why})") from None
    for (name, size), array in zip(wanted.items(), given, strict=True):
        if (array.size, array.dtype) != (size, np.float32):
            raise ValueError(f"is no face detector of YuNet's kind: its output {name} has another size or type")


class Detector:
    """YuNet, by OpenCV, on the CPU."""

    def __init__(self, data: bytes) -> None:
        self._cv2 = _opencv()
        check_detector(data)
        nothing = np.empty(0, np.uint8)
        self._network = self._cv2.FaceDetectorYN.create("onnx", np.frombuffer(data, np.uint8), nothing, (SEEN_PX, SEEN_PX))

    def profile(self) -> dict[str, str]:
        """What decides where faces are, beside the file; the CPU, because OpenCV chooses kernels by it whatever device renders."""
        return {"opencv": self._cv2.__version__, "cpu": self._cv2.getCPUFeaturesLine()}

    def __call__(self, pixels_HW3: np.ndarray) -> list[list[complex]]:
        """The five points of each face, in TEMPLATE's order; faces from left to right."""
        height, width = pixels_HW3.shape[:2]
        shrunk = min(1.0, SEEN_PX / max(height, width))
        size = max(1, round(width * shrunk)), max(1, round(height * shrunk))
        seen = Image.fromarray(pixels_HW3).resize(size, Image.Resampling.BILINEAR)
        square = np.zeros((SEEN_PX, SEEN_PX, 3), np.uint8)
        square[: seen.height, : seen.width] = np.asarray(seen)[..., ::-1]  # BGR
        across, down = width / seen.width, height / seen.height
        found = [[complex(x * across, y * down) for x, y in face[4:14].reshape(5, 2).tolist()] for face in self._found(square)]
        return [points for points in found if abs(points[1] - points[0]) >= SMALLEST_PX]

    def _found(self, square: np.ndarray) -> list[np.ndarray]:
        threads = self._cv2.getNumThreads()
        self._cv2.setNumThreads(1)  # how kernels share work must not decide a pixel
        try:
            _, faces = self._network.detect(square)
        finally:
            self._cv2.setNumThreads(threads)  # it is this whole process's
        return [] if faces is None else sorted(faces, key=tuple)


def place(points: list[complex], side: int) -> Place:
    """Turned, scaled and moved so that the points lie as near as can be (least squares) to the template's."""
    target = [point * side / TEMPLATE_PX for point in TEMPLATE]
    middle, wanted = sum(points) / len(points), sum(target) / len(target)
    spread = sum(abs(point - middle) ** 2 for point in points)
    a = sum((point - middle).conjugate() * (goal - wanted) for point, goal in zip(points, target, strict=True)) / spread
    return a, wanted - a * middle


def cut_out(pixels_HW3: np.ndarray, at: Place, side: int) -> np.ndarray:
    """The side×side×3 square in which the face stands upright."""
    return _moved(Image.fromarray(pixels_HW3), at, (side, side))


def put_back(pixels_HW3: np.ndarray, face_SS3: np.ndarray, at: Place, strength: float) -> np.ndarray:
    """The picture with a face over the place that it was cut out of, fading towards the edges of its square."""
    (a, b), (height, width), side = at, pixels_HW3.shape[:2], face_SS3.shape[0]
    corners = [(corner - b) / a for corner in (0, side, 1j * side, side + 1j * side)]
    left, right = (min(max(f(g(z.real for z in corners)), 0), width) for f, g in ((math.floor, min), (math.ceil, max)))
    top, bottom = (min(max(f(g(z.imag for z in corners)), 0), height) for f, g in ((math.floor, min), (math.ceil, max)))
    made = pixels_HW3.copy()
    if left == right or top == bottom:
        return made
    x, y = np.arange(left, right) + 0.5, np.arange(top, bottom)[:, None] + 0.5
    there_x, there_y = a.real * x - a.imag * y + b.real, a.imag * x + a.real * y + b.imag
    to_edge = np.minimum(np.minimum(there_x, side - there_x), np.minimum(there_y, side - there_y))
    share = strength * np.clip(to_edge / (FEATHER * side), 0, 1)[..., None]
    face = _moved(Image.fromarray(face_SS3), (1 / a, -b / a - complex(left, top)), (right - left, bottom - top))
    under = made[top:bottom, left:right]
    under[:] = np.rint(under + share * (face - under.astype(np.float64)))
    return made


def _moved(picture: Image.Image, at: Place, size: tuple[int, int]) -> np.ndarray:
    """A picture of this size in which each point z of `picture` is at a·z + b."""
    a, b = at
    seen = picture
    if abs(a) < 1:  # several pixels become one: their mean, not one of them
        shrunk = [max(1, round(length * abs(a))) for length in picture.size]
        seen = picture.resize((shrunk[0], shrunk[1]), Image.Resampling.BILINEAR)
    turn, shift, across, down = 1 / a, -b / a, seen.width / picture.width, seen.height / picture.height
    back = (turn.real * across, -turn.imag * across, shift.real * across, turn.imag * down, turn.real * down, shift.imag * down)
    return np.asarray(seen.transform(size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=OUTSIDE))
