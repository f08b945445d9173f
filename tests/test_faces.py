"""`restore_faces`: where faces are found, how they are aligned and put back, GFPGAN's numbers, and whole jobs."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checker import check_complete, error_rows, image_rows, pixels
from face_files import CELL, POINTS, SEEN, TINY, detector, model, network_file, weights
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import load, save

import renderfarm
from renderfarm import after
from renderfarm.config import Colour, RestoreFaces, Step
from renderfarm.errors import Fatal, InvalidJob
from renderfarm.faces import FEATHER, Detector, check_detector, cut_out, place, put_back
from renderfarm.jobfile import load_job
from renderfarm.models.networks import FaceNetwork, identify_face
from renderfarm.models.restorer import FaceRestorer
from renderfarm.retouch import colour
from renderfarm.verification import Choice, verify

Write = Callable[..., Path]
TEMPLATE = [complex(x, y) for x, y in POINTS]


def smooth(height: int, width: int) -> np.ndarray:
    """Waves about 60 px long: a picture that shows where each of its pixels went."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9 + y / 31), np.cos(y / 10 - x / 40), np.sin((x + y) / 12)]
    return (np.stack(waves, axis=2) * 110 + 128).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------- the network


def restorer(data: bytes, strength: float = 1.0) -> FaceRestorer:
    return FaceRestorer(data, identify_face(data), Detector(detector()), strength, "cpu")


# What gfpgan 1.3.8's own GFPGANv1Clean makes of these weights, with its stored noise: pixels 16, 48, 80, 112 each way.
# That class, on torch 2.13.0 and a CPU, gave this module's very bits, here and with random weights at the published size.
REFERENCE = [
    68, 178, 133, 44, 173, 144, 60, 145, 144, 190, 41, 195, 111, 115, 103, 170, 92, 136, 225, 8, 216, 252, 20, 235,
    102, 124, 135, 145, 89, 175, 152, 76, 225, 140, 73, 195, 174, 65, 193, 222, 0, 190, 248, 23, 208, 165, 88, 141,
]  # fmt: skip


def test_the_network_gives_the_numbers_of_its_authors_own() -> None:
    seen = (np.sin(np.arange(128 * 128 * 3) * 0.013).reshape(128, 128, 3) * 127.5 + 127.5).round().astype(np.uint8)
    made = restorer(save(weights())).restored(seen)
    assert made.shape == (128, 128, 3)
    difference = np.abs(made[16::32, 16::32].astype(int).ravel() - REFERENCE)
    assert difference.max() <= 1, "another CPU may round otherwise"


@pytest.mark.parametrize(
    "part", ["noises", "condition_scale", "condition_shift", "modulation", "skip", "final_linear", "to_rgb1", "body_up"]
)
def test_no_part_of_the_network_is_without_effect_on_those_numbers(part: str) -> None:
    seen = (np.sin(np.arange(128 * 128 * 3) * 0.013).reshape(128, 128, 3) * 127.5 + 127.5).round().astype(np.uint8)
    less = {name: tensor * np.float32(0.9) if part in name else tensor for name, tensor in weights().items()}
    made = restorer(save(less)).restored(seen)
    assert np.abs(made[16::32, 16::32].astype(int).ravel() - REFERENCE).max() > 1


def test_the_published_network_has_these_tensors() -> None:
    """The hash is that of names and shapes of gfpgan 1.3.8's network, with the arguments that its versions 1.3 and 1.4 are made with."""
    shapes = FaceNetwork((32, 64, 128, *[256] * 5), (*[512] * 5, 256, 128, 64), 512).shapes()
    assert shapes["final_linear.weight"] == (16 * 512, 256 * 16)
    assert shapes["stylegan_decoder.style_convs.13.modulated_conv.weight"] == (1, 64, 64, 3, 3)
    listed = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == "cd2ece7b1e7ba2fab2d689dadba99fc459180eca173cd001e0cc9f50280b7af7"


def test_prefixes_and_tensors_that_only_training_used_change_nothing() -> None:
    unused = {"stylegan_decoder.style_mlp.1.weight": np.ones((16, 16)), "toRGB.0.weight": np.ones((3, 4, 1, 1))}
    more = {f"params_ema.{name}": tensor.astype(np.float32) for name, tensor in (weights() | unused).items()}
    assert identify_face(save(more)) == TINY
    np.testing.assert_array_equal(restorer(save(more)).restored(smooth(128, 128)), restorer(save(weights())).restored(smooth(128, 128)))


