"""Packed folders in transformers: loaded, run, saved again, refused where they are damaged; and without this package."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tests.export.targets.packed.packing import NO_KERNELS, sparse, write
from tests.export.tiny import save_tiny_llama
from tests.families import BY_NAME
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from sparsepass.export import export, load_model
from sparsepass.graph import SparsepassError
from sparsepass.graph.native import TORCH, best_path
from sparsepass.graph.packed import DenseLinear, PackedLinear
from sparsepass.graph.packed_folder import PackedSettings, num_parameters

pytestmark = pytest.mark.filterwarnings(NO_KERNELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama whose head is tied to its embedding."""
    place: Path = tmp_path_factory.mktemp("packed") / "llama"
    write(sparse("llama"), place)
    return place


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("words")
    export(str(save_tiny_llama(place / "dense")), "packed", place / "packed", passes="nm_sparsify{criterion=magnitude}")
    return place / "packed"


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run some Python in a process of its own, with this package on its path."""
    paths = [path for path in sys.path if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


ORDERS = {
    "sparsepass first": """
import sys, sparsepass
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
""",
    "transformers first": """
import transformers.modeling_utils, sys
assert "transformers.quantizers.auto" in sys.modules
from transformers import AutoModelForCausalLM
import sparsepass
""",
    "transformers half": """
import transformers, sys, sparsepass
assert "transformers.quantizers.auto" not in sys.modules
from transformers import AutoModelForCausalLM
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_this_package_makes_folders_known_in_any_order(order: str, folder: Path) -> None:
    done = run_alone(
        f"{ORDERS[order]}\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "import inspect, transformers.quantizers.auto as table\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, len(inspect.getsource(table)) > 0)\n"
        "print([type(finder).__module__ for finder in sys.meta_path if 'registration' in type(finder).__module__])\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["PackedLinear True", "[]"]


def test_without_this_package_transformers_stops(folder: Path) -> None:
    done = run_alone(f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(folder)!r})")
    assert done.returncode != 0
    assert "mismatch" in done.stderr
    assert "sparsepass" not in done.stderr.split("Traceback")[-1]


