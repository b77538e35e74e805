"""Running an ONNX file in onnxruntime on the CPU, with the results of its layers."""

import ast
import math
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from sparsepass.graph.equivalence.artifact import (
    Artifact,
    Inputs,
    Observe,
    Step,
    canonical_path,
    coarsest,
    fitting,
    layer_results,
)
from sparsepass.graph.equivalence.widened import widened_copy
from sparsepass.graph.limits import refused
from sparsepass.graph.onnx_files import check_external_data, read_proto
from sparsepass.graph.support import EquivalenceError, first_line

_MATMULS = {"MatMul", "Gemm", "Conv", "FusedMatMul", "FusedGemm", "FusedConv", "MatMulNBits", "MatMulInteger"}
_SHAPES = {"Shape", "Size", "NonZero"}
_SUMS = {"Add", "Sum"}
_SCOPES = "pkg.torch.onnx.name_scopes"
_LONGEST_SCOPES = 10_000
_MOST_POSITIONS = 1 << 24
_PAST = re.compile(r"(past|cache)(?!_position)")
_CACHE_LEAF = re.compile(r"(?:past|present|cache).*?(\d+)\..*?(key|value)")


@final
class OnnxFile(Artifact):
    """An ONNX file, run by onnxruntime's CPU provider.

    Weights beside the file are read from there. A decoder with a key/value cache gets an empty one, so that it computes
    a whole prompt as a program does; positions 0, 1, 2... and an attention mask of ones are made up where it wants
    them.

    Layers are found by the module names that torch.onnx writes into each node's metadata, by those in node names
    (``/model/layers.0/mlp/up_proj/MatMul``, as older exporters write them), or by the names of the weights. Their
    values come from a second run of a copy, held in memory, in which they are outputs: the outputs compared are always
    those of the file as it is. Only of a file in bfloat16, for which the CPU has no kernels, a copy in float32 is run.

    Args:
        path: The file.

    Raises:
        EquivalenceError: If it cannot be read as ONNX.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self._path = path
        if not path.is_file():
            raise EquivalenceError(f"{path} does not exist; check the path")
        self._model = read_proto(path, error=EquivalenceError)
        check_external_data(self._model, path)
        if not self._model.graph.output:
            raise EquivalenceError(f"{path} is no ONNX model, or one without outputs; export it again")
        self._dtype = coarsest(_DTYPES.get(t.data_type, torch.int64) for t in self._model.graph.initializer)
        self._description = str(Path(path.parent.name, path.name))
        if self._dtype is torch.bfloat16:
            folder = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            copy = widened_copy(path, Path(folder))
            assert copy is not None, "an initializer is bfloat16"
            self._path, self._model = copy, onnx.load(copy, load_external_data=False)

    @property
    def description(self) -> str:
        """What it is."""
        return self._description

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest floating dtype among its initializers."""
        return self._dtype

    def run(self, inputs: Inputs, observe: Observe | None = None) -> dict[str, Tensor]:
        """Compute the outputs; see `Artifact.run`."""
        feeds = self.feeds(inputs)
        limits = tuple(p.value for p in self._model.metadata_props if p.key == "sparsepass.limits" and p.value)
        if words := refused(limits, tuple((name, tuple(tensor.shape)) for name, tensor in feeds.items())):
            raise EquivalenceError(f"{self.description}: {words}; give inputs of such sizes")
        names = [output.name for output in self._model.graph.output]
        outputs = self._infer(str(self._path), feeds, names)
        if observe is not None:
            layers = layer_results(_steps(self._model.graph))
            for path, value in zip(layers.values(), self._infer_layers(feeds, list(layers)), strict=True):
                if value.is_floating_point():
                    observe(path, value)
        return {output_name(name): value for name, value in zip(names, outputs, strict=True)}

    def facts(self, layer: str) -> str:
        """The initializers that stand in the layer."""
        graph = self._model.graph
        shapes = {t.name: list(t.dims) for t in graph.initializer if len(t.dims) > 1}
        read = [name for node, step in zip(graph.node, _steps(graph), strict=True) if step.path == layer for name in node.input]
        return ", ".join(f"{name} {shapes[name]}" for name in dict.fromkeys(read) if name in shapes)

    def _infer_layers(self, feeds: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
        import onnx

        if not names:
            return []
        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        existing = {output.name for output in copy.graph.output}
        copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in existing)
        return self._infer(copy.SerializeToString(), feeds, names)

    def _infer(self, model: str | bytes, feeds: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        exact_products(options)
        options.intra_op_num_threads = torch.get_num_threads()
        if isinstance(model, bytes):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self._path.parent.absolute())
            )
        try:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            values = session.run_with_ort_values(names, {name: _to_ort(t) for name, t in feeds.items()})
        except Exception as error:  # onnxruntime's own errors derive from Exception alone
            raise EquivalenceError(
                f"onnxruntime cannot run {self._path}: {first_line(error)[:300]}. Inputs: "
                + ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in feeds.items())
            ) from error
        return [_from_ort(value) for value in values]

    def feeds(self, inputs: Inputs) -> dict[str, Tensor]:
        """All inputs of the graph on the CPU, in its types: those given, and those that are made up.

        Raises:
            EquivalenceError: If one is missing and cannot be made up, or one is given that it does not take.
        """
        weights = {t.name for t in self._model.graph.initializer}
        declared = {i.name: i for i in self._model.graph.input if i.name not in weights}
        if isinstance(inputs, Mapping):
            named = fitting(inputs, declared, self.description)
        else:
            given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            if len(given) > len(declared):
                raise EquivalenceError(f"{self.description} takes {len(declared)} inputs, {list(declared)}; got {len(given)}")
            named = dict(zip(declared, given, strict=False))
        feeds = {}
        for name, info in declared.items():
            value = named[name] if name in named else _derived(info, named, self.description)
            feeds[name] = value.detach().to("cpu", _DTYPES.get(info.type.tensor_type.elem_type, value.dtype))
        return feeds


