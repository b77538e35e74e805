"""The target `packed`: a Hugging Face folder whose 2:4 layers hold their kept values and the places of these.

1. A packed layer keeps its name: ``.weight`` has the kept values, in a shape that is not the dense one, so that transformers
   without sparsepass stops at it. ``.codes``, ``.scales`` and a SLoRB branch stand beside it.
2. Everything else is stored as the target hf stores it.
3. A weight is packed by itself: no dense copy of the model is made.

Tensor shape legend: O out features, I in features, R sums of k features.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor

from sparsepass.export.targets.evidence import LayerEvidence, counts
from sparsepass.export.targets.hf import auto_class, save_model, settle_config
from sparsepass.export.targets.packed.card import card
from sparsepass.export.targets.packed.own import own_grid, own_table, own_tables, without_others
from sparsepass.export.targets.packed.survey import LayerChoice, groups, matrix_of, survey, tables
from sparsepass.export.targets.packed.times import OneTokenTimes, one_token_times
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.integers import integers_of
from sparsepass.graph.load import check_fits, parse_dtype
from sparsepass.graph.model import skeleton
from sparsepass.graph.packed import FLOATS, PackedWeight, pack, quantize_rows, unpack
from sparsepass.graph.packed_folder import INTEGERS, PackedSettings
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.support import SparsepassError, counted, package_version, quiet_loading
from sparsepass.passes.fuse_siblings import siblings
from sparsepass.passes.maths import canonical_zeros, relative_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENGINE: Final = "model"


@final
@dataclass(frozen=True, kw_only=True)
class PackedArtifact:
    """What `lower_packed` wrote.

    Attributes:
        settings: What config.json says of the packed layers.
        layers: Every linear layer, packed or with the reason why not.
        errors: Module path -> error of the rounded weight, relative to the weight, for what was rounded here: neither
            floating values nor the program's own integers.
        own: Whether integers and scales are the program's own.
        tables: Module path -> name in the files, of embeddings and heads in int8.
        rounded: Quantized weights that are stored as floating-point values.
        auto_class: The Auto class that loads the folder.
        dtype: Type of what is not packed.
        files: Path of each file, relative to the folder -> its size in bytes.
        dense_bytes: What the same weights take in a plain folder of that type.
        times: One token through each shape, packed and dense, on this machine.
    """

    settings: PackedSettings
    layers: tuple[LayerChoice, ...]
    errors: Mapping[str, float]
    auto_class: str
    dtype: str
    files: Mapping[str, int]
    dense_bytes: int
    times: OneTokenTimes
    own: bool = False
    tables: Mapping[str, str] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()

    @property
    def packed(self) -> tuple[LayerChoice, ...]:
        """The layers that are packed."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the files with weights."""
        return sum(size for name, size in self.files.items() if name.endswith(".safetensors"))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know."""
        share = self.weights_bytes / self.dense_bytes
        values = f"{self.settings.values}, the program's own" if self.own else self.settings.values
        said = [
            f"{len(self.packed)} of {len(self.layers)} linear layers are packed as {values}; the weights take "
            f"{share:.2f} of what they take dense in {self.dtype}",
            self.times.note,
            f"`import sparsepass`, then {self.auto_class}.from_pretrained; `sparsepass unpack` writes a plain folder",
        ]
        if self.errors:
            worst = max(self.errors, key=lambda layer: self.errors[layer])
            middle = sorted(self.errors.values())[len(self.errors) // 2]
            said.append(
                f"rounded to {self.settings.values}: relative error of a weight {middle:.2g} in the middle, "
                f"{self.errors[worst]:.2g} at most ({worst})"
            )
        if self.rounded:
            said.append(
                f"{len(self.rounded)} weights that are quantized and not packed ({self.rounded[0]}, say) are floating-point "
                f"values on their grids, rounded to {self.dtype}"
            )
        reasons = Counter(layer.reason for layer in self.layers if layer.reason)
        said += [f"{number} left dense: {reason}" for reason, number in reasons.most_common()]
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON; paths are relative to the folder."""
        return {
            "auto_class": self.auto_class,
            "dtype": self.dtype,
            "values": self.settings.values,
            "own": self.own,
            "group_size": self.settings.group_size,
            "embedding": self.settings.embedding,
            "num_packed": len(self.packed),
            "dense": {layer.layer: layer.reason for layer in self.layers if layer.reason},
            "relative_errors": dict(self.errors),
            "dense_bytes": self.dense_bytes,
            "weights_bytes": self.weights_bytes,
            "one_token": self.times.to_dict(),
            "files": dict(self.files),
        }

    def section(self) -> dict[str, Any]:
        """The section ``sparsity`` of the report, in the words of the targets tensorrt and torch."""
        layers = tuple(self._evidence(layer) for layer in self.layers)
        return {
            "runtime": "sparsepass",
            "runtime_version": package_version("sparsepass") or "",
            "gpus": [],
            "engines": [
                {
                    "name": _ENGINE,
                    "file": "config.json",
                    "targets": [],
                    "size_bytes": self.weights_bytes,
                    "flag_requested": True,
                    "num_eligible": len(self.packed),
                    "num_chosen": len(self.packed),
                }
            ],
            "layers": [layer.to_dict() for layer in layers],
            "counts": counts(layers),
            "measured": None,
        }

    def _evidence(self, layer: LayerChoice) -> LayerEvidence:
        is_packed = not layer.reason
        error = self.errors.get(layer.layer)
        said = f"packed as {self.settings.values}" + ("" if error is None else f", relative error {error:.2g}")
        return LayerEvidence(
            engine=_ENGINE,
            layer=layer.layer,
            op="Linear",
            weight=layer.weight,
            shape=layer.shape,
            dtype=self.settings.values if is_packed else self.dtype,
            axis=1 if is_packed else None,
            conforms="yes" if is_packed or layer.pattern == "2:4" else "no" if layer.pattern else "unknown",
            flag_requested="yes",
            eligible="yes" if is_packed else "no",
            chosen="yes" if is_packed else "no",
            ran_sparse="yes" if is_packed else "no",
            reason=layer.reason or said,
        )


