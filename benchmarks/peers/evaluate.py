"""The one evaluator: puts each tool's pruned weights into the dense model and measures its perplexity."""

import argparse
import json
from pathlib import Path

import harness
import torch
from safetensors.torch import load_file


@torch.inference_mode()
def perplexity(model: torch.nn.Module, ids_BT: torch.Tensor, batch_size: int = 4) -> float:
    """exp of the mean negative log-likelihood; each window stands alone, its first token is only context."""
    total, count = 0.0, 0
    for batch_BT in ids_BT.split(batch_size):
        logits_BTV = model(input_ids=batch_BT, use_cache=False).logits[:, :-1]
        targets_BT = batch_BT[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")
        total += float(loss)
        count += targets_BT.numel()
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("weights", type=Path, nargs="*", help="safetensors files; none: the dense model")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    ids_BT = load_file(args.tokens)["evaluation"]
    results: dict[str, dict[str, object]] = {}
    for path in args.weights or [None]:
        model = harness.load(args.model)
        pruned, dense = set(harness.linear_weights(model)), dict(model.state_dict())
        others_changed: list[str] = []
        if path is not None:
            state = load_file(path)
            missing = pruned - set(state)
            if missing:
                raise ValueError(f"{path.name} lacks {len(missing)} weights, the first is {min(missing)}")
            others_changed = [
                name for name, tensor in state.items() if name not in pruned and not torch.equal(tensor, dense[name])
            ]
            model.load_state_dict(state, strict=False)
        results[path.stem if path else "dense"] = {
            "perplexity": perplexity(model, ids_BT),
            "others_changed": others_changed,
        }
    args.record.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