def test_the_hook_waits_for_one_module_alone_and_goes() -> None:
    done = run_alone(
        "import sys, sparsepass, importlib.util\n"
        "waiting = [finder for finder in sys.meta_path if 'registration' in type(finder).__module__]\n"
        "assert len(waiting) == 1 and waiting[0].find_spec('json', None) is None\n"
        "import json, email, transformers.utils\n"
        "assert waiting[0] in sys.meta_path\n"
        "import transformers.quantizers.auto as table\n"
        "assert waiting[0] not in sys.meta_path\n"
        "assert type(table.__loader__) is type(table.__spec__.loader) is type(json.__loader__)\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_second_registration_does_nothing() -> None:
    from sparsepass.graph.packed_folder import register_quantizer

    before = AUTO_QUANTIZER_MAPPING["sparsepass"]
    register_quantizer()
    assert AUTO_QUANTIZER_MAPPING["sparsepass"] is before


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_greedy_tokens_are_the_programs(name: str, tmp_path: Path) -> None:
    program = sparse(name)
    write(program, tmp_path)
    dense: Any = program.to_model().to(torch.bfloat16)
    for seed in range(10):
        ids = torch.randint(3, 96, (1, 6), generator=torch.Generator().manual_seed(seed))
        options: dict[str, Any] = {
            "max_new_tokens": 8,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        mine, theirs = (model.generate(ids, **options) for model in (load(tmp_path), dense))
        different = (mine.sequences != theirs.sequences)[0, 6:].nonzero()
        if len(different):  # then the two best logits lie closer than the tolerance
            best = theirs.logits[int(different[0])][0].float().topk(2).values
            assert best[0] - best[1] < 0.05 * theirs.logits[0].float().norm() / 96**0.5


def test_a_loaded_model_is_laid_out_with_its_siblings_and_its_head(folder: Path) -> None:
    model = load(folder)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14
    assert all(module.is_laid_out and module.weight is None and module.codes is None for module in packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    native = best_path("bf16") != TORCH
    assert isinstance(model.lm_head, DenseLinear) == native
    layer = model.model.layers[0]
    assert (layer.mlp.up_proj.siblings is layer.mlp.gate_proj.siblings is not None) == native
    assert not any(parameter.requires_grad for module in packed for parameter in module.parameters())
    assert num_parameters(model) == num_parameters(BY_NAME["llama"].model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_that_of_activations_and_of_what_is_dense(dtype: torch.dtype, folder: Path) -> None:
    model, ids = load(folder, dtype=dtype), torch.arange(3, 11)[None]
    with torch.no_grad():
        found, reference = model(ids).logits, load(folder)(ids).logits
    assert found.dtype == model.dtype == dtype
    assert float((found.float() - reference.float()).norm() / reference.float().norm()) < 2e-2


def test_one_device_may_be_named_and_several_may_not(folder: Path) -> None:
    assert load(folder, device_map="cpu").device.type == "cpu"
    with pytest.raises(SparsepassError, match="a packed model lies on one device"):
        load(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_model_without_its_head_loads_too(folder: Path) -> None:
    base = transformers.AutoModel.from_pretrained(folder)
    assert isinstance(base.layers[1].self_attn.k_proj, PackedLinear)


def test_pipelines_and_a_static_cache_run(with_tokenizer: Path) -> None:
    said = transformers.pipeline("text-generation", model=str(with_tokenizer))("the quick", max_new_tokens=4, do_sample=False)
    assert said[0]["generated_text"].startswith("the quick")
    model, ids = load(with_tokenizer), torch.arange(3, 9)[None]
    dynamic, static = (
        model.generate(ids, max_new_tokens=6, do_sample=False, **kind) for kind in ({}, {"cache_implementation": "static"})
    )
    assert torch.equal(dynamic, static)


@pytest.mark.parametrize("options", [{}, {"values": "int4", "group_size": 16, "embedding": "int8"}, {"values": "fp16"}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "whisper"])
def test_saved_again_the_files_are_the_same_bit_for_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if name == "vit":
        options = {key: value for key, value in options.items() if key != "embedding"}
    artifact = write(sparse(name, "slorb{k=8}"), tmp_path / "one", **options)
    model = getattr(transformers, artifact.auto_class).from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    one, two = (safetensors.torch.load_file(tmp_path / place / "model.safetensors") for place in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one)
    # Keys of transformers 4 stand in what was exported alone.
    first, second = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("one", "two"))
    assert {key: first.get(key) for key in second} == second
    assert first.keys() - second.keys() <= {"rope_theta"}
    again = getattr(transformers, artifact.auto_class).from_pretrained(tmp_path / "two")
    assert repr(again) == repr(model)


def test_training_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    model, ids = load(folder), torch.arange(3, 11)[None]
    with pytest.raises(SparsepassError, match="packed layers are for inference"):
        model.train()(ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="fine-tun"):
        transformers.Trainer(model=model, args=transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(SparsepassError, match="sparsepass unpack"):
        model.dequantize()


def test_a_dense_model_is_not_packed_while_it_is_loaded(tmp_path: Path) -> None:
    from sparsepass.graph.packed_folder.quantizer import PackedConfig

    dense: Any = BY_NAME["llama"].model()
    dense.save_pretrained(tmp_path)
    config = PackedConfig(**PackedSettings(values="bf16").to_dict())
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path, quantization_config=config)


def damaged(folder: Path, out: Path, change: Any) -> Path:
    """A copy of a folder with changed tensors."""
    out.mkdir()
    for path in folder.glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


NAME = "model.layers.1.mlp.up_proj"


def equal_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.codes"][5, 2] = 0b0101_0100


def descending_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.codes"][0, 0] = 0b0001_0100


def fewer_rows(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"][1:].contiguous()


def fewer_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.codes"] = tensors[f"{NAME}.codes"][:, 1:].contiguous()


def no_codes(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}.codes"]


def no_weight(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}.weight"]


def no_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{NAME}.scales"]


def infinite_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.scales"][0, 0] = torch.inf


def other_kind(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].view(torch.int8)


@pytest.mark.parametrize(
    ("values", "change", "said"),
    [
        ("bf16", equal_codes, "do not ascend"),
        ("bf16", descending_codes, "do not ascend"),
        ("bf16", fewer_rows, r"has to be \[64, 16\]"),
        ("bf16", fewer_codes, r"codes .*has to be \[64, 4\]"),
        ("bf16", no_codes, r"codes is missing"),
        ("bf16", no_weight, r"weight is missing"),
        ("int8", no_scales, r"scales is missing"),
        ("int8", infinite_scale, "not finite"),
        ("int4", other_kind, "int8"),
    ],
)
def test_damaged_tensors_are_refused_with_their_name(values: str, change: Any, said: str, tmp_path: Path) -> None:
    write(sparse("llama"), tmp_path / "whole", values=values)
    place = damaged(tmp_path / "whole", tmp_path / "damaged", change)
    with pytest.raises(SparsepassError, match=said) as caught:
        load(place)
    assert NAME in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", 99, "upgrade sparsepass"),
        ("version", None, "expected 1"),
        ("values", "int3", "names the values 'int3'"),
        ("layers", 7, "cannot be read"),
        ("group_size", 24, "group_size"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(key: str, value: Any, said: str, tmp_path: Path) -> None:
    write(sparse("llama"), tmp_path, values="int4")
    document = json.loads((tmp_path / "config.json").read_text())
    document["quantization_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(SparsepassError, match=said):
        load(tmp_path)


def test_settings_come_back_from_their_json() -> None:
    document = PackedSettings(values="int4", group_size=16, groups=(("a", "b"),), transposed=("a",)).to_dict()
    assert PackedSettings.from_dict(copy.deepcopy(document)).to_dict() == document


def test_load_model_takes_a_packed_folder_and_says_so(with_tokenizer: Path) -> None:
    loaded = load_model(with_tokenizer)
    assert "14 layers are packed" in str(loaded.provenance["notes"])
    assert loaded.tokenizer is not None
    assert load_model(with_tokenizer, dtype="float32").model(torch.arange(3, 9)[None]).logits.dtype == torch.float32
