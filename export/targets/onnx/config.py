"""The model's configuration beside ONNX graphs, as optimum and other runtimes read it."""

import json
from pathlib import Path

from sparsepass.graph import Program


def write_config(program: Program, folder: Path, dtype: str) -> None:
    """Write config.json, and generation_config.json where the model generates; nothing for a plain module.

    Args:
        program: Says which model.
        folder: Where to.
        dtype: Type of the written weights.
    """
    origin = program.origin
    if origin.config is None or origin.model_class is None:
        return
    left_out = ("_name_or_path", "quantization_config", "_attn_implementation", "_attn_implementation_internal")
    config = {name: value for name, value in origin.config.items() if name not in left_out}
    config |= {"architectures": [origin.model_class.removeprefix("transformers.")], "dtype": dtype, "torch_dtype": dtype}
    _write(folder / "config.json", config)
    if origin.generation_config is not None:
        _write(folder / "generation_config.json", dict(origin.generation_config))


def _write(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
