"""ONNX files in less than float32, by onnxruntime's converters; inputs and outputs stay float32."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from mmdet_lors.inference.pictures import Reader

FP16 = {"Conv", "ConvTranspose", "Gemm", "LayerNormalization", "MatMul", "MaxPool", "Relu"}
"""Operators that compute in float16; all others, the arithmetic of boxes among them, in float32."""
INT8 = ["Conv", "Gemm", "MatMul"]
"""Operators that get int8 weights and uint8 inputs, where they have weights."""
LARGE = 10_000
"""Numbers from which on a weight is stored in float16, whoever uses it; the boxes of all queries are fewer."""


def to_fp16(path: Path) -> None:
    """Rewrite a file: large weights in float16, and :data:`FP16` computed in it.

    What depends on weights alone, LORS's folding for one, is computed in float32, without which onnxruntime would not
    do it on opening the file.
    """
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = OnnxModel(onnx.load(path))
    graph = model.graph()
    constant, folding = {weight.name for weight in graph.initializer}, []
    for node in graph.node:
        if constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
            folding.append(node.name)
    others = {node.op_type for node in graph.node} - FP16
    model.convert_float_to_float16(use_symbolic_shape_infer=False, op_block_list=others, node_block_list=folding)
    graph = model.graph()
    made: set[str] = set()
    for node in list(graph.node):  # the converter adds the same cast once for every node that needs it
        if made.issuperset(node.output):
            graph.node.remove(node)
        made.update(node.output)
    for weight in graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and math.prod(weight.dims) >= LARGE:
            name, values = weight.name, onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
            graph.node.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    del graph.value_info[:]  # some still have the types of before
    model.topological_sort()
    onnx.save(model.model, path)


class Calibration:
    """What onnxruntime reads typical inputs from, one by one."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self._feeds = ({"images": image} for image in images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input, or None after the last."""
        return next(self._feeds, None)


def to_int8(path: Path, images: Iterable[np.ndarray]) -> None:
    """Rewrite a file: the weights of :data:`INT8` in int8, with a scale per output channel, their inputs in uint8.

    Args:
        path: the file.
        images: typical inputs of it; what they reach is the range of every quantised input.
    """
    import onnx
    from onnxruntime import quantization

    graph = onnx.load(path).graph
    weights = {weight.name for weight in graph.initializer}
    computed = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
    logging.disable(logging.WARNING)  # it asks for a step that the exporter has done
    try:
        quantization.quantize_static(
            path,
            path,
            Calibration(images),
            op_types_to_quantize=INT8,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            nodes_to_exclude=computed,
            extra_options=dict(OpTypesToExcludeOutputQuantization=["Gemm", "MatMul"]),
        )
    finally:
        logging.disable(logging.NOTSET)


def picture(path: str, size: tuple[int, int]) -> np.ndarray:
    """A picture as an exported file takes it, (1, 3, H, W), RGB, 0 to 255, float32, resized to ``size`` = (W, H).

    Raises:
        UserError: it cannot be read.
    """
    image = cv2.resize(Reader()(path), size, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(image[None, :, :, ::-1].transpose(0, 3, 1, 2), dtype=np.float32)