def lower_packed(
    program: Program,
    folder: Path,
    *,
    values: str | None = None,
    group_size: int = 64,
    embedding: str | None = None,
    dtype: "torch.dtype | str | None" = None,
) -> PackedArtifact:
    """Write a program as a packed folder.

    Args:
        program: Captured from a transformers model. It is not changed.
        folder: An existing, empty folder.
        values: What a kept value is stored as; by default the integers of a program that is quantized, and else bf16.
        group_size: Input features that share a scale, for integers; 0 for one scale a row.
        embedding: ``int8`` to keep embedding and head in it; those that the program rounds to it are kept in it anyway.
        dtype: Type of what is not packed. By default 16 bits: float16 for fp16, the program's own for integers, else bfloat16.

    Returns:
        What was written.

    Raises:
        SparsepassError: If the program was not captured from a class of transformers, has no weights, no layer of it can be
            packed, or its layers have integers that packed layers do not take.

    Exactness: floating values are the program's, rounded to their type; integers and scales are the program's own, bit for bit,
        or, where it is not quantized, its weights rounded to the nearest multiple of their scale.
    """
    if program.origin.model_class is None or program.origin.config is None:
        raise SparsepassError(
            "the target packed writes a folder for a class of transformers, and this program was captured from a plain "
            "nn.Module (or from code outside transformers); use the target onnx, or keep it as a program (program.save)"
        )
    if any(t.is_meta for t in program.tensors().values()):
        raise SparsepassError("the program has no weights yet, so there is nothing to pack; fill it first")
    program = split_siblings(program)
    model: PreTrainedModel = skeleton(program)  # type: ignore[assignment]
    layers = survey(program, model)
    grid = own_grid(program, layers, values, group_size)
    if grid is not None:
        values, group_size, layers = f"int{grid.bits}", grid.group_size, without_others(program, layers, grid)
    values = values or "bf16"
    packed = {layer.weight: layer for layer in layers if not layer.reason}
    if not packed:
        reasons = Counter(layer.reason for layer in layers).most_common(3)
        why = "; ".join(f"{number} layers: {reason}" for reason, number in reasons) or "it has no linear layer"
        raise SparsepassError(
            f"no layer of this program can be packed ({why}); prune it first: sparsepass prune --passes nm_sparsify"
        )
    _check_branches(program, layers)
    embeddings: dict[str, str] = {}
    if embedding or any(site.role in ("embedding", "head") and site.weight in program.quantized for site in program.sites()):
        embeddings = tables(program, model, (layer.layer for layer in packed.values()), is_asked=embedding is not None)
    if not embedding:
        embeddings = own_tables(program, embeddings)
        embedding = "int8" if embeddings else None
    settings = PackedSettings(
        embedding=embedding,  # type: ignore[arg-type]
        embeddings=tuple(embeddings.values()),
        values=values,  # type: ignore[arg-type]
        group_size=group_size if values in INTEGERS else 0,
        groups=groups(layers, siblings(program, as_modules=True)),
        branches={layer.name: layer.branch for layer in packed.values() if layer.branch is not None},
        transposed=tuple(layer.name for layer in packed.values() if layer.transposed),
    )
    kind = _dtype(program, values) if dtype is None else parse_dtype(dtype)
    for narrow in {kind, FLOATS.get(values, kind)}:
        check_fits(program.tensors(), narrow)
    with quiet_loading():
        settle_config(model, kind)
        state, errors = _tensors(program, model, packed, settings, kind)
        for path in embeddings:
            state |= _table(program, model, path, errors)
        model.config.quantization_config = settings.to_dict()
        save_model(model, folder, state)
    loads_with = auto_class(type(model), model.config)
    of_each_shape = {layer.shape: layer for layer in packed.values()}
    artifact = PackedArtifact(
        settings=settings,
        layers=layers,
        errors=errors,
        auto_class=loads_with,
        dtype=str(kind).removeprefix("torch."),
        files={},
        dense_bytes=_dense_bytes(program, model, kind),
        times=one_token_times([packed_weight(program, layer, settings) for layer in of_each_shape.values()], kind),
        own=grid is not None,
        tables=embeddings,
        rounded=_left_rounded(program, (*packed, *(f"{path}.weight" for path in embeddings))),
    )
    (folder / "README.md").write_text(card(program, artifact.settings, layers, folder, loads_with, errors), encoding="utf-8")
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return replace(artifact, files=files)