_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
_BFLOAT16 = 16


def _derived(info: Any, named: Mapping[str, Tensor], where: str) -> Tensor:
    """Make up an input that was not given: an empty cache, positions, a mask of ones, the cache switch."""
    name = info.name
    dims = [dim.dim_param if dim.dim_param else dim.dim_value for dim in info.type.tensor_type.shape.dim]
    main = next((t for t in named.values() if t.dim() >= 2), None)
    if name == "use_cache_branch":
        return torch.zeros([1] * len(dims), dtype=torch.bool)
    if main is not None and _PAST.search(name) and len(dims) >= 3:
        return _empty_cache(name, dims, main.shape[0], where)
    if main is not None and name.endswith("attention_mask") and len(dims) == 2:
        source = named.get(name.replace("attention_mask", "input_ids"), main)
        return torch.ones(source.shape[:2], dtype=torch.int64)
    if main is not None and name == "token_type_ids":
        return torch.zeros(main.shape[:2], dtype=torch.int64)
    if main is not None and name in ("position_ids", "cache_position"):
        leading = [dim if isinstance(dim, int) and dim > 0 else main.shape[0] for dim in dims[:-1]]
        if math.prod(leading) > _MOST_POSITIONS:
            raise EquivalenceError(f"{where} declares the input {name!r} {dims}, which is too large; export it again")
        return torch.arange(main.shape[1]).expand(*leading, main.shape[1])
    raise EquivalenceError(
        f"{where} needs the input {name!r} {dims}, which was not given and cannot be made up; add it to the inputs"
    )


