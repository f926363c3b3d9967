"""These tests need torch and transformers (the extra `hf`) and run only when named: pytest tests/hf."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # double.py, make_vectors.py, random_models.py


def pytest_ignore_collect(collection_path, config):
    invocation = config.invocation_params
    named = [invocation.dir, *(invocation.dir / str(argument).split("::")[0] for argument in invocation.args)]
    return None if any(path.resolve().is_relative_to(HERE) for path in named) else True
