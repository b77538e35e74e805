"""Fused siblings as a Hugging Face folder: the layers are apart again, under their own names."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.families import captured

from sparsepass.export.targets.hf import lower_hf, verify_hf
from sparsepass.passes import apply_passes

pytest.importorskip("peft")
# peft 0.21 asks a model for an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(("name", "slorb"), [("llama", True), ("opt", False), ("mixtral", False), ("vit", False)])
def test_the_folder_is_that_of_the_program_before(name: str, slorb: bool, tmp_path: Path) -> None:
    before = apply_passes(captured(name), f"nm_sparsify{',slorb{k=8}' if slorb else ''}", validate=False)
    after = apply_passes(before, "fuse_siblings", validate=False)
    folders = [tmp_path / "before", tmp_path / "after"]
    for program, folder in zip((before, after), folders, strict=True):
        folder.mkdir()
        artifact = lower_hf(program, folder)
        assert artifact.num_sparse == len(before.sparse)
    found = verify_hf(after, folders[1])
    assert found["holds"], found["failures"]
    for file in ("model.safetensors", *(["adapter/adapter_model.safetensors"] if slorb else [])):
        one, other = (safetensors.torch.load_file(folder / file) for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
