"""A model's files lie in its folder; those of the hub's cache are links into its blobs."""

import json
import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tests.export.tiny import save_tiny_llama

from sparsepass.graph import SparsepassError
from sparsepass.graph.equivalence import OnnxFile
from sparsepass.graph.load import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


def test_a_folder_like_the_hubs_cache_is_loaded(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = (tmp_path / "models--a--b" / name for name in ("snapshots/0123abc", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        os.replace(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_model(snapshot).tokenizer is not None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "LICENSE"])
def test_a_file_that_lies_elsewhere_is_not_read(name: str, model: Path, tmp_path: Path) -> None:
    if (model / name).exists():
        os.replace(model / name, tmp_path / name)
    else:
        (tmp_path / name).write_text("secret")
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(SparsepassError, match=f"{name} leads to .* out of the folder"):
        load_model(model)


def test_a_pipe_does_not_hang(model: Path) -> None:
    os.mkfifo(model / "special_tokens_map.json")
    with pytest.raises(SparsepassError, match=r"special_tokens_map\.json is a pipe or a device"):
        load_model(model)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd"])
def test_an_index_names_files_of_the_folder_only(name: str, model: Path, tmp_path: Path) -> None:
    os.replace(model / "model.safetensors", tmp_path / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SparsepassError, match="outside the model's folder"):
        load_model(model)


@pytest.mark.parametrize("where", ["initializer", "attribute", "function"])
def test_weights_of_a_graph_lie_beside_it(where: str, tmp_path: Path) -> None:
    tensor = TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    nodes = [helper.make_node("Identity", ["x"], ["y"]), *([constant] if where == "attribute" else [])]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])])
    graph.initializer.extend([tensor] if where == "initializer" else [])
    proto = helper.make_model(graph)
    if where == "function":
        proto.functions.append(helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 18)]))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.onnx").write_bytes(proto.SerializeToString())
    assert onnx.load(tmp_path / "sub" / "model.onnx", load_external_data=False).graph.node
    with pytest.raises(SparsepassError, match=r"names '\.\./secret\.bin', which lies outside"):
        OnnxFile(tmp_path / "sub" / "model.onnx")
