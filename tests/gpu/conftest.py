"""Kernels, run on the CPU and compiled by NVRTC: a C++ compiler is needed, and that they are named: tests/gpu."""

import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # random_models.py and its like


def pytest_ignore_collect(collection_path, config):
    invocation = config.invocation_params
    named = [invocation.dir, *(invocation.dir / str(argument).split("::")[0] for argument in invocation.args)]
    return None if any(path.resolve().is_relative_to(HERE) for path in named) else True


def pytest_collection_modifyitems(items):
    if shutil.which("g++") is None and shutil.which("c++") is None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a C++ compiler"))