def _empty_cache(name: str, dims: Sequence[int | str], batch: int, where: str) -> Tensor:
    # transformers' exporter writes the axes that do not vary as parameters named "2" or "8".
    sizes = [int(dim) if isinstance(dim, int) or (dim.isdecimal() and len(dim) < 20) else None for dim in dims]
    varying = [axis for axis, size in enumerate(sizes) if size is None and axis > 0]
    if len(varying) != 1:
        raise EquivalenceError(
            f"{where} has the cache input {name!r} {list(dims)}, and which axis is the length of the past cannot be "
            "told: expected exactly one axis that varies besides the batch; name only the axes that vary when "
            f"exporting, or add {name!r} to the inputs"
        )
    return torch.zeros([batch, *(size or 0 for size in sizes[1:])])


def exact_products(options: Any) -> None:
    """Let onnxruntime multiply quantized weights by activations as they are.

    By default it fuses DequantizeLinear and MatMul into a product that rounds activations to 8 bits (1.32): a file then gives
    other outputs than its operators say, by about 1% of the largest.

    Args:
        options: An ``onnxruntime.SessionOptions``, changed in place.
    """
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")


def output_name(name: str) -> str:
    """Exporters name the cache in several ways; all else keeps its name.

    >>> output_name("present.3.key"), output_name("output.past_key_values.layers.3.keys"), output_name("logits")
    ('past_key_values.3.key', 'past_key_values.3.key', 'logits')
    """
    match = _CACHE_LEAF.search(name)
    return f"past_key_values.{match[1]}.{match[2]}" if match else name


def _steps(graph: Any) -> list[Step]:
    weights = {t.name for t in graph.initializer}
    weighted = [
        node.op_type in _MATMULS or (node.op_type == "Gather" and not weights.isdisjoint(node.input[:1])) for node in graph.node
    ]
    return [
        Step(
            path=path,
            reads=() if node.op_type in _SHAPES else tuple(node.input),
            writes=tuple(node.output),
            is_matmul=is_matmul,
            is_tensor=len(node.output) == 1 and node.op_type not in _SHAPES,
        )
        for node, path, is_matmul in zip(graph.node, _paths(graph, weighted), weighted, strict=True)
    ]


def _paths(graph: Any, weighted: Sequence[bool]) -> list[str]:
    """The module path of each node, by the first way of telling that knows it for some matmul."""
    paths = [""] * len(graph.node)
    for known in (_path_by_metadata, _path_by_name):
        paths = [known(node) for node in graph.node]
        if any(path for path, is_matmul in zip(paths, weighted, strict=True) if is_matmul):
            return paths
    return _paths_by_weights(graph)


def _path_by_metadata(node: Any) -> str:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    try:
        names = ast.literal_eval(scopes) if len(scopes) < _LONGEST_SCOPES else ""
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # what it raises about a text that is no list
        return ""
    is_path = isinstance(names, list) and len(names) > 1 and isinstance(names[-2], str)
    return canonical_path(names[-2]) if is_path else ""


def _path_by_name(node: Any) -> str:
    return canonical_path(".".join(node.name.split("/")[1:-1]))


def _paths_by_weights(graph: Any) -> list[str]:
    """A node that reads ``mlp.up_proj.weight`` stands in ``mlp.up_proj``, and so does one that adds up its results."""
    weights = {t.name: t.name.rpartition(".")[0] for t in graph.initializer}
    of_value: dict[str, str] = {}
    paths = []
    for node in graph.node:
        path = next((weights[name] for name in node.input if weights.get(name)), "")
        if not path and node.op_type in _SUMS:
            sources = {of_value.get(name, "") for name in node.input}
            path = sources.pop() if len(sources) == 1 else ""
        paths.append(path)
        of_value |= dict.fromkeys(node.output, path)
    return paths


def _to_ort(tensor: Tensor) -> Any:
    from onnxruntime import OrtValue

    tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), _BFLOAT16)
    return OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> Tensor:
    if value.element_type() == _BFLOAT16:  # numpy has no such type
        return torch.utils.dlpack.from_dlpack(value._ortvalue).clone()
    return torch.from_numpy(value.numpy())