FOREIGN = {
    "a layer is missing": (
        lambda t: t.pop("condition_shift.2.2.bias"),
        "looks like GFPGAN of 128 px, but 1 of its tensors .* condition_shift",
    ),
    "its noise is missing": (lambda t: t.pop("stylegan_decoder.noises.noise3"), "but 1 of its tensors .*noises.noise3"),
    "a layer too many": (lambda t: t.update(more=np.ones(1, np.float32)), "such as more"),
    "another shape": (lambda t: t.update({"final_linear.bias": np.ones(4, np.float32)}), "such as final_linear.bias"),
    "a layer without a shape": (
        lambda t: t.update({"conv_body_down.0.conv1.weight": np.array(1, np.float32)}),
        "is no GFPGAN network",
    ),
    "no floats": (lambda t: t.update({"final_conv.bias": np.ones(4, np.int8)}), "no floats"),
    "under two names": (lambda t: t.update({"params.final_conv.bias": np.ones(4, np.float32)}), "under two names"),
    "the decoder is missing": (lambda t: [t.pop(name) for name in list(t) if "style" in name], "is no GFPGAN network"),
    "another network": (lambda t: (t.clear(), t.update(a=np.ones(1, np.float32))), "is no GFPGAN network"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_such_network_is_refused_with_the_reason(case: str) -> None:
    change, reason = FOREIGN[case]
    tensors = weights()
    change(tensors)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=reason):
        identify_face(save(tensors))


# ---------------------------------------------------------------------------------------------- geometry


def turned(scale: float, degrees: float, x: float, y: float) -> tuple[complex, complex]:
    angle = math.radians(degrees)
    return scale * complex(math.cos(angle), math.sin(angle)), complex(x, y)


@given(st.floats(0.05, 20), st.floats(-180, 180), st.floats(-900, 900), st.floats(-900, 900), st.sampled_from([32, 512]))
def test_a_face_that_was_turned_scaled_and_moved_is_found_to_be_so(scale: float, degrees: float, x: float, y: float, side: int) -> None:
    a, b = turned(scale, degrees, x, y)
    found = place([a * point * side / 512 + b for point in TEMPLATE], side)
    assert found == pytest.approx((1 / a, -b / a), rel=1e-6, abs=1e-6 / scale)


def test_points_that_no_turn_explains_are_met_as_nearly_as_can_be() -> None:
    points = [point + offset for point, offset in zip(TEMPLATE, (9, -6j, 4 + 4j, -8, 3j), strict=True)]
    rows = [row for p in points for row in ([p.real, -p.imag, 1, 0], [p.imag, p.real, 0, 1])]
    wanted, *_ = np.linalg.lstsq(np.array(rows), POINTS.ravel(), rcond=None)
    a, b = place(points, 512)
    np.testing.assert_allclose([a.real, a.imag, b.real, b.imag], wanted, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.1, 0.6, 1.2])
