"""Running engines on a GPU, so that they can be compared and timed. Nothing here works without one.

Memory is torch's, so a CUDA build of torch is needed. TensorRT is imported in this process: an engine that was built and
inspected is past the steps that crash.
"""

import importlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from sparsepass.graph.equivalence import Artifact, Inputs, Observe, OnnxFile, coarsest, output_name
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
