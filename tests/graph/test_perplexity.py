"""Perplexity against a slow reference written from the definition, and lm-eval on a task of the project's own."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsepass.export.stages.harness import lm_eval_tasks
from sparsepass.graph.perplexity import Perplexity, perplexity
from sparsepass.graph.support.errors import SparsepassError

DATA = Path(__file__).parents[1] / "data"


def make_tokenizer(*, with_bos: bool = False) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[UNK]", "[BOS]", "a", "The", "capital", "of", "is"]
    names += sorted({word for row in rows() for word in (row["country"], *row["choices"])})
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    make: Any = PreTrainedTokenizerFast
    found: PreTrainedTokenizerFast = make(
        tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]", eos_token="[UNK]", pad_token="[UNK]"
    )
    return found


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "capitals.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return make_llama()


def make_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        **changes,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(64, (101,), generator=torch.Generator().manual_seed(1))


def reference(
    model: LlamaForCausalLM, ids_T: Tensor, *, context: int, stride: int, bos: int | None = None
) -> tuple[float, int]:
    """Score token after token in float64: each once, in the first window that reaches it."""
    model = make_llama().double()
    room = context - (bos is not None)
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids_T), stride):
        window = ids_T[begin : begin + room].tolist()
        for position in range(len(window)):
            before = ([] if bos is None else [bos]) + window[:position]
            if begin + position < done or not before:
                continue
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([before])).logits[0, -1]
            total -= float(scores.log_softmax(-1)[window[position]])
            count += 1
        done = begin + len(window)
        if done >= len(ids_T):
            break
    return total / count, count


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 4), (10, 7), (64, 64), (2, 1), (2, 2)])
@pytest.mark.parametrize("bos", [False, True])
def test_equals_the_definition(llama: LlamaForCausalLM, ids: Tensor, context: int, stride: int, bos: bool) -> None:
    result = perplexity(llama, ids, context=context, stride=stride, bos=bos)
    step = min(stride, context - bos)
    mean, count = reference(llama, ids, context=context, stride=step, bos=1 if bos else None)
    assert result.num_tokens == count
    assert result.nll_mean == pytest.approx(mean, rel=1e-6)  # the model's own float32 rounding
    assert result.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert (result.context, result.stride, result.bos, result.dtype) == (context, step, bos, "float32")
    exact = perplexity(make_llama().double(), ids, context=context, stride=stride, bos=bos)
    assert exact.nll_mean == pytest.approx(mean, rel=1e-12)


def test_equals_the_loss_of_transformers_on_one_window(llama: LlamaForCausalLM, ids: Tensor) -> None:
    window_BT = ids[None, :48]
    with torch.no_grad():
        loss = float(llama(input_ids=window_BT, labels=window_BT).loss)
    assert perplexity(llama, window_BT, context=48).nll_mean == pytest.approx(loss, rel=1e-6)


@given(
    context=st.integers(2, 40),
    part=st.floats(0.01, 1),
    length=st.integers(2, 101),
    batch_size=st.integers(1, 9),
    bos=st.booleans(),
)
@settings(max_examples=25)
def test_every_token_is_scored_once_whatever_the_batch(
    context: int, part: float, length: int, batch_size: int, bos: bool
) -> None:
    seen: list[int] = []

    def model(*, input_ids: Tensor) -> SimpleNamespace:
        seen.append(input_ids.shape[0])
        # Depends on the token before alone, so that where windows begin does not matter.
        return SimpleNamespace(logits=torch.sin(input_ids[..., None] * torch.arange(1.0, 65.0)))

    model.config = {"bos_token_id": 1, "vocab_size": 64}  # type: ignore[attr-defined]
    ids_T = torch.randint(64, (length,), generator=torch.Generator().manual_seed(2))
    stride = max(1, int(part * (context - 1)))
    result = perplexity(model, ids_T, context=context, stride=stride, bos=bos, batch_size=batch_size)
    assert max(seen) <= batch_size
    if stride < context - bos or length <= context - bos:  # overlapping: nothing but the very first token is left out
        assert result.num_tokens == length - (not bos)
    scores = torch.sin(ids_T[:-1, None] * torch.arange(1.0, 65.0)).log_softmax(-1)
    all_nll = -scores.gather(1, ids_T[1:, None])
    if not bos and stride < context:
        assert result.nll_mean == pytest.approx(float(all_nll.mean()), rel=1e-5)


def test_batch_size_does_not_change_it(llama: LlamaForCausalLM, ids: Tensor) -> None:
    values = [perplexity(llama, ids, context=16, stride=5, batch_size=size).nll_mean for size in (1, 3, 64)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_smaller_stride_sees_more() -> None:
    result = perplexity(make_llama(), torch.arange(40) % 8, context=10, stride=2, max_tokens=20)
    assert result.num_tokens == 19


def test_model_is_left_as_found(ids: Tensor) -> None:
    model = make_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    first, second = (perplexity(model, ids, context=32) for _ in range(2))
    assert first.nll_mean == second.nll_mean  # no dropout while it is measured
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(SparsepassError):
        perplexity(Broken(model), ids, context=32)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


class Broken(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        output = self.model(input_ids=input_ids)
        output.logits = output.logits * float("nan")
        return output


def test_text_path_and_ids_agree(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text = "The capital of France is Paris " * 6
    path = tmp_path / "text.txt"
    path.write_text(text)
    ids_T = torch.tensor(tokenizer(text)["input_ids"])
    values = {perplexity(llama, source, tokenizer, context=16).value for source in (text, path, ids_T, ids_T[None])}
    assert len(values) == 1
    with pytest.raises(SparsepassError, match="is the name of a file"):
        perplexity(llama, str(path), tokenizer, context=16)


def test_bos_follows_the_tokenizer(llama: LlamaForCausalLM) -> None:
    text = "The capital of France is Paris " * 6
    assert not perplexity(llama, text, make_tokenizer(), context=16).bos
    follows = perplexity(llama, text, make_tokenizer(with_bos=True), context=16)
    assert follows.bos
    assert follows.num_tokens == 36
    assert follows.nll_mean == perplexity(llama, text, make_tokenizer(), context=16, bos=True).nll_mean
    assert not perplexity(llama, text, make_tokenizer(with_bos=True), context=16, bos=False).bos


def test_bfloat16(ids: Tensor) -> None:
    exact = perplexity(make_llama(), ids, context=32)
    by_autocast = perplexity(make_llama(), ids, context=32, dtype="bf16")
    by_weights = perplexity(make_llama().bfloat16(), ids, context=32)
    assert (by_autocast.dtype, by_weights.dtype) == ("bfloat16 autocast", "bfloat16")
    for result in (by_autocast, by_weights):
        assert result.nll_mean != exact.nll_mean
        assert result.nll_mean == pytest.approx(exact.nll_mean, rel=0.05)  # bfloat16 has 8 bits
    with pytest.raises(SparsepassError, match=r"load the model with dtype=float32"):
        perplexity(make_llama().bfloat16(), ids, context=32, dtype=torch.float32)


def test_progress_and_text_form(llama: LlamaForCausalLM, ids: Tensor) -> None:
    steps: list[tuple[int, int]] = []
    result = perplexity(
        llama, ids, context=16, batch_size=4, max_tokens=90, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(4, 6), (5, 6), (6, 6)]
    assert str(result).startswith(f"perplexity {result.value:.4f} (84 tokens scored, context 16, stride 16, no BOS, float32, ")
    assert isinstance(result, Perplexity)


def test_a_program_gives_the_figure_of_its_model(llama: LlamaForCausalLM, ids: Tensor) -> None:
    capture = pytest.importorskip("sparsepass.graph").capture
    program = capture(llama, {"input_ids": ids[:32].reshape(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long)})
    assert perplexity(program, ids, context=20).nll_mean == perplexity(llama, ids, context=20).nll_mean
    with pytest.raises(SparsepassError, match="64 positions"):
        perplexity(program, ids, context=65)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("BertForMaskedLM", SMALL, "changing the last token changed the scores before it"),
        ("BertLMHeadModel", SMALL, "changing the last token changed the scores before it"),
        ("BertModel", SMALL, "expected logits of shape"),
        ("BertForSequenceClassification", SMALL, r"came logits of shape \[1, 2\]"),
        (
            "T5ForConditionalGeneration",
            {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 64},
            "is an encoder-decoder",
        ),
        ("ViTForImageClassification", SMALL | {"image_size": 8, "patch_size": 4}, "takes no input_ids"),
    ],
)
def test_only_causal_models(name: str, changes: dict[str, Any], message: str, ids: Tensor) -> None:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(
        model_class.config_class(**{k: v for k, v in changes.items() if "ViT" not in name or k != "vocab_size"})
    )
    with pytest.raises(SparsepassError, match=message):
        perplexity(model, ids, context=16)


def test_gpt2_positions(ids: Tensor) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=24, vocab_size=64)
    model = transformers.GPT2LMHeadModel(config)
    assert perplexity(model, ids, context=24).num_tokens > 0
    with pytest.raises(SparsepassError, match="context of 25 tokens is more than the model's 24 positions"):
        perplexity(model, ids, context=25)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("", {}, "text is empty"),
        (" \n", {}, "text is empty"),
        ("The", {}, "has 1 tokens; at least 2 are needed"),
        (torch.tensor([], dtype=torch.long), {}, "has 0 tokens"),
        (Path("missing.txt"), {}, "missing.txt does not exist"),
        ("The capital", {"tokenizer": None}, "needs a tokenizer"),
        (torch.rand(4), {}, "have to be integers"),
        (torch.ones(2, 4, dtype=torch.long), {}, r"shape \[tokens\] or \[1, tokens\]"),
        (torch.tensor([1, 64]), {}, "from 1 to 64 are outside the model's vocabulary of 64"),
        (torch.tensor([-1, 3]), {}, "outside"),
        ("The capital", {"context": 1}, "context has to be at least 2"),
        ("The capital", {"context": 65}, "64 positions"),
        ("The capital", {"stride": 17}, "between 1 and the context of 16"),
        ("The capital", {"stride": 0}, "between 1"),
        ("The capital", {"batch_size": 0}, "batch_size has to be at least 1"),
        ("The capital", {"max_tokens": 0}, "max_tokens has to be at least 1"),
        ("The capital", {"dtype": "int8"}, "dtype int8 is not understood"),
    ],
)
def test_bad_input(llama: LlamaForCausalLM, text: Any, changes: dict[str, Any], message: str) -> None:
    given_settings: dict[str, Any] = {"tokenizer": make_tokenizer(), "context": 16} | changes
    with pytest.raises(SparsepassError, match=message):
        perplexity(llama, text, **given_settings)


def test_bos_without_a_bos_token(llama: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(SparsepassError, match="no BOS token"):
        perplexity(llama, "The capital", tokenizer, context=16, bos=True)


def test_infinite_weights(ids: Tensor) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(SparsepassError, match="not finite"):
        perplexity(model, ids, context=16)


# lm-eval


@pytest.fixture
def task_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(DATA)
    return DATA


def test_lm_eval_task_of_our_own(llama: LlamaForCausalLM, task_folder: Path) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    llama.train()
    found = lm_eval_tasks(llama, tokenizer, ["sparsepass_capitals"], include_path=task_folder, batch_size=4)
    assert llama.training
    llama.train(False)
    assert torch.equal(torch.get_rng_state(), before)
    right = 0
    for row in rows():
        prompt = tokenizer(f"The capital of {row['country']} is", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = llama(input_ids=prompt).logits[0, -1]
        choices = [float(scores[tokenizer.convert_tokens_to_ids(choice)]) for choice in row["choices"]]
        right += choices.index(max(choices)) == row["answer"]
    assert found["results"]["sparsepass_capitals"]["acc,none"] == pytest.approx(right / 6)
    assert found["num_samples"]["sparsepass_capitals"] == {"original": 6, "effective": 6}
    json.dumps(found)
    limited = lm_eval_tasks(llama, tokenizer, ["sparsepass_capitals"], include_path=task_folder, limit=2)
    assert limited["num_samples"]["sparsepass_capitals"]["effective"] == 2


def test_lm_eval_mistakes(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, task_folder: Path) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(SparsepassError, match="no task was given"):
        lm_eval_tasks(llama, tokenizer, [])
    with pytest.raises(SparsepassError, match="is not a folder"):
        lm_eval_tasks(llama, tokenizer, ["x"], include_path="missing")
    import lm_eval.tasks

    class OnlyGiven(lm_eval.tasks.TaskManager):  # type: ignore[misc]
        """Leaves lm-eval's own thousands of task files unread."""

        def __init__(self, include_path: Any = None, include_defaults: bool = False) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OnlyGiven)
    with pytest.raises(SparsepassError, match="knows no task nonsense"):
        lm_eval_tasks(llama, tokenizer, ["nonsense"], include_path=task_folder)
    with pytest.raises(SparsepassError, match="tokenizer"):
        lm_eval_tasks(llama, None, ["sparsepass_capitals"])  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SparsepassError, match=r'pip install "sparsepass\[lm-eval\]"'):
        lm_eval_tasks(llama, tokenizer, ["sparsepass_capitals"])
