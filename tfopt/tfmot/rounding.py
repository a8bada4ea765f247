"""Where simulated int8 rounds, decided on the neutral graph.

A rounding stands where TFLite will have a tensor, and none stands between operations that TFLite
fuses (kernel, batch norm, addition, ReLU): a tensor that is rounded twice in training but once in
the file, or the other way round, is a model trained for another network.
"""

from __future__ import annotations

from collections import defaultdict

from tfopt.tfmot.neutral import Graph, Node

KERNELS = ("Conv2D", "DepthwiseConv2D", "Dense", "Conv2DTranspose")
#: operations whose int8 output has the scale of their input, or a fixed one, in TFLite
_TRANSPARENT = (
    "Flatten", "Reshape", "Permute", "ZeroPadding2D", "Cropping2D", "Dropout", "SpatialDropout2D", "MaxPooling2D",
    "AveragePooling2D", "GlobalMaxPooling2D", "UpSampling2D", "Softmax", "MultiHeadAttention",
)  # fmt: skip
_FIXED_SCALE = ("softmax", "sigmoid", "tanh", "linear")


def plan(graph: Graph) -> dict[str, str]:
    """Node name -> where its rounding stands: 'kernel', 'fused kernel', 'output' or 'none'.

    'kernel' rounds the weights and the output, 'fused kernel' the weights alone.
    """
    nodes = {node.name: node for node in graph.nodes}
    producer = {call.output: call.node for call in graph.calls}
    consumers: dict[int, list[str]] = defaultdict(list, {number: [""] for number in graph.outputs})
    for call in graph.calls:
        for number in call.inputs:
            consumers[number].append(call.node)
    followers, sources = defaultdict(list), defaultdict(list)
    for call in graph.calls:
        followers[call.node].append(consumers[call.output])
        sources[call.node] += [producer.get(number, "") for number in call.inputs]

    def leads_to(node: Node, test) -> bool:
        """Whether every use of the node has one consumer, which passes the test."""
        return all(len(names) == 1 and names[0] and test(nodes[names[0]]) for names in followers[node.name])

    def folds(node: Node) -> bool:
        return node.kind == "BatchNormalization"

    rounding: dict[str, str] = {}
    for node in graph.nodes:
        before_relu = leads_to(node, _fusable_relu)
        if node.kind in KERNELS:
            fuses = node.config.get("activation", "linear") == "linear" and (before_relu or leads_to(node, folds))
            rounding[node.name] = "fused kernel" if fuses else "kernel"
        elif (
            node.kind in _TRANSPARENT
            or _keeps_scale(node)
            or (node.kind == "Activation" and node.config["activation"] in _FIXED_SCALE)
        ):
            rounding[node.name] = "none"
        elif node.kind == "Add" or (
            folds(node) and {rounding.get(name) for name in sources[node.name]} == {"fused kernel"}
        ):
            rounding[node.name] = "none" if before_relu else "output"
        else:
            rounding[node.name] = "output"
    for node in graph.nodes:
        if node.kind != "Concatenate":
            continue
        for name in filter(None, sources[node.name]):  # they must share one scale, so only the result is rounded
            feeds_only_this = nodes[name].kind != "Concatenate" and leads_to(nodes[name], bool)
            if rounding[name] == "output" and feeds_only_this:
                rounding[name] = "none"
    return rounding


def _keeps_scale(node: Node) -> bool:
    function = node.config.get("function") if node.kind == "Function" else ""
    return function in ("slice", "pad") or (function == "reduce" and node.config["how"] in ("max", "min"))


def unfolded(graph: Graph) -> list[Node]:
    """Batch norms that no kernel absorbs: the converter leaves part of their arithmetic in float."""
    rounding = plan(graph)
    producer = {call.output: call.node for call in graph.calls}
    sources = defaultdict(set)
    for call in graph.calls:
        sources[call.node] |= {producer.get(number, "") for number in call.inputs}
    norms = [node for node in graph.nodes if node.kind == "BatchNormalization"]
    return [n for n in norms if any(rounding.get(name) != "fused kernel" for name in sources[n.name])]


def _fusable_relu(node: Node) -> bool:
    settings = node.config
    plain = not settings.get("negative_slope") and not settings.get("threshold")
    return node.kind == "ReLU" and plain and settings.get("max_value") in (None, 6.0)
