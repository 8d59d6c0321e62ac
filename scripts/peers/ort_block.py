"""ONNX Runtime's QMoE in 8 bits; run by bench_experts.py with a Python that has onnxruntime.

One node `com.microsoft::QMoE`: int8 weights with a scale per 32 inputs, which ONNX Runtime packs
when the session is made. The node has the router's softmax and top-k within; its logits here are
the logarithms of the router weights, so that it comes to the same experts and weights.
"""

import numpy as np
from serve import Array, Compute, Layer, Point, serve

BLOCK = 32  # inputs that share a scale
ABSENT = -1e4  # logit of an expert that is not chosen


def quantize(weight_EYX: Array) -> tuple[Array, Array]:
    """Weights as uint8 around 128, and their scales `[E, Y, X / BLOCK]`."""
    E, Y, X = weight_EYX.shape
    whole_EYX = np.empty((E, Y, X), np.uint8)
    scale_EYB = np.empty((E, Y, X // BLOCK), np.float32)
    for whole_YX, scale_YB, weight_YX in zip(whole_EYX, scale_EYB, weight_EYX, strict=True):
        blocks = weight_YX.reshape(Y, X // BLOCK, BLOCK)
        scale_YB[:] = np.maximum(np.abs(blocks).max(axis=2) / 127, np.finfo(np.float32).tiny)
        whole_YX[:] = (np.rint(blocks / scale_YB[..., None]) + 128).reshape(Y, X)
    return whole_EYX, scale_EYB


def interleaved(array: Array | None, layer: Layer) -> Array | None:
    """Gate and up rows in turns, as the node wants them."""
    if array is None or layer.is_interleaved:
        return array
    gate, up = np.split(array, 2, axis=1)
    return np.stack([gate, up], axis=2).reshape(array.shape)


def make_model(layer: Layer) -> bytes:
    """The graph of one node."""
    from onnx import TensorProto, helper, numpy_helper

    # Weights are quantised before they change places: a quarter of the bytes to move.
    up, up_scale = (interleaved(a, layer) for a in quantize(layer.weight("gate_up")))
    down, down_scale = quantize(layer.weight("down"))
    arrays = {
        "up": up,
        "up_scale": up_scale,
        "up_bias": interleaved(layer.array("gate_up_bias"), layer),
        "down": down,
        "down_scale": down_scale,
        "down_bias": layer.array("down_bias"),
    }
    names = [name if array is not None else "" for name, array in arrays.items()]
    limit = {} if layer.gate_limit is None else {"swiglu_limit": layer.gate_limit}
    node = helper.make_node(
        "QMoE",
        ["hidden", "logits", *names],
        ["out"],
        domain="com.microsoft",
        k=layer.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=layer.gate_alpha,
        activation_beta=layer.up_offset,
        normalize_routing_weights=1,
        expert_weight_bits=8,
        block_size=BLOCK,
        **limit,
    )
    D = down.shape[1]
    graph = helper.make_graph(
        [node],
        "experts",
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["T", D]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", layer.num_experts]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", D])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items() if a is not None],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def load(layer: Layer):
    """Quantise a layer and make a session for it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = layer.threads
    # Its threads spin for some ms after a run, as is ONNX Runtime's default and best at few rows;
    # the benchmark sleeps until they have stopped.
    session = ort.InferenceSession(make_model(layer), options, ["CPUExecutionProvider"])

    def prepare(point: Point) -> Compute:
        logits_TE = np.full((len(point.hidden_TD), layer.num_experts), ABSENT, np.float32)
        np.put_along_axis(logits_TE, point.index_TK, np.log(point.weights_TK), axis=1)
        feeds = {"hidden": point.hidden_TD, "logits": logits_TE}
        return lambda: session.run(None, feeds)[0]

    return prepare, {"onnxruntime": ort.__version__}


if __name__ == "__main__":
    serve(load)
