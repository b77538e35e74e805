"""Every test runs offline, quietly, and from the same seeds; warnings are errors but for those named here."""

import gc
import os

# Before anything imports transformers or datasets: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Warnings of others' code that ours cannot prevent. Each line: which, from where, why.
_NOT_OURS = (
    # onnxruntime, onnxscript and lm-eval touch SWIG or protobuf types that name no module (swig 4, Python 3.12).
    "ignore:builtin type (SwigPyPacked|SwigPyObject|swigvarlink) has no __module__ attribute:DeprecationWarning",
    # peft 0.21 asks transformers 5.23 for a name that it renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # torch 2.13's inductor imports a module of torch's own that still uses torch.jit.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    # The thread of the backward pass meets the GPU for the first time there, which torch mends and tells.
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning",
    # inductor's worker pool forks a process that has threads; torch does it on purpose (Python 3.12 and later warn).
    "ignore:This process .* is multi-threaded, use of fork\\(\\) may lead to deadlocks:DeprecationWarning",
)


# How long one example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    for line in _NOT_OURS:
        config.addinivalue_line("filterwarnings", line)


_SLOW = Path(__file__).with_name("slow.txt")
_SLOW_SECONDS = 1.0
_found_slow: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-slow", action="store_true", help=f"write {_SLOW.name}; run all tests with it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out: each line of the list is a test, or a module whose fixtures take long."""
    slow = set(_SLOW.read_text(encoding="utf-8").split("\n"))
    for item in items:
        if item.nodeid in slow or item.nodeid.split("::")[0] in slow:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Spare the modules, hundreds of thousands of objects, each later search for garbage."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.duration > _SLOW_SECONDS and report.when != "teardown":
        _found_slow.add(report.nodeid if report.when == "call" else report.nodeid.split("::")[0])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record-slow") and not hasattr(session.config, "workerinput"):
        _SLOW.write_text("".join(f"{line}\n" for line in sorted(_found_slow)), encoding="utf-8")


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


collect_ignore = ["second_device.py", "on_second_device.py"]
"""Doctests are looked for by importing, and these tell torch of a device for the whole process."""