@pytest.mark.parametrize("degrees", [0, 25, -140])
def test_a_face_is_cut_out_upright_with_its_points_at_the_templates(scale: float, degrees: float) -> None:
    a, b = turned(scale, degrees, 450, 400)
    middle = a * (256 + 256j)
    points = [a * point + b - middle for point in TEMPLATE]
    for number, point in enumerate(points):
        y, x = np.mgrid[:800, :900] + 0.5
        dot = (255 * np.exp(-((x - point.real) ** 2 + (y - point.imag) ** 2) / (2 * (12 * scale) ** 2))).astype(np.uint8)
        face = cut_out(dot[..., None].repeat(3, 2), place(points, 512), 512)
        assert face.shape == (512, 512, 3)
        weight = face[60:452, 60:452, 0].astype(float)
        weight[weight < 30] = 0
        rows, columns = np.mgrid[60:452, 60:452] + 0.5
        centre = ((columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum())
        np.testing.assert_allclose(centre, POINTS[number], atol=1.5)


@pytest.mark.parametrize("side", [64, 512])
@pytest.mark.parametrize(("scale", "degrees"), [(0.35, 0), (0.5, 30), (1.0, -75), (1.6, 170)])
def test_what_is_cut_out_and_put_back_is_where_it_was(scale: float, degrees: float, side: int) -> None:
    """As if the network changed nothing: the picture is the same, to what resampling costs; beyond the square to the bit."""
    picture = smooth(700, 900)
    scale *= 120 / side
    a, b = turned(scale, degrees, 450, 350)
    at = (1 / a, (complex(side, side) / 2) - b / a)
    made = put_back(picture, cut_out(picture, at, side), at, 1.0)
    y, x = np.mgrid[:700, :900] + 0.5
    in_face = (x + 1j * y) * at[0] + at[1]
    inside = (np.minimum(in_face.real, in_face.imag) > 0) & (np.maximum(in_face.real, in_face.imag) < side)
    np.testing.assert_array_equal(made[~inside], picture[~inside])
    difference = np.abs(made.astype(int) - picture)
    moved = np.abs(np.roll(picture, 2, axis=1).astype(int) - picture)[inside].mean()
    assert difference[inside].mean() < moved / 5, "less than if it had come back two pixels beside its place"
    assert difference.max() > 0, "it was resampled"


def test_a_face_fades_towards_its_edges_and_shows_as_strongly_as_asked() -> None:
    grey, white = np.full((400, 400, 3), 100, np.uint8), np.full((200, 200, 3), 255, np.uint8)
    at = (complex(1), complex(-100, -100))
    for strength in (0.5, 1.0):
        made = put_back(grey, white, at, strength)
        along = made[200, :, 0].astype(int)
        np.testing.assert_array_equal(along[:100], 100)
        np.testing.assert_array_equal(along[300:], 100)
        feather = round(200 * FEATHER)
        np.testing.assert_array_equal(along[100 + feather : 300 - feather], round(100 + 155 * strength))
        assert (np.diff(along[100 : 100 + feather]) > 0).all()
        np.testing.assert_array_equal(made, made[::-1, ::-1])
    assert grey.max() == 100, "the picture itself is left alone"


@pytest.mark.parametrize("shift", [-500, -60, 60, 500])
def test_a_face_at_or_beyond_the_edge_of_the_picture_is_put_back_as_far_as_it_is_seen(shift: int) -> None:
    picture = smooth(120, 120)
    at = (complex(1), complex(shift, 0))
    face = cut_out(picture, at, 120)
    made = put_back(picture, np.full_like(face, 255), at, 1.0)
    changed = np.flatnonzero((made != picture).any(axis=(0, 2)))
    if abs(shift) == 500:
        np.testing.assert_array_equal(made, picture)
        assert {tuple(colour) for colour in face.reshape(-1, 3)} == {(132, 133, 135)}
    else:
        assert (changed.min(), changed.max()) == ((0, 59) if shift == 60 else (60, 119))


# ---------------------------------------------------------------------------------------------- finding faces


def with_red(height: int, width: int, *cells: tuple[int, int], cell: int = CELL) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    for row, column in cells:
        picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = (255, 10, 20)
    return picture


def test_opencv_finds_each_face_and_its_points_from_left_to_right() -> None:
    find = Detector(detector())
    for picture, corners, cell in (
        (with_red(64, 96), [], 1),
        (with_red(64, 96, (1, 2)), [64 + 32j], CELL),
        (with_red(96, 640, (0, 19), (2, 3), (0, 3)), [96, 96 + 64j, 608], CELL),
        (with_red(1280, 960, (3, 2), cell=64), [128 + 192j], 64),  # seen at half its size
    ):
        found = find(picture)
        wanted = [[corner + point * cell / 512 for point in TEMPLATE] for corner in corners]
        np.testing.assert_allclose(np.array(found).reshape(-1, 5), np.array(wanted).reshape(-1, 5), atol=1e-3)
        assert find(picture) == found, "again, after another"


@pytest.mark.parametrize("size", [(1, 1), (8, 8192), (649, 1), (1021, 1999)])
def test_pictures_of_any_size_are_looked_at(size: tuple[int, int]) -> None:
    assert Detector(detector())(with_red(*size)) == []


def test_eyes_that_are_too_near_each_other_are_no_face() -> None:
    assert Detector(detector(POINTS / 512 * 0.5))(with_red(64, 64, (0, 0))) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_opencvs_threads_stay_as_they_were(threads: int) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    try:
        assert len(Detector(detector())(with_red(64, 64, (0, 0)))) == 1
        assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)


def other_onnx(names: list[str]) -> bytes:
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, SEEN, SEEN]) for name in names]
    return model([helper.make_node("Relu", ["input"], [name]) for name in names], outputs, [])


