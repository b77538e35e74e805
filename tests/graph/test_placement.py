"""Computing elsewhere than where the weights are. A second device is played by the processor, in a process of its own."""

import subprocess
import sys

import pytest
import torch

from sparsepass.graph.support import SparsepassError, find_device


def test_another_device_gives_the_same_and_the_weights_come_back() -> None:
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices that are written in Python")
    command = [sys.executable, "-m", "tests.on_second_device", "perplexities", "sensitivities", "passes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_device_that_is_not_there_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    for name in ("nothing", "meta", *(() if torch.cuda.device_count() else ("cuda", "cuda:7"))):
        with pytest.raises(SparsepassError, match=f"device {name} .*device=cpu"):
            find_device(name)
