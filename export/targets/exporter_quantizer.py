"""Passes inside transformers' own exporters: an `ExportQuantizer` that runs a pipeline on the graph they capture.

transformers exports a model in two steps: torch.export captures it, a backend (ONNX, OpenVINO, ExecuTorch) takes the
captured graph. Between the two stands the quantizer hook. So whoever exports through transformers gets N:M weights by one
argument, in every one of its formats.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sparsepass.graph.capture import program_from_graph_module
from sparsepass.graph.nodes import writes_into
from sparsepass.graph.program import Program
from sparsepass.graph.records import Report
from sparsepass.graph.rewrite import finish, fold_grid
from sparsepass.graph.support import SparsepassError
from sparsepass.passes import Fold, Pass, apply_passes, parse_pipeline
from sparsepass.passes.engine import ComputeDtype

_BATCH = 8  # calibration sequences run at once, where the graph leaves the choice

if TYPE_CHECKING:
    from transformers.exporters.configs import ExportFormat
    from transformers.exporters.quantizers.base import ExportQuantizer

    _HAS_HOOK = True
else:
    try:  # transformers has exporters since 5.17 at least, and this hook since 5.20
        from transformers.exporters.configs import ExportFormat
        from transformers.exporters.quantizers.base import ExportQuantizer

        _HAS_HOOK = True
    except ImportError:
        ExportQuantizer, _HAS_HOOK = object, False


@final
class SparsePassQuantizer(ExportQuantizer):
    """Run sparsepass pipelines inside an export of transformers, in any of its formats.

    The pipeline runs on the captured graph; masks are folded into the weights before the backend sees it, so that the
    exported file holds plain operations only. SLoRB branches stay as operations of the graph. The model is not changed.

    A generative model is exported as several graphs (prefill and decode). Each runs the pipeline by itself. A criterion
    that looks at the weights alone gives both the same masks; one that is calibrated sees other inputs in each, so that
    their weights differ: apply the passes first and export `Program.to_model()` where one set of weights matters.

    Args:
        passes: What `apply_passes` takes.
        calibration_dataset: Input dicts of the exported model (for `export_for_generation`: of `generate`), for criteria
            that need calibration. Unlike transformers' own quantizers, nothing is calibrated on the sample inputs.
        num_sequences: Calibration sequences to use at most.
        compute: Precision of calibration's matmuls; see `apply_passes`.
        validate: Whether to measure how far the outputs moved. Not measured is a graph that writes into its inputs (a
            static cache), and one that is calibrated with a batch size of more than 2 built in.
        progress: Whether to show progress; by default where standard error is a terminal.

    Attributes:
        reports: One report for each graph exported so far.

    Raises:
        SparsepassError: If transformers is too old (before 5.20), or a pass or option is unknown.

    Example:
        >>> quantizer = SparsePassQuantizer("nm_sparsify{pattern=2:4},slorb{k=16}")
        >>> # OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, quantizer=quantizer))
        >>> quantizer.quantizes_fx_graph
        True
    """

    quantizes_fx_graph = True
    supported_formats = tuple(ExportFormat) if _HAS_HOOK else ()
    required_packages = ("torch",)

    def __init__(
        self,
        passes: str | Pass | Iterable[str | Pass],
        *,
        calibration_dataset: Iterable[dict[str, Any]] | None = None,
        num_sequences: int | None = 128,
        compute: ComputeDtype = "auto",
        validate: bool = True,
        progress: bool | None = None,
    ) -> None:
        if not _HAS_HOOK:
            from transformers import __version__

            raise SparsepassError(
                "passes inside transformers' exporters need transformers 5.20 or newer (its ExportQuantizer), and this is "
                f"{__version__}; upgrade it, or apply the passes first and export program.to_model()"
            )
        super().__init__(calibration_dataset)
        self.passes = parse_pipeline(passes)
        self.reports: list[Report] = []
        self._num_sequences, self._compute = num_sequences, compute
        self._validate, self._progress = validate, progress

    def quantize(self, model: fx.GraphModule, sample_inputs: dict[str, Any], export_format: "ExportFormat") -> fx.GraphModule:
        """Run the pipeline on a captured graph. Called by the exporter.

        Args:
            model: The captured graph, with the calling convention of the model. It is not changed.
            sample_inputs: The arguments that it was captured with.
            export_format: The backend that comes next; all are treated alike.

        Returns:
            The rewritten graph, called as the captured one was.

        Raises:
            SparsepassError: If a pass cannot run on this graph, or needs calibration data and there is none.
        """
        del export_format
        has_calibration = self.calibration_dataset is not None
        asking = [p for p in self.passes if p.resolve(has_calibration=has_calibration).needs != "nothing"]
        if asking and not has_calibration:
            raise SparsepassError(
                f"{asking[0].name} needs calibration data as it is configured; give SparsePassQuantizer a "
                "calibration_dataset (a list of input dicts), or choose criterion=magnitude and init=mean"
            )
        convention = _Convention(model)
        program = program_from_graph_module(model, convention.flatten(sample_inputs))
        calibration = None
        if self.calibration_dataset is not None:
            calibration = [convention.flatten(sample) for sample in self.calibration_dataset]
        validate = self._validate
        if _writes_into_inputs(program):
            if asking:
                raise SparsepassError(
                    f"the captured graph writes into its inputs (a static cache), so {asking[0].name} cannot be calibrated "
                    "on it; export with a dynamic cache, or apply the passes first and export program.to_model()"
                )
            validate = False  # each run starts from what the last one left, so outputs before and after do not compare
        batch_size = _fixed_batch(program)
        if calibration is not None and batch_size is not None and batch_size > 2:
            validate = False  # it takes the first two calibration sequences, and this graph takes its own number only
        for site in program.sites():
            if site.weight and site.left_alone is None:  # the program reads the caller's tensors, and passes write
                program.set_tensor(site.weight, program.tensor(site.weight).detach().clone())
        apply_passes(
            program,
            self.passes,
            calibration=calibration,
            num_sequences=self._num_sequences,
            batch_size=batch_size or _BATCH,
            compute=self._compute,
            inplace=True,
            validate=validate,
            progress=self._progress,
        )
        if any(state.mask is not None for state in program.sparse.values()):
            apply_passes(program, [Fold()], inplace=True, validate=validate, progress=False)
        for weight in list(program.quantized):
            fold_grid(program, weight)
        finish(program)
        self.reports.append(program.report())
        return convention.restore(program)


def _fixed_batch(program: Program) -> int | None:
    """The batch size that is built into the graph; None if it may vary."""
    for name, example in program.example_inputs.items():
        if example.dim() and 0 not in program.dynamic_axes[name]:
            return example.shape[0]
    return None


def _writes_into_inputs(program: Program) -> bool:
    return any(_is_input(value) for node in program.graph_module.graph.nodes for value in writes_into(node))


def _is_input(value: object) -> bool:
    """Whether a value is an input of the graph, or a view of one."""
    while isinstance(value, fx.Node) and isinstance(value.target, torch._ops.OpOverload):
        returns = value.target._schema.returns
        if not returns or returns[0].alias_info is None:
            return False
        value = value.args[0]
    return isinstance(value, fx.Node) and value.op == "placeholder"


class _Convention:
    """How a captured graph is called: nested arguments by keyword, flattened into its placeholders."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._codegen = module.graph._codegen
        in_spec = self._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
        self._keywords: list[str] = list(in_spec.child(1).context)
        self._placeholders = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]

    def flatten(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Placeholder name -> its tensor. Arguments that were not captured are left out, as transformers does."""
        if missing := [name for name in self._keywords if name not in inputs]:
            raise SparsepassError(
                f"a calibration sample lacks the inputs {missing} of the exported model: expected {self._keywords}, got "
                f"{sorted(inputs)}"
            )
        leaves = [leaf for name in self._keywords for leaf in pytree.tree_leaves(inputs[name])]
        if len(leaves) != len(self._placeholders):
            raise SparsepassError(
                f"a calibration sample holds {len(leaves)} tensors where the exported model takes "
                f"{len(self._placeholders)} ({', '.join(self._placeholders)}); give it the structure of the sample inputs"
            )
        # Copies, because a graph may write into its inputs (a static cache). Constants have placeholders that nobody reads.
        return {
            name: leaf.detach().clone() if isinstance(leaf, Tensor) else torch.zeros(())
            for name, leaf in zip(self._placeholders, leaves, strict=True)
        }

    def restore(self, program: Program) -> fx.GraphModule:
        """The program's graph under the calling convention of the captured one."""
        program.graph_module.graph.set_codegen(self._codegen)
        return fx.GraphModule(program.graph_module, program.graph_module.graph)