def _left_rounded(program: Program, held: Iterable[str]) -> tuple[str, ...]:
    """The quantized weights of layers that are not held as integers."""
    names = {program.aliases.get(name, name) for name in held}
    return tuple(site.weight for site in program.sites() if site.weight in program.quantized and site.weight not in names)


def _check_branches(program: Program, layers: Iterable[LayerChoice]) -> None:
    """A branch beside a dense layer has no place in the folder, and must not be lost."""
    reasons = {layer.weight: layer.reason for layer in layers}
    for weight, state in program.sparse.items():
        if state.branch is not None and (reason := reasons.get(weight, "it is no linear layer")):
            raise SparsepassError(
                f"{weight.removesuffix('.weight')} has a SLoRB branch and cannot be packed ({reason}); apply slorb with this "
                "layer among ignore, or use the target hf"
            )


def _dtype(program: Program, values: str) -> torch.dtype:
    """Type of what is not packed, if none is asked for."""
    own = next((t.dtype for t in program.tensors().values() if t.is_floating_point()), torch.float32)
    if values == "fp16" or (values in INTEGERS and own == torch.float16):
        return torch.float16
    return torch.bfloat16


def _tensors(
    program: Program, model: "PreTrainedModel", packed: Mapping[str, LayerChoice], settings: PackedSettings, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of the folder by their names in the model, and the errors of what was rounded to integers."""
    state: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    shared: dict[str, Tensor] = {}
    names = list(model.state_dict())
    for name in counted(names, "packing"):
        layer = packed.get(name)
        if layer is not None:
            state |= _packed_tensors(program, layer, settings, errors)
            continue
        canonical = program.aliases.get(name, name)
        if canonical not in shared:
            value = masked_weight(program, canonical)
            value = value.to(dtype) if value.is_floating_point() else value
            sparse = program.sparse.get(canonical)
            shared[canonical] = canonical_zeros(value) if sparse is not None else value
        state[name] = shared[canonical]
    return state, errors


def _packed_tensors(
    program: Program, layer: LayerChoice, settings: PackedSettings, errors: dict[str, float]
) -> dict[str, Tensor]:
    found = packed_weight(program, layer, settings)
    if settings.values in INTEGERS and layer.weight not in program.quantized:
        weight_OI = matrix_of(program, layer).float()
        errors[layer.layer] = relative_error([(weight_OI - unpack(found), weight_OI)], ())
    parts: dict[str, Tensor | None] = {"weight": found.kept, "codes": found.codes, "scales": found.scales}
    state = program.sparse.get(layer.weight)
    if state is not None and state.branch is not None:
        small = torch.float16 if settings.values == "fp16" else torch.bfloat16
        parts["slorb_weight"] = masked_weight(program, state.branch.weight).to(small)
        if state.branch.projection is not None:
            parts["slorb_projection"] = program.tensor(state.branch.projection).detach().to(small)
    return {f"{layer.layer}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def _table(program: Program, model: "PreTrainedModel", path: str, errors: dict[str, float]) -> dict[str, Tensor]:
    """An embedding or head in int8, under all names that it has in the model."""
    name = program.aliases.get(f"{path}.weight", f"{path}.weight")
    own = own_table(program, path)
    if own is None:
        weight_VD = masked_weight(program, name)
        numbers_VD, scales_V1 = quantize_rows(weight_VD)
        found_VD = numbers_VD.float() * scales_V1.float()
        errors[path] = relative_error([(weight_VD.float() - found_VD, weight_VD.float())], ())
    else:
        numbers_VD, scales_V1 = own
    users = [each for each in model.state_dict() if program.aliases.get(each, each) == name]
    return dict.fromkeys(users, numbers_VD) | {f"{path}.scales": scales_V1}


def packed_weight(program: Program, layer: LayerChoice, settings: PackedSettings) -> PackedWeight:
    """The weight of a layer as it is stored."""
    own = integers_of(program, layer.weight)
    try:
        if own is not None:
            return pack(own.weight_OI, values=settings.values, group_size=settings.group_size, scales=own.scales_OG)
        return pack(matrix_of(program, layer), values=settings.values, group_size=settings.group_size)
    except SparsepassError as error:
        raise SparsepassError(f"{layer.layer}: {error}") from error


def _dense_bytes(program: Program, model: "PreTrainedModel", dtype: torch.dtype) -> int:
    """Bytes of a plain folder with the same weights."""
    names = {program.aliases.get(name, name) for name in model.state_dict()}
    tensors = [program.tensor(name) for name in names]
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors)
