"""The onnx target: a program as ONNX files that say 2:4 where a runtime looks for it.

1. Encoders, vision models and plain modules become one graph, the program's own with its masks folded.
2. Decoder-only language models become one graph with a key-value cache, for prefill and decode alike.
3. Encoder-decoders become two graphs: the encoder (with the keys and values of the cross attention) and the decoder.
4. What has no such cache, or does not lower with it, becomes one plain graph, and the record says why.
5. Quantized weights become the program's own integers; see `integers.py`.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sparsepass.export.targets.onnx.artifact import DECODER_FILE, ENCODER_FILE, MODEL_FILE, Kind, OnnxArtifact, StoredWeight
from sparsepass.export.targets.onnx.capture import (
    PREFIX,
    Axes,
    CacheUnsupportedError,
    Piece,
    decoder_piece,
    encoder_decoder_pieces,
    plain_piece,
    to_ir,
)
from sparsepass.export.targets.onnx.forms import Form
from sparsepass.export.targets.onnx.graph import describe, stored_weights, tidy
from sparsepass.export.targets.onnx.guards import add_guards
from sparsepass.export.targets.onnx.integers import told_of_integers, write_integers
from sparsepass.export.targets.onnx.options import Integers, check_dtype, check_options, integers_wanted, wants_past
from sparsepass.export.targets.onnx.ties import without_ties
from sparsepass.graph import capture
from sparsepass.graph.fused_model import fuse_layers, only_whole_modules
from sparsepass.graph.limits import position_limit, unusual
from sparsepass.graph.load import check_fits, parse_dtype
from sparsepass.graph.program import Program
from sparsepass.graph.rewrite import detach_branch, finish, fold_grid, fold_mask, shared_copy
from sparsepass.graph.support import SparsepassError, quiet_export
from sparsepass.passes.maths import canonical_zeros

EXTERNAL_DATA_BYTES = 100_000_000
"""Above this, weights go into a file of their own, which runtimes map instead of parsing it."""

_FILES = {"model": MODEL_FILE, "encoder": ENCODER_FILE, "decoder": DECODER_FILE}
_TOKENS = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}


def lower_onnx(
    program: Program,
    folder: str | Path,
    *,
    dtype: "str | torch.dtype | None" = None,
    opset: int | None = None,
    task: str | None = None,
    with_past: bool | None = None,
    form: Form = "qdq",
    fold_slorb: bool = False,
) -> OnnxArtifact:
    """Write a program as ONNX.

    A plain graph is ``model.onnx`` with the program's inputs and outputs. A language model's takes ``input_ids`` [batch,
    sequence], ``attention_mask`` [batch, total_sequence], ``position_ids`` [batch, sequence] where the model has any, and
    ``past_key_values.{i}.key`` and ``.value`` [batch, heads, past_sequence, head size], and returns ``logits`` and
    ``present.{i}.key`` and ``.value``; a past of length 0 is the prefill. An encoder-decoder's are ``encoder_model.onnx``,
    which returns ``present.{i}.encoder.key`` and ``.value``, and ``decoder_model.onnx``, which takes those as
    ``past_key_values.{i}.encoder.*`` beside its own ``past_key_values.{i}.decoder.*``. More than 100 MB of weights go into
    ``model.onnx.data`` beside the graph.

    Args:
        program: The program; it is not changed.
        folder: An existing folder, to write into.
        dtype: Type of the weights and of the arithmetic: float32, float16 or bfloat16. By default the program's.
        opset: Operator set, 18 to 23. By default 20, or 21 where quantized weights need it.
        task: What the graph is for, in the words of transformers' pipelines. It decides between a plain graph and one with
            a cache only; the program was captured as it is.
        with_past: Whether a generative model gets a cache. By default it does if it can; True makes it an error if not.
        form: How quantized weights are written. ``qdq``: their integers, and a DequantizeLinear in front of what reads them.
            ``matmulnbits``: onnxruntime's MatMulNBits in place of the product, and qdq for what is none. ``dense``: as
            floating-point values on their grids.
        fold_slorb: Whether SLoRB branches go into the zero points of MatMulNBits, without an operator of their own.

    Returns:
        What was written, with the initializers of every weight. It is not verified yet: see `verify_onnx`.

    Raises:
        SparsepassError: If an option is not supported, or the program cannot be lowered; the message says where.

    Exactness: weights are bitwise the program's (with masks folded) in its own dtype, and integers are the program's own;
    outputs agree to rounding. Zero points that hold a branch are rounded to the dtype.

    Example:
        >>> import tempfile
        >>> from sparsepass.export.targets.onnx import verify_onnx
        >>> program = capture(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(2, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact = lower_onnx(program, folder)
        ...     verified = verify_onnx(program, folder, artifact)
        >>> artifact.weights["0.weight"][0].axis, verified["holds"]
        (1, True)
    """
    out = Path(folder)
    if not out.is_dir():
        raise SparsepassError(f"{out} is no folder; create it first, lower_onnx writes into an existing one")
    check_options(dtype, opset, task, form, fold_slorb)
    past = wants_past(program, task, with_past)
    wanted = parse_dtype(dtype) if dtype is not None else _dtype_of(program)
    check_dtype(wanted)
    if any(t.is_meta for t in program.tensors().values()):
        raise SparsepassError("the program was captured without weights; fill it from its checkpoint before exporting it")
    if program.device.type != "cpu":
        program = copy.deepcopy(program).cpu()  # the graph holds the device that it was captured on
    if program.origin.model_class is not None:
        program = only_whole_modules(program)
    source, request = program, integers_wanted(program, form, opset, fold_slorb, wanted)
    if fold_slorb:
        program = _without_branches(program)
    with quiet_export("torch.onnx", "transformers", "onnxscript", "onnx_ir"):
        program, told = without_ties(program)
        kind, pieces, notes = _pieces(program, wanted, past)
        notes = (*told, *notes)
        try:
            return _write(program, source, out, kind, pieces, request, wanted, notes)
        except SparsepassError as error:
            if kind == "forward" or past is True:
                raise
            notes = (*notes, f"one plain graph without a cache was written, because {error}")
            return _write(program, source, out, "forward", (_plain(program, wanted),), request, wanted, notes)


def _dtype_of(program: Program) -> torch.dtype:
    return next((t.dtype for t in program.tensors().values() if t.is_floating_point()), torch.float32)


def _pieces(program: Program, wanted: torch.dtype, past: bool | None) -> tuple[Kind, tuple[Piece, ...], tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if past is not False:
        try:
            return _generative(program, wanted)
        except CacheUnsupportedError as error:
            if past:
                said = f"a graph with a cache cannot be written: {error}; leave with_past out for a plain one"
                raise SparsepassError(said) from error
            notes = (f"one plain graph without a cache was written: {error}",)
    return "forward", (_plain(program, wanted),), notes


def _generative(program: Program, wanted: torch.dtype) -> tuple[Kind, tuple[Piece, ...], tuple[str, ...]]:
    origin = program.origin
    if origin.model_class is None:
        raise CacheUnsupportedError("the model's class is not known to transformers, so it cannot be run with a cache")
    config = origin.config or {}
    if told := unusual(program.limits, position_limit(config)):
        raise CacheUnsupportedError(
            f"the model asks how long its input is ({_in_short(told)}), so one with a cache would hold for some lengths only"
        )
    inputs = {name: tensor.clone() for name, tensor in program.example_inputs.items()}
    if config.get("is_encoder_decoder"):
        if "decoder_input_ids" not in inputs:
            raise CacheUnsupportedError("the program was captured without decoder_input_ids")
        return "encoder-decoder-with-past", encoder_decoder_pieces(_fused(program, wanted), _cast(inputs, wanted)), ()
    if other := sorted(set(inputs) - _TOKENS):
        raise CacheUnsupportedError(f"the program also takes {', '.join(other)}, and only text models get a cache so far")
    if "input_ids" not in inputs:
        raise CacheUnsupportedError("the program was captured without input_ids")
    piece = decoder_piece(_fused(program, wanted), inputs["input_ids"])
    window = config.get("sliding_window")
    said = f"sliding window of {window}: the whole past is taken and returned, and the attention mask applies the window"
    return "decoder-with-past", (piece,), (said,) if window and config.get("use_sliding_window", True) else ()


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def converted(program: Program, wanted: torch.dtype) -> nn.Module:
    """The model's own class, folded, in the wanted dtype; rotary frequencies and the like stay as they are."""
    model = program.to_model()
    if wanted == _dtype_of(program):
        return model
    kept = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if wanted == torch.float16:
        kept += list(getattr(model, "_keep_in_fp32_modules", None) or ())
    stay = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in kept)) if kept else None
    persistent = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name not in persistent or (stay and stay.search(name)):
            continue
        check_fits({name: tensor}, wanted)
        tensor.data = canonical_zeros(tensor.detach().to(wanted))  # what underflows may become -0.0
    return model


