"""What a model takes in each form, counted from the shapes of its tensors, and what files take beside it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from sparsepass.export.plan.model import load_for_plan
from sparsepass.export.report import FileSizeEntry, FormEntry, SizeSection
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.packed_folder import QUANT_METHOD, PackedSettings
from sparsepass.graph.rounding import num_groups
from sparsepass.graph.support import INFINITIES, check_inside, name_matches, path_named, read_object
from sparsepass.passes.maths import NMPattern

Values = Literal["fp32", "bf16", "int8", "int4"]
_BITS: Final[Mapping[Values, int]] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
_SCALE_BYTES: Final = 2
_ENDINGS: Final = (".safetensors", ".gguf", ".onnx", ".data", ".engine", ".plan")
"""Of files with weights."""
_OF_INTEGERS: Final = ("pack-quantized", "int-quantized", "naive-quantized")
"""Formats of compressed-tensors."""
_FLOATS: Final[Mapping[str, Values]] = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class StoredForm:
    """How the weights of a model are stored.

    Attributes:
        values: Of the layers that passes take.
        pattern: N:M of these layers, whose kept values and their places are stored; None if all values are.
        group_size: Input features that share a scale of an integer; 0 for a whole row.
        has_zero_points: Whether each scale has the integer that stands for 0 beside it, of as many bits as the others.
        branch_k: Of SLoRB branches beside layers with a pattern; 0 for none.
        is_trained: Whether their projection is a weight of its own.
        tables: Of the embedding and the output head: ``int8`` with a scale for each word, or as everything else.
    """

    values: Values = "bf16"
    pattern: NMPattern | None = None
    group_size: int = 0
    has_zero_points: bool = False
    branch_k: int = 0
    is_trained: bool = False
    tables: Literal["int8"] | None = None

    @property
    def text(self) -> str:
        """In a few words.

        Example:
            >>> StoredForm(values="int4", pattern=NMPattern(2, 4), branch_k=16, tables="int8").text
            '2:4 int4, SLoRB k=16, embedding int8'
        """
        words = [f"{self.pattern or 'dense'} {self.values}"]
        words += ["zero points"] if self.has_zero_points else []
        words += [f"SLoRB k={self.branch_k}"] if self.branch_k else []
        words += [f"embedding {self.tables}"] if self.tables else []
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """A weight as rows; ``experts`` of them lie in one tensor."""

    name: str
    rows: int
    columns: int
    experts: int
    is_linear: bool


@dataclass(frozen=True, kw_only=True)
class _Tensors:
    """The tensors of a model: layers that passes take, embedding and head, and how many numbers all else has."""

    layers: tuple[_Matrix, ...]
    tables: tuple[_Matrix, ...]
    num_others: int


def sizes(
    model: str | Path,
    files: Sequence[str | Path] = (),
    *,
    pattern: str = "2:4",
    group_size: int = 64,
    slorb_k: int = 0,
    projection: Literal["fixed", "trainable"] = "fixed",
    gguf_file: str | None = None,
) -> SizeSection:
    """Count what a model takes: promised in each form, and measured in files that were made of it.

    Args:
        model: What `load_for_plan` takes; a configuration is enough.
        files: Folders and files with weights of this model, in any form.
        pattern: N:M.
        group_size: Input features that share a scale of an integer: one bfloat16 for each; 0 for one a row.
        slorb_k: Count SLoRB branches of this k, too; 0 for none.
        projection: Of these: fixed takes no room.
        gguf_file: Name of the .gguf file, if the folder holds several.

    Returns:
        The section ``size`` of the report. Units: bytes.

    Raises:
        SparsepassError: If there is no such model, pattern or file.

    Source: storage of N:M by its kept values and their places, methods.md section 4 of the design notes.
    """
    found = NMPattern.parse(pattern)
    if slorb_k < 0 or group_size < 0:
        raise SparsepassError(f"group_size and slorb_k are 0 or more, got {group_size} and {slorb_k}")
    paths = []
    for file in files:
        if (path := path_named(str(file))) is None:
            raise SparsepassError(f"{file} does not exist; name files or folders that hold weights of the model")
        paths.append(path)
    program = load_for_plan(model, gguf_file=gguf_file)
    shapes = _shapes(program, found)
    own = path_named(str(model))
    measured = [_measured(path, shapes) for path in [*([] if own is None else [own]), *paths]]
    dense, sparse = StoredForm(group_size=group_size), StoredForm(pattern=found, group_size=group_size)
    branched = replace(sparse, branch_k=slorb_k, is_trained=projection == "trainable")
    kinds: tuple[Values, ...] = ("bf16", "int8", "int4")
    forms = [replace(dense, values=kind) for kind in ("fp32", *kinds)]
    forms += [replace(form, values=kind) for kind in kinds for form in ((sparse, branched) if slorb_k else (sparse,))]
    forms += [replace(branched, values=kind, tables="int8") for kind in kinds]
    return SizeSection(
        model=str(model),
        pattern=str(found),
        group_size=group_size,
        num_layers=len(shapes.layers),
        num_layer_weights=sum(each.rows * each.columns * each.experts for each in shapes.layers),
        num_parameters=sum(each.rows * each.columns * each.experts for each in (*shapes.layers, *shapes.tables))
        + shapes.num_others,
        forms=[promised(shapes, form) for form in forms],
        files=[each for each in measured if each is not None],
    )


def promised(shapes: _Tensors, form: StoredForm, has_form: Callable[[_Matrix], bool] = lambda layer: True) -> FormEntry:
    """Bytes of a model in a form.

    Args:
        shapes: Its tensors.
        form: The form.
        has_form: Which layers have it; the others are as embedding and head would be. By default all have it.
    """
    rest = 4 if form.values == "fp32" else 2
    kept = indices = scales = branches = tables = 0.0
    others = shapes.num_others * rest
    for layer in shapes.layers:
        number = layer.rows * layer.columns * layer.experts
        if not has_form(layer):
            others += number * rest
            continue
        share = 1.0 if form.pattern is None else form.pattern.n / form.pattern.m
        kept += number * share * _BITS[form.values] / 8
        if form.pattern is not None:
            indices += number * share * math.ceil(math.log2(form.pattern.m)) / 8
        if form.values.startswith("int"):
            each = _SCALE_BYTES + (_BITS[form.values] / 8 if form.has_zero_points else 0)
            scales += layer.rows * layer.experts * num_groups(layer.columns, form.group_size) * each
        if form.branch_k and layer.columns % form.branch_k == 0:
            rank = layer.columns // form.branch_k
            branches += layer.experts * rank * (layer.rows + (layer.columns if form.is_trained else 0)) * rest
    for table in shapes.tables:
        number = table.rows * table.columns
        tables += number + table.rows * _SCALE_BYTES if form.tables == "int8" else number * rest
    return FormEntry(
        form=form.text,
        values_bytes=math.ceil(kept),
        indices_bytes=math.ceil(indices),
        scales_bytes=math.ceil(scales),
        branches_bytes=math.ceil(branches),
        embedding_bytes=math.ceil(tables),
        others_bytes=others,
    )


def _shapes(program: Program, pattern: NMPattern) -> _Tensors:
    layers, tables = [], []
    counted: set[str] = set()
    for site in program.sites():
        if not site.weight or 0 in site.shape:
            continue
        experts = site.shape[0] if site.layout.startswith("experts") else 1
        columns = site.num_weights // experts // site.out_features
        matrix = _Matrix(
            name=site.name, rows=site.out_features, columns=columns, experts=experts, is_linear=site.layout == "linear"
        )
        if site.role in ("embedding", "head"):
            tables.append(matrix)
        elif site.left_alone is None and columns % pattern.m == 0:
            layers.append(matrix)
        else:
            continue
        counted.add(site.weight)
    beside = {name for state in program.sparse.values() for name in state.names}
    others = [t for name, t in program.graph_module.named_parameters() if name not in counted | beside]
    return _Tensors(layers=tuple(layers), tables=tuple(tables), num_others=sum(each.numel() for each in others))


def _measured(path: Path, shapes: _Tensors) -> FileSizeEntry | None:
    """What a file or folder takes, and what its form promises; None for a folder without weights."""
    if path.is_dir():
        check_inside(path)
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("*/adapter_model.safetensors")]
    taken = sum(file.stat().st_size for file in files if file.is_file() and file.name.endswith(_ENDINGS))
    if not taken:
        return None
    known = next(_known_form(path), None)
    expected = None if known is None else promised(shapes, *known)
    return FileSizeEntry(
        source=str(path),
        bytes=taken,
        form=None if expected is None else expected.form,
        promised_bytes=None if expected is None else expected.total_bytes,
    )


def _known_form(path: Path) -> Iterator[tuple[StoredForm, Callable[[_Matrix], bool]]]:
    """The form that a folder's configuration states, and which layers have it."""
    if not (path / "config.json").is_file():
        return
    config = read_object(path / "config.json", allowed=INFINITIES)
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        dtype = config.get("dtype") or config.get("torch_dtype")
        if isinstance(dtype, str) and dtype in _FLOATS:
            yield StoredForm(values=_FLOATS[dtype]), lambda layer: True
    elif stated.get("quant_method") == QUANT_METHOD:
        settings = PackedSettings.from_dict(stated)
        values: Any = settings.values if settings.values.startswith("int") else "bf16"
        branch = next(iter(settings.branches.values()), None)
        yield (
            StoredForm(
                values=values,
                pattern=NMPattern(2, 4),
                group_size=settings.group_size,
                branch_k=0 if branch is None else branch.k,
                is_trained=branch is not None and branch.projection == "trained",
                tables=settings.embedding,
            ),
            lambda layer: layer.name in settings.layers,
        )
    elif stated.get("quant_method") == "compressed-tensors" and stated.get("format") in _OF_INTEGERS:
        groups = stated.get("config_groups")
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        if len(weights) == 1 and isinstance(weights[0], dict) and weights[0].get("num_bits") in (4, 8):
            given, ignored = weights[0], [entry for entry in stated.get("ignore") or () if isinstance(entry, str)]
            yield (
                StoredForm(
                    values=f"int{given['num_bits']}",  # type: ignore[arg-type]
                    group_size=given.get("group_size") or 0,
                    has_zero_points=given.get("symmetric") is False,
                ),
                lambda layer: layer.is_linear and not any(name_matches(entry, [layer.name]) for entry in ignored),
            )
