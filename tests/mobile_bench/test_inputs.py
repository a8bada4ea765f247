"""How images become tensors, the same everywhere."""

import json

import numpy as np
import pytest
from PIL import Image

from mobile_bench.errors import DataError, InputError
from mobile_bench.inputs import InputSpec, override, read_picture

SPEC = InputSpec(4, 4, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("scaling", "black", "white"),
    [("raw", 0, 255), ("unit", 0, 1), ("signed", -1, 1)],
)
def test_named_scalings_reach_their_ends(scaling, black, white):
    spec = SPEC.with_scaling(scaling)
    ends = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    found = spec.normalize(ends)
    assert found.dtype == np.float32 and found[0].max() == black and found[1].min() == white
    assert spec.scaling == scaling


def test_torch_and_caffe_scale_each_channel():
    pixel = np.array([[[[255, 128, 0]]]], np.uint8)
    one = InputSpec(1, 1, 3)
    torch = (np.array([1.0, 128 / 255, 0]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(one.with_scaling("torch").normalize(pixel)[0, 0, 0], torch, rtol=1e-5)
    caffe = [0 - 103.939, 128 - 116.779, 255 - 123.68]
    np.testing.assert_allclose(one.with_scaling("caffe").normalize(pixel)[0, 0, 0], caffe, rtol=1e-5)


def test_normalizing_leaves_the_pixels_alone():
    before = IMAGES.copy()
    SPEC.with_scaling("caffe").normalize(IMAGES)
    assert np.array_equal(IMAGES, before)


def test_gray_is_made_as_pillow_makes_it():
    gray = InputSpec(4, 4, 1).fit(IMAGES)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in IMAGES])[..., None]
    assert (gray == expected).all()
    assert (SPEC.fit(gray) == np.repeat(gray, 3, axis=-1)).all()


def test_the_central_part_is_cut_out():
    wide = np.zeros((1, 4, 8, 3), np.uint8)
    wide[:, :, 2:6] = 200
    assert (InputSpec(4, 4, 3, resize="crop").fit(wide) == 200).all()
    assert InputSpec(4, 4, 3).fit(wide).min() < 100


def test_a_file_and_its_pixels_give_the_same_tensor(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "x.png")
    assert (read_picture(tmp_path / "x.png", SPEC) == IMAGES[0]).all()


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for path in (tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError):
            read_picture(path, SPEC)


@pytest.mark.parametrize(
    "images", [IMAGES[0], IMAGES.astype(np.float32), IMAGES[..., :2], np.zeros((1, 4, 4, 4), np.uint8)]
)
def test_other_arrays_are_refused(images):
    with pytest.raises(DataError, match="wrong form"):
        SPEC.fit(images)


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0},
        {"width": -1},
        {"height": 4.0},
        {"height": True},
        {"channels": 2},
        {"std": (0.0,)},
        {"std": (-1.0,)},
        {"mean": (1.0, 2.0)},
        {"mean": (float("nan"),)},
        {"mean": ()},
        {"order": "gbr"},
        {"resize": "fit"},
        {"head": "svm"},
        {"labels": "cat"},
        {"height": 10**9},
    ],
)
def test_impossible_specs(change):
    with pytest.raises(InputError):
        InputSpec(**{"height": 4, "width": 4, "channels": 3, **change})


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"height": 4, "width": 4},
        {**SPEC.to_dict(), "hight": 4},
        {**SPEC.to_dict(), "mean": 5},
        {**SPEC.to_dict(), "mean": ["a"]},
        {**SPEC.to_dict(), "labels": 5},
        {**SPEC.to_dict(), "height": "4"},
    ],
)
def test_damaged_specs_are_an_error_in_words(values):
    with pytest.raises(InputError):
        InputSpec.from_dict(values)


def test_a_spec_survives_json():
    spec = InputSpec(8, 6, 3, labels=("a", "b"), head="logits").with_scaling("caffe")
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_what_a_user_writes(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n\ndog\n")
    found = override(SPEC, f"size=8, scaling=torch,resize=crop,head=logits,labels={tmp_path / 'labels.txt'}")
    assert (found.shape, found.scaling, found.resize, found.head, found.labels) == (
        (8, 8, 3),
        "torch",
        "crop",
        "logits",
        ("cat", "dog"),
    )
    found = override(SPEC, "mean=1/2/3,std=4,order=bgr,width=9")
    assert (found.mean, found.std, found.order, found.shape) == ((1, 2, 3), (4,), "bgr", (4, 9, 3))
    (tmp_path / "spec.json").write_text('{"height": 9, "scaling": "unit"}')
    found = override(SPEC, str(tmp_path / "spec.json"))
    assert (found.shape, found.scaling) == ((9, 4, 3), "unit")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("scaling=tourch", "torch"),
        ("scaling", "no value"),
        ("colour=red", "order"),
        ("size=big", "big"),
        ("labels=/nope", "nope"),
        ("mean=a", "mean"),
        ("head=softmx", "softmax"),
        ("/nope.json", "cannot be read"),
        ("height=0", "height"),
    ],
)
def test_what_a_user_writes_wrong(text, word):
    with pytest.raises(InputError, match=word):
        override(SPEC, text)


@pytest.mark.parametrize("content", ["[]", "{", '{"scaling": []}', '{"hight": 3}', '{"labels": "cat"}'])
def test_wrong_spec_files(tmp_path, content):
    (tmp_path / "spec.json").write_text(content)
    with pytest.raises(InputError):
        override(SPEC, str(tmp_path / "spec.json"))
