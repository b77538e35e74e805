import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.export.tiny import save_tiny_llama

from sparsepass.export.stages import Calibration, export, prepare, write_program
from sparsepass.graph.load.sidecars import card_facts, copy_sidecars, module_folders
from sparsepass.graph.support.errors import SparsepassError

FILES = (
    "LICENSE",
    "NOTICE.txt",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "generation_config.json",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = save_tiny_llama(tmp_path / "model")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../elsewhere"}, {"path": ".hidden"}]
    (place / "modules.json").write_text(json.dumps(modules))
    for name in (
        *FILES[:2],
        *FILES[3:5],
        "2_Dense/pytorch_model.bin",
        "1_Pooling/own_code.py",
        ".hidden/a.json",
        "other/a.json",
    ):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(name)
    return place


def test_what_decides_use_and_licence_is_copied(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "generation_config.json").write_text("own")
    assert copy_sidecars(folder, out) == FILES[:-1]
    assert (out / "generation_config.json").read_text() == "own"
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(FILES)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"path": 3}]', "null"])
def test_modules_that_cannot_be_read_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(SparsepassError, match=r"modules\.json"):
        module_folders(tmp_path)


def test_modules_elsewhere_name_no_folder(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('[{"path": "a/b"}, {"path": ""}, {"path": "1_Pooling"}]')
    assert module_folders(tmp_path) == ("1_Pooling",)


@pytest.mark.parametrize("target", ["hf", "onnx", "packed"])
def test_they_go_from_the_model_through_a_program_into_the_export(target: str, folder: Path, tmp_path: Path) -> None:
    write_program(prepare(folder, passes="nm_sparsify{criterion=magnitude}", calibration=Calibration()), tmp_path / "program")
    export(tmp_path / "program", target, tmp_path / "out", verify=False)
    for place in (tmp_path / "program", tmp_path / "out"):
        assert not [name for name in FILES if not (place / name).is_file()]
    if target == "onnx":
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert (config["model_type"], config["architectures"], config["dtype"]) == ("llama", ["LlamaForCausalLM"], "float32")


CARD = "---\nlicense: other\nlicense_name: own\nbase_model: some/base\ntags:\n- chat\n---\n# A model\n"


def front(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---")[1]))


def test_the_card_keeps_licence_and_base_all_the_way(tmp_path: Path) -> None:
    place = save_tiny_llama(tmp_path / "model")
    (place / "README.md").write_text(CARD)
    write_program(prepare(str(place), passes="nm_sparsify", validate=False), tmp_path / "program")
    export(str(tmp_path / "program"), "hf", tmp_path / "hf", verify=False)
    export(str(tmp_path / "hf"), "packed", tmp_path / "packed", verify=False)
    for made in ("hf", "packed"):
        found = front(tmp_path / made)
        assert (found["license"], found["license_name"], found["base_model"]) == ("other", "own", "some/base")
        assert found["tags"] == ["sparsepass", "sparse", "2:4"]
        assert (tmp_path / made / "SOURCE_README.md").read_text() == CARD


def test_a_model_of_the_hub_is_the_base(tmp_path: Path) -> None:
    place = tmp_path / "models--org--name" / "snapshots" / "0123"
    place.mkdir(parents=True)
    for text, licence in ((CARD, "other"), ("no front", None), (None, None), ("---\n: [\n---\n", None)):
        (place / "README.md").unlink(missing_ok=True)
        if text is not None:
            (place / "README.md").write_text(text)
        out = tmp_path / f"out{licence}{text}"[:30].replace("\n", "")
        out.mkdir()
        copy_sidecars(place, out)
        facts = card_facts(out)
        assert facts["base_model"] == "org/name"
        assert facts.get("license") == licence


def test_the_card_of_a_dense_model_says_so(tmp_path: Path) -> None:
    export(str(save_tiny_llama(tmp_path / "model")), "hf", tmp_path / "hf", passes=(), verify=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "# LlamaForCausalLM, dense" in card
    assert "None of its 16 linear layers is sparse" in card
    assert front(tmp_path / "hf")["tags"] == ["sparsepass"]
