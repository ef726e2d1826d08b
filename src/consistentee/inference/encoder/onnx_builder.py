"""ONNX graphs under construction, one inside another.

A graph is the protobuf message itself, filled in place: the branches of an `If` are part of it from the start, so that
no weight is copied from level to level. Equal constants are kept once, in the graph that first needed them; those
inside it see them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from consistentee.errors import require_extra

FUSED, FUSED_OPSET = "com.microsoft", 1
OPSET, HIGHEST_OPSET = 17, 21
"""The first version of the standard operators with LayerNormalization, and the last one that was tried."""

EXTERNAL_BYTES = 1024
"""Smaller constants stay where they are needed: no weights, for a file of their own or the outermost graph."""

Shape = Sequence[int | str]


@dataclass(frozen=True)
class GraphStyle:
    """How graphs are written.

    Args:
        opset: version of the standard operators.
        portable: standard operators only; else also ONNX Runtime's fused ones, see its ContribOperators.md.
        int8: the weights of the layers in 8 bits, their inputs quantised as they come.
        weights_outside: weights stand in the outermost graph. A runtime copies what is inside a branch once for each
            level, so that it loads faster; it lays out none of these for the processor, so that it runs slower.
    """

    opset: int = OPSET
    portable: bool = False
    int8: bool = False
    weights_outside: bool = False


@dataclass
class WeightFile:
    """Where weights go that are too many for one message, which may have 2 GB.

    Args:
        stream: open for writing.
        name: of the file, beside the graph.
    """

    stream: BinaryIO
    name: str

    def write(self, array: NDArray[Any]) -> dict[str, str]:
        """Append values; gives where they are."""
        start = -(-self.stream.tell() // 4096) * 4096
        self.stream.seek(start)
        self.stream.write(array.tobytes())
        return {"location": self.name, "offset": str(start), "length": str(array.nbytes)}


@dataclass
class _Whole:
    """What all graphs of one model share."""

    style: GraphStyle
    weights: WeightFile | None
    count: int = 0
    uses_fused: bool = False


@dataclass
class _Constants:
    """Names of constants by their content; what is not here may be in the graph outside."""

    outside: _Constants | None
    names: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def find(self, key: tuple[Any, ...]) -> str | None:
        place: _Constants | None = self
        while place is not None:
            if key in place.names:
                return place.names[key]
            place = place.outside
        return None


class Graph:
    """A graph under construction; values are known by their names.

    Args:
        style: how it is written.
        weights: where large constants go; None keeps them in the graph.
    """

    def __init__(self, style: GraphStyle | None = None, weights: WeightFile | None = None) -> None:
        self._onnx = require_extra("onnx", "onnx")
        self._model: Any = self._onnx.ModelProto(producer_name="consistentee")
        self._proto: Any = self._model.graph
        self._proto.name = "consistentee"
        self._whole = _Whole(style or GraphStyle(), weights)
        self._constants = _Constants(None)
        self._outermost: Graph = self

    @property
    def style(self) -> GraphStyle:
        """How it is written."""
        return self._whole.style

    def op(self, kind: str, *inputs: str, fused: bool = False, **attributes: Any) -> str:
        """One operator; gives its first output. An empty input name stands for an optional one left out."""
        return self.ops(kind, *inputs, outputs=1, fused=fused, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, fused: bool = False, **attributes: Any) -> list[str]:
        """One operator with several outputs."""
        names = self._names(outputs)
        domain = {"domain": FUSED} if fused else {}
        self._whole.uses_fused |= fused
        # Named: fusions of onnxruntime 1.20 call what they make of nodes without names alike, and refuse it then.
        node = self._onnx.helper.make_node(kind, list(inputs), names, names[0], **domain, **attributes)
        self._proto.node.append(node)
        return names

    def reduce(self, kind: str, value: str, axis: int | None, *, keepdims: bool = True) -> str:
        """The largest, least or mean over an axis, or over all; opset 18 made an input of what was an attribute."""
        options: dict[str, Any] = {"keepdims": int(keepdims)}
        if axis is None:
            return self.op(kind, value, **options)
        if self.style.opset >= 18 or kind == "ReduceSum":
            return self.op(kind, value, self.constant([axis]), **options)
        return self.op(kind, value, axes=[axis], **options)

    def choose(self, condition: str, outputs: int) -> tuple[list[str], Graph, Graph]:
        """An `If`: the names of its outputs, and both branches, to be filled and to be ended by `give`."""
        names = self._names(outputs)
        node = self._proto.node.add(op_type="If", name=names[0], input=[condition], output=names)
        branches: list[Graph] = []
        for name in ("then_branch", "else_branch"):
            attribute = node.attribute.add(name=name, type=self._onnx.AttributeProto.GRAPH)
            branch = object.__new__(Graph)
            branch._onnx, branch._whole, branch._outermost = self._onnx, self._whole, self._outermost
            branch._proto, branch._constants = attribute.g, _Constants(self._constants)
            attribute.g.name = f"{name}_{self._whole.count}"
            branches.append(branch)
        return list(node.output), branches[0], branches[1]

    def give(self, values: Sequence[str], kinds: Sequence[str]) -> None:
        """End a branch: what it gives, values of its own, with their kinds (`float`, `int64`, ...)."""
        for value, kind in zip(values, kinds, strict=True):
            self._proto.output.append(self._value_info(value, kind, None))

    def constant(self, values: Tensor | NDArray[Any] | Sequence[int], name: str | None = None) -> str:
        """Weights, float32; an array as it is; or a list of whole numbers, int64. `name`: of an input's default."""
        if isinstance(values, Tensor):
            array = values.detach().float().cpu().contiguous().numpy()
        else:
            array = (
                np.ascontiguousarray(values) if isinstance(values, np.ndarray) else np.array(values, np.int64)
            )
            array = array.reshape(np.shape(values))
        key = (array.dtype.str, array.shape, hashlib.sha1(array.tobytes(), usedforsecurity=False).digest())
        known = None if name is not None else self._constants.find(key)
        if known is not None:
            return known
        found = name or f"c{self._count()}"
        weights = self._whole.weights
        home = self._outermost if self.style.weights_outside and array.nbytes >= EXTERNAL_BYTES else self
        if weights is None or array.nbytes < EXTERNAL_BYTES:
            home._proto.initializer.append(self._onnx.numpy_helper.from_array(array, found))
        else:
            kinds = self._onnx.TensorProto
            tensor = home._proto.initializer.add(name=found, dims=array.shape, data_location=kinds.EXTERNAL)
            tensor.data_type = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            for entry, value in weights.write(array).items():
                tensor.external_data.add(key=entry, value=value)
        if name is None:
            home._constants.names[key] = found
        return found

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(np.array(value, dtype=np.float32))

    def tensor(self, array: NDArray[Any]) -> Any:
        """An array as the attribute of an operator."""
        return self._onnx.numpy_helper.from_array(array)

    def model(
        self,
        inputs: Mapping[str, tuple[str, Shape]],
        outputs: Mapping[str, tuple[str, str, Shape | None]],
    ) -> Any:
        """The finished model, a protobuf message.

        Args:
            inputs: kind (`float`, `int32`, `int64`) and shape by name.
            outputs: value, kind and shape (None: not known) by name.
        """
        for name, (kind, shape) in inputs.items():
            self._proto.input.append(self._value_info(name, kind, shape))
        for name, (value, kind, shape) in outputs.items():
            self._proto.node.append(self._onnx.helper.make_node("Identity", [value], [name], name))
            self._proto.output.append(self._value_info(name, kind, shape))
        helper = self._onnx.helper
        opsets = [helper.make_opsetid("", self.style.opset)]
        if self._whole.uses_fused:
            opsets.append(helper.make_opsetid(FUSED, FUSED_OPSET))
        self._model.opset_import.extend(opsets)
        self._model.ir_version = max(9, helper.find_min_ir_version_for(opsets[:1]))
        return self._model

    def _value_info(self, name: str, kind: str, shape: Shape | None) -> Any:
        number = self._onnx.TensorProto.DataType.Value(kind.upper())
        return self._onnx.helper.make_tensor_value_info(name, number, None if shape is None else list(shape))

    def _count(self) -> int:
        self._whole.count += 1
        return self._whole.count

    def _names(self, count: int) -> list[str]:
        return [f"v{self._count()}" for _ in range(count)]
