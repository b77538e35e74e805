"""Engines: what was written, running them on a GPU, and proving them.

1. Whole files are proved anywhere. On a GPU, the engines also have to compute what the program computes.
2. Memory is torch's, so running needs a CUDA build of torch.
3. TensorRT is imported in this process: an engine that was built and inspected is past the steps that crash.
"""

import importlib
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from sparsepass.export.targets.contract import Check
from sparsepass.export.targets.evidence import LayerEvidence, counts
from sparsepass.export.targets.onnx import OnnxArtifact
from sparsepass.export.targets.tensorrt.packages import Gpu, find
from sparsepass.graph.equivalence import Artifact, Inputs, Observe, OnnxFile, coarsest, compare, output_name
from sparsepass.graph.program import Program
from sparsepass.graph.support import EquivalenceError

_DTYPES: Final = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
}


@final
@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine that was built.

    Attributes:
        name: ``prefill``, ``decode``, ``encoder`` or ``model``; the role of the graph if it has several profiles.
        file: File with the engine.
        log: File with the builder's whole log, gzipped.
        graph: ONNX file that it was built from.
        profiles: Profile -> axis -> smallest, most common and largest length.
        targets: Compute capabilities that it runs on, as 86; empty if the runtime does not tell.
        size_bytes: Size of the engine.
        num_layers: Layers of the network.
        seconds: Time the builder took.
        flag_requested: Whether sparse tactics were allowed.
        num_eligible: Layers that the builder's log counts as eligible; None if it does not say.
        num_chosen: Layers that run sparse by the log; None if it does not say.
    """

    name: str
    file: str
    log: str
    graph: str
    profiles: Mapping[str, Mapping[str, tuple[int, int, int]]]
    targets: tuple[int, ...]
    size_bytes: int
    num_layers: int
    seconds: float
    flag_requested: bool
    num_eligible: int | None
    num_chosen: int | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


@final
@dataclass(frozen=True, kw_only=True)
class TensorrtArtifact:
    """What `lower_tensorrt` wrote.

    Attributes:
        onnx: The graphs that the engines were built from.
        runtime: Name of the package that built them.
        version: Its version.
        gpus: GPUs of the machine.
        engines: The engines.
        layers: What is known of each weight in each engine.
        notes: What a reader should know.
        measured: Profile -> times of the dense and the sparse engine, and the break-even; None if none were taken.
    """

    onnx: OnnxArtifact
    runtime: str
    version: str
    gpus: tuple[Gpu, ...]
    engines: tuple[Engine, ...]
    layers: tuple[LayerEvidence, ...]
    notes: tuple[str, ...]
    measured: Mapping[str, Any] | None = None

    def section(self) -> dict[str, Any]:
        """The section ``sparsity`` of the report."""
        return {
            "runtime": self.runtime,
            "runtime_version": self.version,
            "gpus": [f"{gpu.name} (SM{gpu.sm})" for gpu in self.gpus],
            "engines": [engine.to_dict() for engine in self.engines],
            "layers": [layer.to_dict() for layer in self.layers],
            "counts": counts(self.layers),
            "measured": self.measured,
        }


@final
class EngineFile(Artifact):
    """An engine, run on the first GPU.

    Inputs that are not given are made up as for the ONNX file that it was built from: an empty cache, positions, masks.

    Args:
        path: The engine.
        graph: The ONNX file that it was built from.
        module: Python module with the TensorRT API.

    Raises:
        EquivalenceError: If it cannot be loaded on this machine.
    """

    def __init__(self, path: Path, graph: Path, module: str) -> None:
        if not torch.cuda.is_available():
            raise EquivalenceError(f"{path} cannot be run: this torch {torch.__version__} sees no GPU")
        trt = importlib.import_module(module)
        self._path, self._graph = path, OnnxFile(graph)
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EquivalenceError(f"{path} cannot be loaded here: it was built for another GPU or TensorRT; build it again")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EquivalenceError(f"{path} cannot be run here: the GPU has too little free memory for it")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: str(self._engine.get_tensor_mode(name)).endswith("INPUT") for name in names}
        self._nothing = torch.zeros(64, dtype=torch.int8, device="cuda")
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]

    @property
    def description(self) -> str:
        """What it is."""
        return str(Path(self._path.parent.name, self._path.name))

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest floating dtype among its inputs, outputs and weights."""
        return coarsest([self._graph.dtype, *(self._dtype(name) for name in (*self._inputs, *self._outputs))])

    def run(self, inputs: Inputs, observe: Observe | None = None) -> dict[str, Tensor]:
        """Compute the outputs; results of layers are not to be had, so ``observe`` gets none."""
        del observe
        bound = self._bind(self._graph.feeds(inputs))
        self._launch()
        torch.cuda.synchronize()
        return {output_name(name): bound[name].cpu() for name in self._outputs}

    def facts(self, layer: str) -> str:
        """Nothing: what is known of a layer stands in the report."""
        return ""

    def time_ms(self, inputs: Inputs, *, repeats: int = 50, warmup: int = 10) -> float:
        """Median time of one run on the GPU, without transfers, in milliseconds."""
        bound = self._bind(self._graph.feeds(inputs))
        for _ in range(warmup):
            self._launch()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            begin.record()
            self._launch()
            end.record()
        torch.cuda.synchronize()
        del bound  # the memory that the runs worked on
        return float(statistics.median(begin.elapsed_time(end) for begin, end in events))

    def _bind(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose a profile, and give every input and output its place in the GPU's memory."""
        bound = {name: feeds[name].to("cuda", self._dtype(name)).contiguous() for name in self._inputs}
        self._choose_profile({name: tuple(tensor.shape) for name, tensor in bound.items()})
        for name, tensor in bound.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            bound[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        for name, tensor in bound.items():
            # An empty tensor (a past of length 0) has no address, and TensorRT wants one.
            self._context.set_tensor_address(name, (tensor if tensor.numel() else self._nothing).data_ptr())
        return bound

    def _choose_profile(self, given: Mapping[str, tuple[int, ...]]) -> None:
        for index in range(self._engine.num_optimization_profiles):
            if all(self._fits(name, index, shape) for name, shape in given.items()):
                self._context.set_optimization_profile_async(index, torch.cuda.current_stream().cuda_stream)
                return
        raise EquivalenceError(f"{self.description} has no profile for inputs of the shapes {dict(given)}; build it with one")

    def _fits(self, name: str, index: int, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, index)
        return all(smallest <= length <= largest for smallest, length, largest in zip(low, shape, high, strict=True))

    def _launch(self) -> None:
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EquivalenceError(f"{self.description} failed to run; its own log, on standard error, says why")

    def _dtype(self, name: str) -> torch.dtype:
        kind = str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]
        if kind not in _DTYPES:
            raise EquivalenceError(f"{self.description}: {name} is of the type {kind}, which torch does not have")
        return _DTYPES[kind]


@final
class DecoderEngines(Artifact):
    """Two engines as one function of a whole prompt: prefill takes all tokens but the last, decode takes that.

    Args:
        prefill: Runs the prompt.
        decode: Runs one token with the past that prefill returned. The same engine if it has both profiles.
    """

    def __init__(self, prefill: Artifact, decode: Artifact) -> None:
        self._prefill, self._decode = prefill, decode

    @property
    def description(self) -> str:
        """What it is."""
        return f"{self._prefill.description}, then {self._decode.description}"

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest floating dtype of both."""
        return coarsest([self._prefill.dtype, self._decode.dtype])

    def run(self, inputs: Inputs, observe: Observe | None = None) -> dict[str, Tensor]:
        """Logits of all tokens of ``input_ids`` [batch, tokens], the last ones by way of the cache."""
        del observe
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if ids is None or ids.shape[1] < 2:
            raise EquivalenceError("engines with a cache are compared on input_ids of at least two tokens")
        first = self._prefill.run({"input_ids": ids[:, :-1]})
        past = {name: tensor for name, tensor in first.items() if name.startswith("past_key_values.")}
        rows, length = ids.shape
        last = self._decode.run(
            {
                "input_ids": ids[:, -1:],
                "attention_mask": torch.ones(rows, length, dtype=torch.int64),
                "position_ids": torch.full((rows, 1), length - 1),
                **past,
            }
        )
        return {"logits": torch.cat([first["logits"], last["logits"]], 1)}

    def facts(self, layer: str) -> str:
        """Nothing: what is known of a layer stands in the report."""
        return ""


def verify_engines(program: Program, folder: Path, artifact: TensorrtArtifact) -> tuple[Check, ...]:
    """Check what `lower_tensorrt` wrote.

    Returns:
        The checks ``engines``, ``engine outputs`` and ``sparse kernels``.
    """
    return (_files(folder, artifact), _outputs(program, folder, artifact), _sparsity(artifact))


def engine_files(folder: Path, artifact: TensorrtArtifact) -> dict[str, EngineFile]:
    """Open each engine on the GPU: profile -> engine.

    Raises:
        EquivalenceError: If there is no GPU, or an engine cannot be loaded.
    """
    name = "tensorrt" if artifact.runtime == "torch-tensorrt" else artifact.runtime
    installed = find(name)
    module = installed.module if installed is not None else "tensorrt"
    opened: dict[str, EngineFile] = {}
    for engine in artifact.engines:
        file = EngineFile(folder / engine.file, folder / engine.graph, module)
        opened |= dict.fromkeys(engine.profiles, file)
    return opened


def _files(folder: Path, artifact: TensorrtArtifact) -> Check:
    sizes = {
        engine.file: (folder / engine.file).stat().st_size for engine in artifact.engines if (folder / engine.file).is_file()
    }
    wrong = [engine.file for engine in artifact.engines if sizes.get(engine.file) != engine.size_bytes]
    stand = ", ".join(f"{file} {size / 1e6:.1f} MB" for file, size in sizes.items())
    said = f"missing or cut off: {', '.join(wrong)}" if wrong else f"{len(sizes)} whole as the builder made them: {stand}"
    return Check(name="engines", held=bool(sizes) and not wrong, summary=said, details=sizes)


def _outputs(program: Program, folder: Path, artifact: TensorrtArtifact) -> Check:
    def check(held: bool | None, summary: str, details: Mapping[str, Any] | None = None) -> Check:
        return Check(name="engine outputs", held=held, summary=summary, details=details or {})

    if reason := why_not_run(artifact):
        return check(None, f"not run: {reason}")
    if any(engine.name == "encoder" for engine in artifact.engines):
        return check(None, "engines of an encoder and its decoder are not run as one; compare each by itself")
    inputs = {name: program.example_inputs[name] for name in program.input_names}
    try:
        opened = engine_files(folder, artifact)
        candidate: Artifact = opened["model"] if "model" in opened else DecoderEngines(opened["prefill"], opened["decode"])
        found = compare(program, candidate, inputs, layers=False)
    except torch.OutOfMemoryError as error:
        return check(None, f"not run: {artifact.gpus[0].name} has too little free memory ({error})")
    except EquivalenceError as error:  # an engine that does not run is a check that fails, and no reason to lose the engines
        return check(False, f"on {artifact.gpus[0].name}: {error}")
    failed = found.failures()
    said = "; ".join(failed) or f"relative error {found.relative_error:.2g} (allowed {found.tolerance:g})"
    return check(not failed, f"on {artifact.gpus[0].name}: {said}", found.to_dict())


def why_not_run(artifact: TensorrtArtifact) -> str:
    """Why engines cannot be run here; empty if they can."""
    if not artifact.gpus:
        return "no GPU here; the ONNX file that they were built from was run, see above"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA; install a CUDA build of torch to run engines"
    if not all(artifact.gpus[0].sm in engine.targets for engine in artifact.engines):
        return f"built for other GPUs than {artifact.gpus[0].name} (SM{artifact.gpus[0].sm})"
    return ""


def _sparsity(artifact: TensorrtArtifact) -> Check:
    """What is known of sparse kernels. None chosen is no fault of the files, so this holds or stays open."""
    meant = [layer for layer in artifact.layers if layer.conforms != "unknown"]
    number = {known: sum(layer.ran_sparse == known for layer in meant) for known in ("yes", "no", "unknown")}
    told = f"of {len(meant)} uses of sparse weights in all engines, {number['yes']} run sparse, {number['no']} do not"
    reasons = {layer.reason for layer in meant if layer.ran_sparse == "unknown"}
    unknown = f", and {number['unknown']} are unknown ({'; '.join(sorted(reasons))})" if number["unknown"] else ""
    return Check(
        name="sparse kernels", held=True if number["yes"] else None, summary=told + unknown, details=number, decides=False
    )