YUNETS = [f"{name}_{cell}" for name in ("cls", "obj", "bbox", "kps") for cell in (8, 16, 32)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is no face detector of YuNet's kind, or damaged"),
        (b"no network", "is no face detector of YuNet's kind, or damaged"),
        (detector()[:-1000], "is no face detector of YuNet's kind, or damaged"),
        (other_onnx(["made"]), "is no face detector of YuNet's kind, or damaged"),
        (other_onnx(YUNETS), "its output cls_8 has another size or type"),
    ],
)
def test_what_is_no_such_detector_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_detector(data)


# ---------------------------------------------------------------------------------------------- jobs

PROMPTS = ["a red circle", "a blue ring", "a red square", "a pink cross", "a black square", "a green star"]


def job_file(folder: Path, name: str, **changes: Any) -> Path:
    job = {
        "name": "t", "manifest": str(folder / "m.parquet"), "model": "builtin:shapes", "render": {"num_inference_steps": 3},
        "workers": {"batch_size": 3}, "output": {"path": str(folder / name), "part_rows": 3},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**job, **changes, "output": {**job["output"], **changes.get("output", {})}}))
    return path


STEP = {"weights": "gfpgan.safetensors", "detector": "yunet.onnx"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `restored` and what it was made of; some rows' pictures have cells that the detector takes for faces."""
    folder = tmp_path_factory.mktemp("faces")
    pq.write_table(pa.table({"prompt": PROMPTS}), folder / "m.parquet")
    network_file(folder / "gfpgan.safetensors")
    (folder / "yunet.onnx").write_bytes(detector())
    job = job_file(folder, "restored", after=[{"restore_faces": STEP}], output={"keep_originals": True})
    assert renderfarm.run(job, engine="inline").images == len(PROMPTS)
    return folder


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done / "restored", tmp_path / "out"))


def before_and_after(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.asarray(Image.open(folder / row["original_file"])), np.asarray(Image.open(next(folder.rglob(f"data/*/{row['file_name']}")))))
        for row in image_rows(folder)
    ]


def red_cells(picture: np.ndarray) -> list[tuple[int, int]]:
    means = picture[..., 0].reshape(2, CELL, 2, CELL).mean(axis=(1, 3)) / 255
    return [(row, column) for row in range(2) for column in range(2) if means[row, column] > 0.8]


