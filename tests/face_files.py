"""Files for `restore_faces`, small and made here: a GFPGAN whose weights a formula gives, and a detector that takes red for faces."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from renderfarm.models.networks import FaceNetwork

TINY = FaceNetwork(encoder=(2, 4, 4, 4, 4, 4), decoder=(8, 8, 8, 8, 8, 4), style=16)  # 128 px
CELL = 32
SEEN = 640
# where a face's points are in its cell: as in FFHQ's aligned pictures of 512 px
POINTS = np.array([[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935], [201.26117, 371.41043], [313.08905, 371.15118]])


def weights(network: FaceNetwork = TINY) -> dict[str, np.ndarray]:
    """Waves, each tensor's with a period of its own, as strong as keeps numbers at their size from layer to layer."""
    found = {}
    for number, (name, shape) in enumerate(sorted(network.shapes().items())):
        size = math.prod(shape)
        wave = np.sin(np.arange(1, size + 1) * (1.1 + 0.37 * number)).reshape(shape)
        if name.endswith("bias"):
            wave = 0.2 * wave + ("modulation" in name)
        elif len(shape) > 1 and "noise" not in name and "constant" not in name:
            wave *= 1.4 / math.sqrt(math.prod(shape[-3:]) if len(shape) > 3 else shape[-1])
        found[name] = (0.65 * wave if "to_rgb" in name else wave).astype(np.float32)
    return found


def network_file(path: Path, prefix: str = "") -> Path:
    path.write_bytes(save({prefix + name: tensor for name, tensor in weights().items()}))
    return path


def detector(kps: np.ndarray = POINTS / 512) -> bytes:
    """YuNet's outputs from convolutions: each cell of 32 px whose mean red is above 0.8 (of 0..1) is a face."""
    nodes, tensors, outputs = [], [], []
    for cell in (8, 16, CELL):
        for name, colours, constant in (
            ("cls", (0, 0, 1 if cell == CELL else 0), [0.01 if cell == CELL else 0]),  # OpenCV asks for 0.81
            ("obj", (0, 0, 0), [1]),
            ("bbox", (0, 0, 0), [0.5, 0.5, 0, 0]),  # centred, and as large as the cell
            ("kps", (0, 0, 0), kps.ravel()),
        ):
            out, numbers = f"{name}_{cell}", len(constant)
            mean = np.zeros((numbers, 3, cell, cell)) + np.array(colours)[None, :, None, None] / (255 * cell**2)
            shape = np.array([1, -1, numbers])
            for tensor, what in ((mean.astype(np.float32), "w"), (np.array(constant, np.float32), "b"), (shape, "s")):
                tensors.append(numpy_helper.from_array(tensor, f"{out}_{what}"))
            nodes += [
                helper.make_node("Conv", ["input", f"{out}_w", f"{out}_b"], [f"{out}_c"], kernel_shape=[cell] * 2, strides=[cell] * 2),
                helper.make_node("Transpose", [f"{out}_c"], [f"{out}_t"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{out}_t", f"{out}_s"], [out]),
            ]
            outputs.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, [1, (SEEN // cell) ** 2, numbers]))
    return model(nodes, outputs, tensors)


def model(nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto], tensors: list[onnx.TensorProto]) -> bytes:
    seen = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, SEEN, SEEN])
    made = helper.make_model(
        helper.make_graph(nodes, "faces", [seen], outputs, tensors), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    onnx.checker.check_model(made)
    data: bytes = made.SerializeToString()
    return data
