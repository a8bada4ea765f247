"""Fixes: same answers from the rewritten model, and other operations in its .tflite."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from mobile_bench.flatbuffer import read_model
from mobile_bench.inputs import InputSpec
from tfopt import builders, convert_worker, fixes, models
from tfopt.errors import InputError, ModelError, ModelRefused
from tfopt.fixes.plan import Plan
from tfopt.graph import flat_layers

SPEC = InputSpec(12, 12, 3)


def made(middle, *, stem=True, spec=SPEC, name="tiny"):
    """stem -> middle -> a head that mixes all, with random weights and statistics everywhere."""
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input(spec.shape, name="image")
    if stem:
        x = layers.Conv2D(8, 3, padding="same", activation="tanh", name="stem")(x)
    x = middle(x)
    if len(x.shape) == 4:
        x = layers.Flatten(name="flat")(x)
    return shaken(keras.Model(inputs, layers.Dense(4, activation="softmax", name="classes")(x), name=name))


def shaken(model):
    rng = np.random.default_rng(1)
    for layer in flat_layers(model):
        if not isinstance(layer, layers.Normalization):
            for weight in layer.weights:
                low = 0.5 if "variance" in weight.path else -0.5
                weight.assign(rng.uniform(low, low + 1, weight.shape))
    return model


def tflite(model, spec, scheme):
    """What `tfopt convert` writes, without its child process."""
    image = tf.TensorSpec((1, *spec.shape), tf.float32, name="image")
    graph = tf.function(lambda image: model(image, training=False)).get_concrete_function(image)
    owner = tf.Module()
    owner.kept = [weight.value for weight in model.weights]
    images = np.random.default_rng(0).integers(0, 256, (4, *spec.shape), np.uint8)
    return convert_worker.convert_one(tf, graph, owner, scheme, images, spec)


def operations(model, spec=SPEC, scheme="int8"):
    """The operations of the converted model between the stem and the head, fused activations behind a slash."""
    found = []
    for operator in read_model(tflite(model, spec, scheme)).main.operators:
        fused = operator.options.get("fused_activation_function", "NONE")
        found.append(operator.op + ("" if fused == "NONE" else f"/{fused}"))
    return found


def same_answers(before, after, spec=SPEC, spec_after=None):
    """The same test as the fixes make, by other means: softmax, one image at a time, through tf.function."""
    images = np.random.default_rng(7).integers(0, 256, (3, *spec.shape), np.uint8)
    for image in images:
        one = before(spec.normalize(image[None]), training=False)
        other = after((spec_after or spec).normalize(image[None]), training=False)
        np.testing.assert_allclose(other, one, atol=2e-5)


def dense_norm(x):
    return layers.BatchNormalization(name="norm")(layers.MaxPooling2D(name="shrink")(x))


ACT = layers.Activation
NORMALIZATION = lambda: layers.Normalization(mean=range(8), variance=[1.0, 4.0] * 4, name="s")
#: name: (the fix, middle of the model, layers it changes, what the .tflite lost, what it has instead)
CASES = {
    "hard_silu layer": ("hard_swish", ACT("hard_silu", name="act"), ["act"], "HARD_SWISH", "ADD/RELU6 MUL"),
    "hard_swish in a convolution": (
        "hard_swish", lambda x: layers.Conv2D(4, 3, activation="hard_swish", name="conv")(x), ["conv"], "HARD_SWISH",
        "ADD/RELU6 MUL",
    ),
    "hard_silu function": ("hard_swish", ops.hard_silu, None, "HARD_SWISH", "ADD/RELU6 MUL"),
    "x * relu6(x + 3) / 6": ("hard_swish", lambda x: x * ops.relu6(x + 3.0) / 6.0, None, "HARD_SWISH", "ADD/RELU6 MUL"),
    "relu6(3 + x) * (1/6) * x": (
        "hard_swish", lambda x: layers.Multiply(name="m")([layers.ReLU(6.0, name="six")(3.0 + x) * (1 / 6), x]), ["m"],
        "HARD_SWISH", "ADD/RELU6 MUL",
    ),
    "x * clip(x + 3, 0, 6) / 6 with Rescaling layers": (
        "hard_swish", lambda x: layers.Rescaling(1 / 6, name="m")(x * ops.clip(layers.Rescaling(1, 3.0)(x), 0, 6)),
        ["m"], "HARD_SWISH", "ADD/RELU6 MUL",
    ),
    "x * hard_sigmoid(x)": (
        "hard_swish", lambda x: layers.Multiply(name="m")([x, ACT("hard_sigmoid", name="gate")(x)]), ["m"],
        "HARD_SWISH", "ADD/RELU6 MUL",
    ),
    "LeakyReLU": ("activations", layers.LeakyReLU(0.3, name="act"), ["act"], "LEAKY_RELU", "PRELU"),
    "leaky ReLU of slope 2": (
        "activations", layers.ReLU(negative_slope=2.0, name="act"), ["act"], "LEAKY_RELU", "PRELU"
    ),
    "leaky ReLU in a dense layer": (
        "activations", lambda x: layers.Dense(6, activation="leaky_relu", name="d")(layers.Flatten()(x)), ["d"],
        "LEAKY_RELU", "PRELU",
    ),
    "leaky ReLU function": ("activations", lambda x: ops.leaky_relu(x, 0.1), None, "LEAKY_RELU", "PRELU"),
    "tanh GELU": ("activations", lambda x: ops.gelu(x, approximate=True), None, "GELU", "LOGISTIC MUL"),
    "global average": ("global_pool", layers.GlobalAveragePooling2D(name="pool"), ["pool"], "MEAN", "AVERAGE_POOL_2D"),
    "global average, kept": (
        "global_pool", layers.GlobalAveragePooling2D(keepdims=True, name="pool"), ["pool"], "MEAN", "AVERAGE_POOL_2D"
    ),
    "ops.mean": ("global_pool", lambda x: ops.mean(x, axis=(-2, 1)), None, "MEAN", "AVERAGE_POOL_2D"),
    "global maximum": ("global_pool", layers.GlobalMaxPooling2D(name="pool"), ["pool"], "REDUCE_MAX", "MAX_POOL_2D"),
    "ops.max": ("global_pool", lambda x: ops.max(x, axis=[1, 2], keepdims=True), None, "REDUCE_MAX", "MAX_POOL_2D"),
    "nearest x 2": ("resize", layers.UpSampling2D(2, name="up"), ["up"], "TILE", "RESIZE_NEAREST_NEIGHBOR"),
    "nearest 3 x 2": ("resize", layers.UpSampling2D((3, 2), name="up"), ["up"], "TILE", "RESIZE_NEAREST_NEIGHBOR"),
    "area": ("resize", layers.Resizing(4, 6, interpolation="area", name="r"), ["r"], "", "AVERAGE_POOL_2D"),
    "one pixel": (
        "resize", lambda x: layers.UpSampling2D(5, interpolation="bilinear", name="up")(layers.MaxPooling2D(12)(x)),
        ["up"], "RESIZE_BILINEAR", "TILE",
    ),
    "batch norm after pooling": ("batch_norm", dense_norm, ["norm"], "MUL ADD", "DEPTHWISE_CONV_2D"),
    "batch norm without scale": (
        "batch_norm", lambda x: layers.BatchNormalization(scale=False, epsilon=0.1, name="norm")(layers.ReLU()(x)),
        ["norm"], "MUL ADD", "DEPTHWISE_CONV_2D",
    ),
    "dilation 2 x 1": (
        "dilation", layers.Conv2D(4, 3, dilation_rate=(2, 1), padding="same", name="c"), ["c"], "", "CONV_2D"
    ),
    "dilation 4 x 2, depthwise": (
        "dilation", layers.DepthwiseConv2D(3, dilation_rate=(4, 2), padding="same", name="c"), ["c"], "",
        "DEPTHWISE_CONV_2D",
    ),
    "two groups": (
        "groups", layers.Conv2D(6, 3, groups=2, padding="same", activation="relu", name="c"), ["c"], "",
        "SPLIT CONV_2D/RELU CONV_2D/RELU CONCATENATION",
    ),
    "two groups and a batch norm": (
        "groups", lambda x: layers.BatchNormalization(name="n")(layers.Conv2D(6, 3, groups=2, strides=2, name="c")(x)),
        ["c", "n"], "", "SPLIT CONV_2D CONV_2D CONCATENATION",
    ),
    "a group a channel": ("groups", layers.Conv2D(16, 3, groups=8, name="c"), ["c"], "", "DEPTHWISE_CONV_2D"),
    "normalization, no zeros around": (
        "rescaling", lambda x: layers.Conv2D(4, 3, name="c")(NORMALIZATION()(x)), ["s", "c"], "MUL SUB", "CONV_2D"
    ),
    "scale without offset": (
        "rescaling", lambda x: layers.DepthwiseConv2D(3, 2, "same", use_bias=False, name="c")(
            layers.Rescaling([0.5, 1.0, 2.0, 3.0, 0.5, 1.0, 2.0, 3.0], name="s")(x)
        ), ["s", "c"], "MUL", "DEPTHWISE_CONV_2D",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes():
    """case -> (model before, Fixed), applied once."""
    results = {}
    for case, (fix, middle, *_) in CASES.items():
        model = made(middle)
        results[case] = model, fixes.apply_fixes(model, [fix], SPEC)
    return results


@pytest.mark.parametrize("case", CASES)
def test_answers_stay_and_operations_change(case, outcomes):
    fix, _, changed, gone, come = CASES[case]
    model, fixed = outcomes[case]
    assert fixed.refused == ()
    ((name, names, difference),) = fixed.applied
    assert name == fix and 0 <= difference <= fixes.TOLERANCE
    assert list(names) == changed if changed else len(names) == 1
    same_answers(model, fixed.model)
    assert fixes.FIXES[fix].find(fixed.model, SPEC) == []
    # TFLite has no area resize, so there is no file to compare with.
    before = operations(model) if case != "area" else []
    after = operations(fixed.model)
    assert set(gone.split()) <= set(before)
    assert not set(gone.split()) - set(come.split()) & set(after)
    assert set(come.split()) <= set(after)


def test_dilations_and_groups_are_as_an_edge_tpu_reads_them(outcomes):
    """Equal dilations, and no CONV_2D of version 6, which stands for groups."""
    for case in ("dilation 2 x 1", "dilation 4 x 2, depthwise", "two groups", "a group a channel"):
        before, after = (
            [*read_model(tflite(m, SPEC, "int8")).main.operators] for m in (outcomes[case][0], outcomes[case][1].model)
        )
        if case.startswith("dilation"):
            pairs = [
                [(o.options["dilation_h_factor"], o.options["dilation_w_factor"]) for o in found if "CONV" in o.op]
                for found in (before, after)
            ]
            assert any(y != x for y, x in pairs[0]) and all(y == x for y, x in pairs[1])
        else:
            versions = [max(o.version for o in found if o.op == "CONV_2D") for found in (before, after)]
            assert versions[0] == 6 and versions[1] < 6


@pytest.mark.parametrize(
    ("activation", "found"),
    [
        ("silu", ["CONV_2D", "LOGISTIC", "MUL"]),
        ("hard_sigmoid", ["CONV_2D/RELU6", "MUL"]),
        ("relu6", ["CONV_2D/RELU6"]),
    ],
)
def test_these_activations_need_no_fix(activation, found):
    model = made(lambda x: layers.Conv2D(4, 3, activation=activation, name="c")(x), stem=False)
    fixed = fixes.apply_fixes(model, ["all"], SPEC)
    assert fixed.model is model and fixed.applied == () and fixed.refused == ()
    assert operations(model)[: len(found)] == found


@pytest.mark.slow
def test_mobilenet_v3_small_runs_whole(tmp_path):
    model = keras.applications.MobileNetV3Small((32, 32, 3), alpha=0.35, weights=None, classes=10)
    loaded = models.from_keras(model)
    assert loaded.spec.scaling == "raw"
    fixed = fixes.apply_fixes(model, ["all"], loaded.spec)
    assert [name for name, *_ in fixed.applied] == ["rescaling", "hard_swish", "global_pool"]
    assert fixed.refused == () and fixed.spec == loaded.spec.with_scaling("signed")
    assert model.count_params() == fixed.model.count_params()
    kept = {layer.name: layer for layer in fixed.model.layers}
    for layer in model.layers:
        if layer.weights:
            for one, other in zip(layer.get_weights(), kept[layer.name].get_weights(), strict=True):
                np.testing.assert_array_equal(one, other)
    found = operations(fixed.model, fixed.spec)
    assert not {"HARD_SWISH", "MEAN"} & set(found) and found[0].startswith("CONV_2D")
    models.save(fixed.model, tmp_path / "fixed.keras", fixed.spec)
    again = models.load(tmp_path / "fixed.keras")
    assert again.spec == fixed.spec
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(again.model(fixed.spec.normalize(image)), fixed.model(fixed.spec.normalize(image)))


def nested():
    """An inner model that is called twice, and one that scales its image."""
    x = inside = keras.Input((12, 12, 3), name="inside")
    x = layers.Conv2D(3, 3, padding="same", name="inner_conv")(layers.Rescaling(1 / 255, name="scale")(x))
    entry = keras.Model(inside, x, name="entry")
    block = keras.Sequential(
        [keras.Input((12, 12, 3)), layers.Conv2D(3, 3, padding="same", name="twice"), ACT("hard_silu", name="swish")],
        name="block",
    )
    inputs = keras.Input((12, 12, 3), name="image")
    x = layers.GlobalAveragePooling2D(name="pool")(block(block(entry(inputs))))
    return shaken(keras.Model(inputs, layers.Dense(4, activation="softmax", name="classes")(x), name="outer"))


def test_nested_models_stay_nested_and_shared():
    model, spec = nested(), SPEC.with_scaling("raw")
    weights = [w.copy() for w in model.get_weights()]
    fixed = fixes.apply_fixes(model, ["all"], spec)
    assert [(n, ls) for n, ls, _ in fixed.applied] == [
        ("rescaling", ("scale", "inner_conv")), ("hard_swish", ("swish",)), ("global_pool", ("pool",)),
    ]  # fmt: skip
    same_answers(model, fixed.model, spec)
    names = [layer.name for layer in fixed.model.layers]
    assert {"entry", "block", "classes"} <= set(names) and "scale" not in [
        layer.name for layer in fixed.model.get_layer("entry").layers
    ]
    assert len(fixed.model.get_weights()) == len(weights)
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    found = operations(fixed.model, spec)
    assert found.count("ADD/RELU6") == 2 and not {"HARD_SWISH", "MEAN"} & set(found)


def test_scaling_moves_into_the_input_spec_where_zeros_stand_around_the_image():
    """Rescaling, then Normalization, each by channel; then a convolution that pads."""

    def middle(x):
        x = layers.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.04, 0.09, 0.16], name="norm")(
            layers.Rescaling(1 / 255, name="scale")(x)
        )
        return layers.Conv2D(4, 3, padding="same", name="c")(x)

    spec = SPEC.with_scaling("raw")
    model = made(middle, stem=False, spec=spec)
    assert fixes.FIXES["rescaling"].find(model) == []
    assert fixes.FIXES["rescaling"].find(model, spec) == ["scale", "norm"]
    fixed = fixes.apply_fixes(model, ["rescaling"], spec)
    assert fixed.spec.mean == pytest.approx((102, 127.5, 153)) and fixed.spec.std == pytest.approx((51, 76.5, 102))
    same_answers(model, fixed.model, spec, fixed.spec)
    assert operations(fixed.model, fixed.spec)[0] == "CONV_2D" != operations(model, spec)[0]


def test_an_adapted_normalization_keeps_its_statistics():
    norm = layers.Normalization(name="norm")
    norm.adapt(np.random.default_rng(0).uniform(2, 9, (50, 12, 12, 8)))
    model = made(lambda x: layers.GlobalMaxPooling2D(name="p")(layers.ReLU()(norm(x))))
    fixed = fixes.apply_fixes(model, ["rescaling", "global_pool"], SPEC)
    assert [name for name, *_ in fixed.applied] == ["global_pool"]
    assert "no convolution alone reads what it gives, and it is not the first layer" in dict(fixed.refused)["rescaling"]
    same_answers(model, fixed.model)


def test_a_scaling_that_can_go_nowhere_is_refused():
    def middle(x):
        x = layers.Rescaling(-1.0, 3.0, name="negative")(x)
        return layers.Conv2D(4, 3, padding="same", name="c")(x)

    model = made(middle, stem=False)
    fixed = fixes.apply_fixes(model, ["rescaling"], SPEC)
    assert fixed.model is model and fixed.spec is SPEC and fixed.applied == ()
    ((name, reason),) = fixed.refused
    assert name == "rescaling" and "negative" in reason and "zeros around the image of c" in reason


@pytest.mark.parametrize(
    ("fix", "middle", "reason"),
    [
        ("activations", ACT("gelu", name="a"), "needs erf"),
        ("activations", layers.ELU(name="a"), "elu: it needs an exponential or a division"),
        ("activations", ACT("selu", name="a"), "selu: "),
        ("resize", layers.Resizing(9, 9, interpolation="bicubic", name="a"), "no bicubic resizing"),
        ("resize", layers.Resizing(5, 5, interpolation="area", name="a"), "no area resizing"),
    ],
)
def test_what_nothing_equals_is_refused_with_the_layer_and_the_reason(fix, middle, reason):
    model = made(middle)
    fixed = fixes.apply_fixes(model, [fix], SPEC)
    assert fixed.model is model and fixed.applied == ()
    assert fixed.refused[0][0] == fix and fixed.refused[0][1].startswith("a: ") and reason in fixed.refused[0][1]


def test_a_fix_that_changes_the_answers_is_refused_and_the_others_are_kept(monkeypatch):
    """A batch norm replaced by nothing: on fresh statistics (0 and 1) the answers would even stay."""

    def drop_norms(view, spec):
        plan = Plan()
        for node in view.nodes:
            if node.operation.name == "norm":
                plan.change(node, lambda make, node: make.value(node.input_tensors[0]))
        return plan

    wrong = dataclasses.replace(fixes.FIXES["batch_norm"], plan=drop_norms)
    monkeypatch.setitem(fixes.FIXES, "batch_norm", wrong)
    model = made(lambda x: layers.GlobalAveragePooling2D(name="pool")(dense_norm(x)))
    norm = model.get_layer("norm")
    norm.set_weights([np.ones(8), np.zeros(8), np.zeros(8), np.full(8, 1 - norm.epsilon)])
    fixed = fixes.apply_fixes(model, ["all"], SPEC)
    assert [name for name, *_ in fixed.applied] == ["global_pool"]
    ((name, reason),) = fixed.refused
    assert name == "batch_norm" and reason.startswith("norm: its outputs differ by ")
    same_answers(model, fixed.model)


def test_a_fix_that_cannot_be_built_is_refused(monkeypatch):
    def broken(view, spec):
        plan = Plan()
        plan.change(view.nodes[0], lambda make, node: layers.Dense(-1)(make.value(node.input_tensors[0])))
        return plan

    monkeypatch.setitem(fixes.FIXES, "resize", dataclasses.replace(fixes.FIXES["resize"], plan=broken))
    model = made(layers.ReLU())
    fixed = fixes.apply_fixes(model, ["resize"], SPEC)
    assert fixed.model is model and "cannot be built" in fixed.refused[0][1]


def test_a_batch_norm_that_the_converter_joins_is_left_alone():
    model = made(lambda x: layers.BatchNormalization(name="n")(layers.Conv2D(4, 3, name="c")(x)))
    assert fixes.FIXES["batch_norm"].find(model) == []

    def twice(x):
        y = layers.Conv2D(4, 3, name="c")(x)
        return layers.Add()([layers.BatchNormalization(name="n")(y), y])

    shared = made(twice)
    assert fixes.FIXES["batch_norm"].find(shared) == ["n"]


def test_a_layer_that_is_used_twice_stays_one_layer():
    act, norm = layers.LeakyReLU(name="act"), layers.BatchNormalization(name="norm")
    model = made(lambda x: layers.Add()([norm(act(x)), norm(act(layers.MaxPooling2D(3, 1, "same")(x)))]))
    fixed = fixes.apply_fixes(model, ["all"], SPEC)
    assert [(n, ls) for n, ls, _ in fixed.applied] == [("batch_norm", ("norm",)), ("activations", ("act",))]
    for name in ("act", "norm"):
        assert len(fixed.model.get_layer(name)._inbound_nodes) == 2
    same_answers(model, fixed.model)


def test_a_sum_that_is_no_hard_swish_is_left_alone():
    for middle in (
        lambda x: x * ops.relu6(x + 2.0) / 6.0,
        lambda x: x * ops.relu6(x + 3.0) / 5.0,
        lambda x: layers.Multiply()([x, ACT("hard_sigmoid")(layers.ReLU()(x))]),
    ):
        model = made(middle)
        assert fixes.apply_fixes(model, ["all"], SPEC).model is model
        assert "HARD_SWISH" not in operations(model)


def test_static_batch_is_given_only_by_name():
    model = made(layers.GlobalAveragePooling2D(name="pool"))
    assert fixes.apply_fixes(model, ["all"], SPEC).model.input_shape == (None, 12, 12, 3)
    fixed = fixes.apply_fixes(model, ["static_batch"], SPEC)
    assert fixed.model.input_shape == (1, 12, 12, 3) and fixed.model.output_shape == (1, 4)
    assert fixed.applied == (("static_batch", ("image",), 0.0),)
    assert fixes.apply_fixes(fixed.model, ["static_batch"], SPEC).refused == (
        ("static_batch", "no layer of the model needs it"),
    )


def test_nothing_applies():
    model = builders.build("resnet8", (12, 12, 3), 4, width=0.25)
    fixed = fixes.apply_fixes(model, ["hard_swish", "rescaling"], SPEC)
    assert fixed.model is model and fixed.spec is SPEC and fixed.applied == ()
    assert fixed.refused == tuple((name, "no layer of the model needs it") for name in ("rescaling", "hard_swish"))


def test_a_loaded_model_is_fixed_by_what_stands_behind_the_option():
    model = made(lambda x: layers.Activation("gelu", name="g")(layers.Conv2D(4, 3, padding="same", name="c")(
        layers.Rescaling(1 / 127.5, -1.0, name="scale")(x)
    )), stem=False)  # fmt: skip
    loaded, lines = models.from_keras(model, stored_spec=SPEC.with_scaling("raw")), []
    fixed = fixes.fix_loaded(loaded, "rescaling, activations", lines.append)
    assert fixed.spec == SPEC.with_scaling("signed") and fixed.name == loaded.name
    assert lines[0].startswith("rescaling: changed scale, outputs within ")
    assert lines[1].startswith("activations: refused. g: the exact GELU")
    assert lines[2].startswith("rescaling: the scaling is now outside the model, (pixel - 127.5) / 127.5")
    with pytest.raises(InputError, match="There is no fix of that name"):
        fixes.fix_loaded(loaded, "rescaling,nothing")


def test_unknown_names_and_models_that_cannot_be_walked_are_refused():
    model = made(layers.ReLU())
    with pytest.raises(InputError, match="Did you mean hard_swish"):
        fixes.apply_fixes(model, ["hard_swich"], SPEC)
    with pytest.raises(InputError, match="does not fit the model"):
        fixes.apply_fixes(model, ["all"], InputSpec(16, 16, 3))

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ModelError, match="subclassed"):
        fixes.apply_fixes(Own(), ["all"], SPEC)
    inner = keras.Sequential([keras.Input((12, 12, 8)), layers.ReLU(name="stem")], name="inner")
    with pytest.raises(ModelRefused, match="same name"):
        fixes.apply_fixes(made(inner), ["all"], SPEC)


def test_every_fix_says_what_it_is_for():
    for name, fix in fixes.FIXES.items():
        assert fix.name == name and fix.description and set(fix.helps) <= {"cpu", "gpu", "edgetpu"} and fix.helps
    assert [fix.name for fix in fixes.chosen(["all", "static_batch"])] == list(fixes.FIXES)
