"""SLoRB branches as a PEFT LoRA adapter: A is the projection X, B is S, scaling is 1.

The format is two small files. They are written here and not by peft, so that peft is not needed for it, and they hold no
option that an older peft does not know.

Tensor shape legend: O out features, I in features, R rank = I / k.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsepass.graph.load import check_fits
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.records import SparseState
from sparsepass.graph.support import SparsepassError, load_tensors, quiet_loading, read_object
from sparsepass.passes.maths import fixed_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FOLDER = "adapter"
_LORA_A, _LORA_B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
_CARD = """\
---
library_name: peft
tags:
- sparsepass
- slorb
---

# SLoRB branches as a LoRA adapter

The branches that stand beside the N:M sparse layers of the model in the folder above, in the form of a LoRA adapter: rank
in/k for each layer, A sums (or projects) k input features, B is trained, scaling 1.

Do **not** merge it (`merge_and_unload`, `fuse_lora`): a merged adapter fills the zeros, and the model is no longer sparse.
"""


def branched(program: Program) -> dict[str, SparseState]:
    """The weights that have a SLoRB branch, with their state."""
    return {weight: state for weight, state in program.sparse.items() if state.branch is not None}


def write_adapter(program: Program, model: "PreTrainedModel", folder: Path, *, base_name: str | None, task: str | None) -> None:
    """Write a program's branches as a LoRA adapter.

    Args:
        program: It has branches.
        model: The model as it is written, without them.
        folder: Created.
        base_name: ``base_model_name_or_path`` of the adapter.
        task: peft's task type.

    Raises:
        SparsepassError: If a branch stands beside a layer that LoRA does not know, or beside layers that one adapter cannot
            hold together.
    """
    paths = [weight.removesuffix(".weight") for weight in branched(program)]
    write_branches(paths, adapter_tensors(program, model.dtype), model, folder, base_name=base_name, task=task)


def write_branches(
    paths: Iterable[str],
    tensors: Mapping[str, Tensor],
    model: "PreTrainedModel",
    folder: Path,
    *,
    base_name: str | None = None,
    task: str | None = None,
) -> None:
    """Write branches as a LoRA adapter.

    Args:
        paths: Module paths of the layers that have one.
        tensors: What peft stores, by the names that `adapter_names` gives.
        model: The model without branches; its values are not read.
        folder: Created.
        base_name: ``base_model_name_or_path`` of the adapter.
        task: peft's task type.

    Raises:
        SparsepassError: See `write_adapter`.
    """
    modules = dict(model.named_modules())
    ranks: dict[str, int] = {}
    transposed: set[bool] = set()
    for path in paths:
        kind = type(modules.get(path)).__name__
        if not isinstance(modules.get(path), nn.Linear) and kind != "Conv1D":
            raise SparsepassError(
                f"{path} has a SLoRB branch, and its layer is a {kind}: a LoRA adapter stands beside nn.Linear and "
                "GPT-2's Conv1D only; apply slorb with this layer among ignore, or use the target onnx"
            )
        transposed.add(kind == "Conv1D")
        ranks[path] = tensors[_LORA_B.format(path)].shape[1]
    if len(transposed) > 1:
        raise SparsepassError(
            "some layers with a SLoRB branch are nn.Linear and some GPT-2's Conv1D, which one LoRA adapter cannot hold "
            "(fan_in_fan_out is one setting); apply slorb to one kind by targets=('Linear',) or targets=('Conv1D',)"
        )
    folder.mkdir()
    document = adapter_config(ranks, modules, base_name=base_name, task=task, fan_in_fan_out=transposed == {True})
    (folder / "adapter_config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


def adapter_names(path: str) -> tuple[str, str]:
    """Names by which peft stores A and B of a layer.

    Example:
        >>> adapter_names("lm_head")[0]
        'base_model.model.lm_head.lora_A.weight'
    """
    return _LORA_A.format(path), _LORA_B.format(path)


def adapter_tensors(program: Program, dtype: torch.dtype) -> dict[str, Tensor]:
    """A program's branches under the names that peft stores them by.

    Shapes: lora_A is X, [R, I]; lora_B is S, [O, R].
    """
    tensors: dict[str, Tensor] = {}
    for weight, state in branched(program).items():
        branch = state.branch
        assert branch is not None
        path = weight.removesuffix(".weight")
        used_OR = masked_weight(program, branch.weight)
        check_fits({branch.weight: used_OR}, dtype)
        s_OR = used_OR.to("cpu", dtype)
        if branch.projection is None:
            x_RI = fixed_projection(s_OR.shape[1] * branch.k, branch.k, dtype=dtype)
        else:
            x_RI = program.tensor(branch.projection).detach().to("cpu", dtype)
        tensors[_LORA_A.format(path)], tensors[_LORA_B.format(path)] = x_RI.contiguous(), s_OR.contiguous()
    return tensors


def adapter_config(
    ranks: Mapping[str, int],
    modules: Mapping[str, nn.Module],
    *,
    base_name: str | None,
    task: str | None,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The configuration of a LoRA with scaling 1 on exactly these layers."""
    common, _ = Counter(ranks.values()).most_common(1)[0]
    # Patterns are regular expressions that may match a longer path's end; anchored and escaped, each means one layer.
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    # A name in a list of targets means every module whose path ends in it.
    ambiguous = [name for name in modules if name not in ranks and any(name.endswith(f".{path}") for path in ranks)]
    targets: list[str] | str = "|".join(map(re.escape, ranks)) if ambiguous else sorted(ranks)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def check_adapter(program: Program, folder: Path, dtype: torch.dtype) -> list[str]:
    """Compare a written adapter with the program's branches, bit by bit after rounding. Returns what is wrong."""
    stored = load_tensors(folder / "adapter_model.safetensors")
    expected = adapter_tensors(program, dtype)
    said = [f"the adapter lacks {name}" for name in expected if name not in stored]
    said += [f"the adapter holds {name}, which the program does not have" for name in stored if name not in expected]
    both = [name for name in expected if name in stored]
    return said + [f"{name} is not the program's" for name in both if not torch.equal(stored[name], expected[name])]


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the branches of an adapter that `write_adapter` wrote: module path -> X and S.

    Shapes: X [R, I], S [O, R].
    """
    tensors = load_tensors(folder / "adapter_model.safetensors")
    before, after = _LORA_A.split("{}")
    paths = [name.removeprefix(before).removesuffix(after) for name in tensors if name.endswith(after)]
    return {path: (tensors[_LORA_A.format(path)], tensors[_LORA_B.format(path)]) for path in paths}


def with_adapter(model: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    """Apply a written adapter to a model, with peft if it is installed. Returns the result, and what applied it."""
    if util.find_spec("peft") is None:
        _hook_adapter(model, folder)
        return model, "the definition of LoRA, because peft is not installed"
    from peft import PeftModel

    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 calls what transformers 5.23 has renamed
        return PeftModel.from_pretrained(model, folder).eval(), f"peft {metadata.version('peft')}"


def _hook_adapter(model: nn.Module, folder: Path) -> None:
    """Apply an adapter by definition: ``y += (alpha / r) B A x``."""
    device = str(next(model.parameters()).device)
    tensors = load_tensors(folder / "adapter_model.safetensors")
    document = read_object(folder / "adapter_config.json")
    for path, module in model.named_modules():
        if _LORA_A.format(path) in tensors:
            anchored = f"^{re.escape(path)}"
            alpha = document["alpha_pattern"].get(anchored, document["lora_alpha"])
            rank = document["rank_pattern"].get(anchored, document["r"])
            a_RI, b_OR = (tensors[name.format(path)].to(device) for name in (_LORA_A, _LORA_B))
            module.register_forward_hook(_lora_hook(a_RI, b_OR, alpha / rank))


def _lora_hook(a_RI: Tensor, b_OR: Tensor, scaling: float) -> Any:
    def add(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        return out + scaling * nn.functional.linear(nn.functional.linear(x, a_RI.to(x.dtype)), b_OR.to(x.dtype))

    return add
