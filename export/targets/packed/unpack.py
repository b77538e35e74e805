"""From a packed folder to the plain one: dense weights with their zeros, which any program reads.

Files are read and written one after the other, so that no more than one of them lies in memory.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import safetensors.torch
import torch
from torch import Tensor

from sparsepass.export.pattern import safetensors_files
from sparsepass.export.targets.hf import ADAPTER_FOLDER, PEFT_TASKS, adapter_names, auto_class, front_matter, write_branches
from sparsepass.export.targets.packed.stored import PARTS, StoredFolder, stored_folder
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.packed import check, unpack
from sparsepass.graph.packed_folder import find_layer, linear_layers, stored_names
from sparsepass.graph.support import (
    INFINITIES,
    WEIGHTS_INDEX,
    SparsepassError,
    check_tensors,
    counted,
    quiet_loading,
    read_object,
    replaced_folder,
    weights_entry,
)
from sparsepass.passes.maths import fixed_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEFT_OUT: Final = ("config.json", "README.md", "report.json", "report.md", "report.html", WEIGHTS_INDEX)


@final
@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """What `unpack_folder` wrote.

    Attributes:
        folder: Where it stands.
        dtype: Type of its weights.
        num_layers: Layers that were packed.
        num_branches: SLoRB branches in the adapter.
        weights_bytes: Bytes of its weights.
    """

    folder: Path
    dtype: str
    num_layers: int
    num_branches: int
    weights_bytes: int


def unpack_folder(folder: str | Path, out: str | Path, *, force: bool = False) -> Unpacked:
    """Write the plain Hugging Face folder of a packed one.

    Weights have their zeros again; integers are multiplied by their scales and rounded to the type of the model. SLoRB branches
    go to a PEFT adapter, as in the target hf.

    Args:
        folder: A folder of the target packed.
        out: Folder to write.
        force: Whether a folder that stands there is replaced.

    Raises:
        SparsepassError: If the folder is no packed one, or is damaged.

    Example:
        >>> unpack_folder("packed", "plain").dtype  # doctest: +SKIP
        'bfloat16'
    """
    source = Path(folder)
    with stored_folder(source) as stored, replaced_folder(out, force=force, inputs=[source]) as staging:
        document = read_object(source / "config.json", allowed=INFINITIES)
        dtype = parse_dtype(document.get("dtype") or document.get("torch_dtype") or "bfloat16")
        names: dict[str, str] = {}
        total = 0
        for file in safetensors_files(source):
            tensors = _plain_tensors(stored, file, dtype)
            names |= dict.fromkeys(tensors, file.name)
            total += sum(t.nbytes for t in tensors.values())
            safetensors.torch.save_file(tensors, staging / file.name, metadata={"format": "pt"})
        if getattr(weights_entry(source), "suffix", None) == ".json":
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (staging / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        del document["quantization_config"]
        (staging / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _copy_others(source, staging)
        model = _skeleton(staging)
        if stored.settings.branches:
            _write_adapter(stored, model, staging / ADAPTER_FOLDER, dtype)
        card = _card(auto_class(type(model), model.config), staging, bool(stored.settings.branches))
        (staging / "README.md").write_text(card, encoding="utf-8")
    return Unpacked(
        folder=Path(out),
        dtype=str(dtype).removeprefix("torch."),
        num_layers=len(stored.settings.layers),
        num_branches=len(stored.settings.branches),
        weights_bytes=total,
    )


def _plain_tensors(stored: StoredFolder, file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a plain folder holds in the place of one file."""
    settings = stored.settings
    layers, tables = set(settings.layers), set(settings.embeddings)
    tensors: dict[str, Tensor] = {}
    for name in counted(list(check_tensors(file)), f"unpacking {file.name}"):
        layer, _, part = name.rpartition(".")
        if layer in layers and part == "weight":
            packed = stored.packed(layer)
            check(packed, name)
            weight_OI = unpack(packed, torch.float32 if packed.scales is not None else None).to(dtype)
            tensors[name] = weight_OI.t().contiguous() if layer in settings.transposed else weight_OI
        elif layer in tables and part == "weight":
            tensors[name] = (stored.tensor(name).float() * stored.tensor(f"{layer}.scales").float()).to(dtype)
        elif not (layer in layers | tables and part in PARTS):
            tensors[name] = stored.tensor(name)
    return tensors


def _copy_others(source: Path, out: Path) -> None:
    """Copy what comes with the weights: tokenizer, processor, generation settings, samples, recipe."""
    for path in sorted(source.iterdir()):
        if path.name in _LEFT_OUT or path.suffix == ".safetensors" or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copy2(path, out / path.name)


def _skeleton(folder: Path) -> "PreTrainedModel":
    """The model that the folder is for, without values."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise SparsepassError(
            f"config.json names the model class {config.architectures}, which transformers {transformers.__version__} lacks; "
            "upgrade it"
        )
    with quiet_loading(), torch.device("meta"):
        model: PreTrainedModel = kind(config)
    return model


def _write_adapter(stored: StoredFolder, model: "PreTrainedModel", folder: Path, dtype: torch.dtype) -> None:
    by_name = {name: path for path, name in stored_names(model, linear_layers(model)).items()}
    tensors: dict[str, Tensor] = {}
    paths = []
    for name, branch in stored.settings.branches.items():
        path = find_layer(model, by_name, name)
        if path is None:
            raise SparsepassError(f"{name} has a SLoRB branch, and the model has no linear layer of that name; export it again")
        s_OR = stored.tensor(f"{name}.slorb_weight").to(dtype)
        if branch.projection == "trained":
            x_RI = stored.tensor(f"{name}.slorb_projection").to(dtype)
        else:
            x_RI = fixed_projection(s_OR.shape[1] * branch.k, branch.k, dtype=dtype)
        a, b = adapter_names(path)
        tensors[a], tensors[b] = x_RI.contiguous(), s_OR.contiguous()
        paths.append(path)
    write_branches(paths, tensors, model, folder, task=PEFT_TASKS.get(auto_class(type(model), model.config)))


def _card(loads_with: str, folder: Path, has_branches: bool) -> str:
    lines = [
        *front_matter(loads_with, ["2:4"], folder),
        "# A 2:4 sparse model, unpacked",
        "",
        "Written by `sparsepass unpack` from a packed folder: the weights have their zeros again, and plain transformers loads",
        f"them by `{loads_with}.from_pretrained`.",
        "",
    ]
    if has_branches:
        lines += [
            f"The SLoRB branches lie in `{ADAPTER_FOLDER}/`, as a PEFT adapter. Do not merge it: it would fill the zeros.",
            "",
        ]
    return "\n".join(lines)
