"""Names of layers in files and models: found whatever transformers renames, and with or without the base model's prefix."""

from typing import Any

import transformers
from tests.families import BY_NAME

from sparsepass.graph.packed_folder import find_layer, is_packed, linear_layers, stored_names


def test_renamed_layers_are_found_by_their_stored_names() -> None:
    model: Any = BY_NAME["vit"].model()
    names = stored_names(model, linear_layers(model))
    stored = names["vit.layers.0.attention.q_proj"] if "vit.layers.0.attention.q_proj" in names else next(iter(names.values()))
    by_name = {name: path for path, name in names.items()}
    assert len(by_name) == len(linear_layers(model))
    assert find_layer(model, by_name, stored) == by_name[stored]
    assert find_layer(model, by_name, "nothing.of.this.name") is None


def test_a_base_model_and_one_with_a_head_find_each_others_names() -> None:
    whole: Any = BY_NAME["llama"].model()
    base: transformers.PreTrainedModel = whole.model
    for model, wanted, found in (
        (base, "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        (whole, "layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ):
        by_name = {name: path for path, name in stored_names(model, linear_layers(model)).items()}
        assert find_layer(model, by_name, wanted) == found


def test_a_configuration_is_ours_by_its_method_alone() -> None:
    assert is_packed({"quant_method": "sparsepass"})
    assert not any(map(is_packed, ({}, {"quant_method": "awq"}, None, object())))