def _fused(program: Program, wanted: torch.dtype) -> nn.Module:
    """`converted`, with the layers fused that are in the program."""
    model = converted(program, wanted)
    fuse_layers(model, only_whole_modules(program).fused)
    return model


def plain_program(program: Program, wanted: torch.dtype) -> Program:
    """A program without masks (folded into the weights) and in the wanted dtype; the given one stays as it is.

    Raises:
        SparsepassError: If it cannot be converted.
    """
    own = _dtype_of(program)
    if wanted != own:
        if program.origin.model_class is None:
            raise SparsepassError(
                f"the program is {own} and comes from a module that cannot be built again, so it cannot be exported as "
                f"{wanted}; convert the module before capturing it (module.to({wanted}))"
            )
        inputs = _cast(program.example_inputs, wanted)
        program = capture(_fused(program, wanted), inputs, dynamic_axes=program.dynamic_axes, inplace=True)
    return _folded(program)


def _plain(program: Program, wanted: torch.dtype) -> Piece:
    folded = plain_program(program, wanted)
    inputs = {name: folded.example_inputs[name] for name in folded.input_names}
    axes = {name: _axes(folded, name, tensor) for name, tensor in inputs.items()}
    return plain_piece(folded.graph_module, inputs, axes, folded.output_names)