def test_faces_are_the_networks_and_every_other_pixel_is_as_it_was_rendered(done: Path) -> None:
    """A face's square is here just its cell, so that Pillow's resizing alone tells what must come back."""
    check_complete(done / "restored", {(number, 0) for number in range(len(PROMPTS))})
    network, counts = restorer((done / "gfpgan.safetensors").read_bytes()), []
    for before, made in before_and_after(done / "restored"):
        wanted, near = before.copy(), np.zeros((64, 64), bool)
        for row, column in red_cells(before):
            face = network.restored(cut_out(before, (4 + 0j, -4 * complex(column, row) * CELL), TINY.side))
            inner = slice(row * CELL + 4, row * CELL + 28), slice(column * CELL + 4, column * CELL + 28)
            wanted[inner] = np.asarray(Image.fromarray(face).resize((CELL, CELL), Image.Resampling.BILINEAR))[4:28, 4:28]
            near[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = True
            near[inner] = False  # what lies between has faded
        assert np.abs(made.astype(int) - wanted)[~near].max() <= 3, "places are rounded to float32, and the network sees it"
        np.testing.assert_array_equal(made[~near & (wanted == before).all(axis=2)], before[~near & (wanted == before).all(axis=2)])
        counts.append(len(red_cells(before)))
        assert (made != before).any() == bool(counts[-1])
    assert 0 in counts, "a picture without a face"
    assert max(counts) > 1, "one with several"


def test_faces_that_overlap_are_each_made_of_the_picture_as_it_came_the_right_one_on_top() -> None:
    picture, data = smooth(96, 96), save(weights())
    picture[32:64, 32:64, 0] = picture[32:64, 64:, 0] = 250
    network = FaceRestorer(data, TINY, Detector(detector(POINTS / 512 * 1.5 - 0.25)), 1.0, "cpu")
    places = [place(points, TINY.side) for points in network.detector(picture)]
    assert [(round((64 - b.real) / a.real), round(TINY.side / abs(a))) for a, b in places] == [(48, 48), (80, 48)], "middles and sides"
    wanted = picture
    for at in places:
        wanted = put_back(wanted, network.restored(cut_out(picture, at, TINY.side)), at, 1.0)
    np.testing.assert_array_equal(network(picture), wanted)


def test_half_the_strength_is_half_way_and_a_picture_alone_is_as_among_others(done: Path) -> None:
    data = (done / "gfpgan.safetensors").read_bytes()
    full, half = restorer(data), restorer(data, strength=0.5)
    for before, made in reversed(before_and_after(done / "restored")):
        np.testing.assert_array_equal(full(before), made)
        if len(red_cells(before)) == 1:
            continue
        middle = (before.astype(float) + made) / 2
        assert np.abs(half(before) - middle).max() <= 1


def test_the_profile_names_files_by_hash_and_opencv_and_job_json_no_path(done: Path) -> None:
    profile, job = (json.loads((done / f"restored/_renderfarm/{name}.json").read_text()) for name in ("profile", "job"))
    sha256 = [digest((done / name).read_bytes()) for name in ("gfpgan.safetensors", "yunet.onnx")]
    step = {"restore_faces": {"sha256": sha256[0], "detector_sha256": sha256[1], "strength": 1.0}}
    assert job["after"] == [step]
    network = {"encoder": list(TINY.encoder), "decoder": list(TINY.decoder), "style": TINY.style}
    assert profile["after"] == [{**step, "network": network, "opencv": cv2.__version__, "cpu": cv2.getCPUFeaturesLine()}]
    assert "yunet" not in (done / "restored/_renderfarm/job.json").read_text()
    assert {name: (done / "restored/_renderfarm/inputs" / name).stat().st_size for name in sha256}


def test_the_output_alone_is_enough_to_make_every_picture_again(out: Path) -> None:
    found = verify(str(out), Choice(all=True))
    assert (found.ok, found.problems, found.profile_differences) == (True, [], [])
    assert [again.result for again in found.again] == ["identical"] * len(PROMPTS)
    network = out / "_renderfarm/inputs" / json.loads((out / "_renderfarm/job.json").read_text())["after"][0]["restore_faces"]["sha256"]
    network.unlink()
    with pytest.raises(InvalidJob, match=f"{network.name} is missing or damaged"):
        verify(str(out), Choice(sample=1))


def test_resume_refuses_another_detector_network_or_strength(done: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    (folder / "other.onnx").write_bytes(detector(POINTS / 500))
    tensors = load((folder / "gfpgan.safetensors").read_bytes())
    (folder / "other.safetensors").write_bytes(save(tensors | {"final_conv.bias": tensors["final_conv.bias"] * 2}))
    for change, named in (
        ({"detector": "other.onnx"}, r"after\[0\].restore_faces.detector_sha256"),
        ({"weights": "other.safetensors"}, r"after\[0\].restore_faces.sha256"),
        ({"strength": 0.5}, r"after\[0\].restore_faces.strength: 1.0 there, 0.5 now"),
    ):
        job = job_file(folder, "restored", after=[{"restore_faces": STEP | change}], output={"keep_originals": True})
        with pytest.raises(InvalidJob, match=named):
            renderfarm.run(job, engine="inline")


@pytest.mark.slow
def test_workers_on_ray_give_the_pictures_of_one_in_this_process(done: Path, local_ray: None, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    options = {"workers": {"batch_size": 3, "min": 2, "max": 2}, "output": {"keep_originals": True, "part_rows": 1}}
    assert renderfarm.run(job_file(folder, "two", after=[{"restore_faces": STEP}], **options), engine="ray").images == len(PROMPTS)
    assert pixels(folder / "two") == pixels(done / "restored")


def test_nan_ends_rows_with_a_face_and_no_other(done: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "copy"))
    broken = weights() | {"final_conv.bias": np.full(4, np.nan, np.float32)}
    (folder / "nan.safetensors").write_bytes(save(broken))
    renderfarm.run(job_file(folder, "nan", after=[{"restore_faces": STEP | {"weights": "nan.safetensors"}}]), engine="inline")
    with_faces = {number for number, (before, _) in enumerate(before_and_after(done / "restored")) if red_cells(before)}
    errors = {error["row"]: (error["error_class"], error["error_message"]) for error in error_rows(folder / "nan")}
    message = "after[0].restore_faces: the network gave NaN or infinite values; its weights may be damaged"
    assert errors == dict.fromkeys(with_faces, ("NonFiniteOutput", message))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def faces(network: bytes, yunet: bytes) -> Step:
    return Step(restore_faces=RestoreFaces(weights="w", sha256=digest(network), detector="d", detector_sha256=digest(yunet)))


def test_what_comes_before_the_last_network_is_done_with_it_and_the_rest_beside(done: Path) -> None:
    grey, data = Step(colour=Colour(saturation=0)), (done / "gfpgan.safetensors").read_bytes()
    chain = after.Chain([grey, faces(data, detector()), grey])
    chain.load({digest(one): one for one in (data, detector())}.__getitem__, "cpu", "float32")
    picture = with_red(64, 64, (0, 0)) | np.uint8(225)  # as grey as it becomes, it is a face
    made = chain.in_render_thread(picture)
    np.testing.assert_array_equal(made, restorer(data)(colour(picture, Colour(saturation=0))))
    assert (made[:32, :32] != made[:32, :32, :1]).any(), "the network's colours"
    beside = chain.beside(made)
    np.testing.assert_array_equal(beside, beside[..., :1].repeat(3, 2))


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "w.pth"}, r"after\[0\].restore_faces.weights: .* is no .safetensors file; other formats may hold code"),
        ({"weights": "gone.safetensors"}, "gone.safetensors cannot be read: No such file"),
        ({"weights": "cut.safetensors"}, "is damaged, or no safetensors file"),
        (
            {"weights": "foreign.safetensors"},
            r"after\[0\].restore_faces: .*foreign.safetensors is no GFPGAN network as its versions 1.3 and 1.4",
        ),
        ({"sha256": "0" * 64}, "gfpgan.safetensors has the hash .*, and the job asks for 000"),
        ({"detector": "yunet.pt"}, r"after\[0\].restore_faces.detector: .* is no .onnx file; give it YuNet as OpenCV publishes it"),
        ({"detector": "gone.onnx"}, "gone.onnx cannot be read: No such file"),
        ({"detector": "foreign.onnx"}, r"after\[0\].restore_faces: .*foreign.onnx is no face detector of YuNet's kind"),
        ({"detector_sha256": "0" * 64}, "yunet.onnx has the hash .*, and the job asks for 000"),
        ({"strength": 0}, "after.0.restore_faces.strength: Input should be greater than 0"),
        ({"strength": 1.5}, "after.0.restore_faces.strength: Input should be less than or equal to 1"),
        ({"fidelity": 0.5}, "after.0.restore_faces.fidelity: unknown field"),
    ],
)
def test_files_and_values_that_cannot_be_used_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, done: Path, tmp_path: Path
) -> None:
    for name in ("m.parquet", "gfpgan.safetensors", "yunet.onnx"):
        shutil.copy(done / name, tmp_path)
    (tmp_path / "cut.safetensors").write_bytes((done / "gfpgan.safetensors").read_bytes()[:-1])
    (tmp_path / "foreign.safetensors").write_bytes(save({"conv_first.weight": np.ones((8, 3, 3, 3), np.float32)}))
    (tmp_path / "foreign.onnx").write_bytes(other_onnx(["made"]))
    with pytest.raises(InvalidJob, match=message):
        renderfarm.run(job_file(tmp_path, "job", after=[{"restore_faces": STEP | change}]), engine="inline")
    assert not (tmp_path / "job").exists()


def test_without_opencv_the_job_ends_with_the_name_of_the_extra(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InvalidJob, match=r"restore_faces needs OpenCV .*pip install 'renderfarm\[faces\]'"):
        renderfarm.run(job_file(done, "without", after=[{"restore_faces": STEP}]), engine="inline")
    assert not (done / "without").exists()


def test_a_step_needs_both_files_and_a_model_on_torch(done: Path, write_job: Write, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"after\.0\.restore_faces\.detector: is required"):
        load_job(write_job(tmp_path / "m.parquet", after=[{"restore_faces": {"weights": "a"}}]))
    with pytest.raises(InvalidJob, match="builtin:fake draws without torch"):
        renderfarm.run(job_file(done, "fake", model="builtin:fake", after=[{"restore_faces": STEP}]), engine="inline")


def test_a_detector_that_a_worker_cannot_use_stops_it() -> None:
    data = save(weights())
    chain = after.Chain([faces(data, b"damaged")])
    with pytest.raises(Fatal, match=r"after\[0\].restore_faces: cannot be set up: ValueError: is no face detector"):
        chain.load({digest(one): one for one in (data, b"damaged")}.__getitem__, "cpu", "float32")