def _folded(program: Program) -> Program:
    """A program with folded masks and grids that shares every other tensor with the given one, which stays as it is."""
    shared = shared_copy(program)
    for weight in program.quantized:
        fold_grid(shared, weight)
    for weight, state in program.sparse.items():
        if state.mask is not None:
            fold_mask(shared, weight)
    finish(shared)
    return shared


def _without_branches(program: Program) -> Program:
    """A program without SLoRB branches that shares all tensors with the given one, which stays as it is."""
    shared = shared_copy(program)
    for weight, state in program.sparse.items():
        if state.branch is not None:
            detach_branch(shared, weight)
    finish(shared)
    return shared


def _axes(program: Program, name: str, tensor: Tensor) -> Axes:
    """Names for the axes of an input of a plain graph."""
    two_sided = "decoder_input_ids" in program.input_names
    length = "sequence"
    if two_sided:
        length = "decoder_sequence" if name.startswith("decoder_") else "encoder_sequence"
    by_rank: dict[int, tuple[str, ...]] = {1: ("batch",), 2: ("batch", length), 3: ("batch", length, "features")}
    names = by_rank.get(tensor.dim(), ("batch", "channels", "height", "width"))
    dynamic = program.dynamic_axes.get(name, ())
    if tensor.dim() == 4:
        dynamic = tuple(axis for axis in dynamic if axis < 2 or _can_vary(program, name, axis))
    return tuple(
        (names[axis] if axis < len(names) else f"{name}_axis_{axis}") if axis in dynamic else None
        for axis in range(tensor.dim())
    )


def _can_vary(program: Program, name: str, axis: int) -> bool:
    """Whether images of another size run: position embeddings fix the size without a word in the graph's inputs."""
    inputs = {other: program.example_inputs[other][:2] for other in program.input_names}
    inputs[name] = torch.cat([inputs[name]] * 2, axis)
    try:
        with torch.no_grad():
            program.run(inputs)
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def _write(
    program: Program,
    source: Program,
    out: Path,
    kind: Kind,
    pieces: tuple[Piece, ...],
    request: Integers,
    dtype: torch.dtype,
    notes: tuple[str, ...],
) -> OnnxArtifact:
    names = set(program.tensors())
    graphs = []
    weights: dict[str, tuple[StoredWeight, ...]] = {}
    expected: dict[str, dict[str, str]] = {}
    models: dict[str, ir.Model] = {}

    def weight_name(name: str) -> str | None:
        own = program.aliases.get(name.removeprefix(PREFIX), name.removeprefix(PREFIX))
        return own if name.startswith(PREFIX) and own in names else None

    for piece in pieces:
        file = _FILES[piece.role]
        model = to_ir(piece, request.opset)
        views = tidy(model, weight_names=weight_name, axis_names=piece.axes)
        _stamp(model, program)
        if kind == "forward":
            notes = (*notes, *_guarded(model, program))
        expected[file] = {}
        found = list(stored_weights(model, views, file))
        for name, stored in write_integers(model, found, source, request):
            weights[name] = (*weights.get(name, ()), stored)
            if name in program.sparse and stored.axis is not None:
                expected[file][stored.initializer] = program.sparse[name].pattern
        graphs.append(describe(model, file, piece.role))
        models[file] = model
    lost = [name for name in program.sparse if not any(s.initializer in expected[s.file] for s in weights.get(name, ()))]
    if read := [name for name in lost if _changes_outputs(program, name)]:
        raise SparsepassError(
            f"{', '.join(read)}: no MatMul, Gemm or Conv of the exported graph reads this sparse weight; export with "
            "with_past=False, or report this model"
        )
    if lost:
        notes = (*notes, f"not in the graph, because no output depends on their values: {', '.join(lost)}")
    for file, model in models.items():
        _save(model, out / file)
    notes = (*notes, *told_of_integers(weights, program.quantized))
    twice = [name for name, found in weights.items() if len({s.file for s in found}) > 1]
    if twice:
        notes = (*notes, f"in both files, because both graphs read it: {', '.join(twice)}")
    written = {
        path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.name.split(".onnx")[0] + ".onnx" in models
    }
    return OnnxArtifact(
        kind=kind,
        dtype=str(dtype).removeprefix("torch."),
        opset=request.opset,
        files=written,
        graphs=tuple(graphs),
        weights=weights,
        expected_sparse=expected,
        notes=notes,
    )


def _guarded(model: ir.Model, program: Program) -> tuple[str, ...]:
    """Make a plain graph refuse the sizes that its program refuses; returns what to tell of them."""
    unwatched = add_guards(model, unusual(program.limits, None))
    told = unusual(program.limits, position_limit(program.origin.config))
    refused, wrong = [each for each in told if each not in unwatched], [each for each in told if each in unwatched]
    notes = (
        (refused, "it fails at other sizes, and the error names the condition"),
        (wrong, "it gives wrong results at other sizes, without a word"),
    )
    return tuple(
        f"the graph holds only for inputs with {_in_short(some)} (sizes, by axis); {then}" for some, then in notes if some
    )


def _in_short(limits: Sequence[str]) -> str:
    """The shortest of several limits: a loop that was traced leaves dozens."""
    shown = sorted(limits, key=len)[:4]
    return ", ".join(shown) + (f" and {len(limits) - len(shown)} more conditions" if len(limits) > len(shown) else "")


def _changes_outputs(program: Program, weight: str) -> bool:
    """Whether an output of the program depends on the values of a weight."""
    given = tuple(program.example_inputs[name] for name in program.input_names)
    other = {weight: 1 - program.tensor(weight)}
    results = []
    for replaced in ({}, other):
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(0)
            results.append(torch.func.functional_call(program.graph_module, replaced, given))
    return any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))


def _stamp(model: ir.Model, program: Program) -> None:
    model.producer_name, model.producer_version = "sparsepass", metadata.version("sparsepass")
    limits = " and ".join(unusual(program.limits, None))
    facts: Mapping[str, Any] = {"recipe": program.recipe, "model_class": program.origin.model_class, "limits": limits}
    model.metadata_props.update({f"sparsepass.{key}": str(value) for key, value in facts.items() if value})


def _save(model: ir.Model, path: Path) -> None:
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    external = f"{path.name}.data" if sum(tensor.nbytes for tensor in tensors) > EXTERNAL_DATA_BYTES else None
    ir.save(model, path, external_data=external)
