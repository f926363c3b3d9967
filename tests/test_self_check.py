"""`check --self`: it holds here, and says so where it does not."""

import json

import numpy as np
import pytest

from minimtp import backend, self_check
from minimtp.cache import Cache
from minimtp.cli import main


def broken():
    return [check["check"] for check in self_check.self_check() if not check["passed"]]


def test_all_hold(capsys):
    assert main(["check", "--self"]) == 0 and capsys.readouterr().out.endswith("all hold here\n")


def test_a_product_that_depends_on_the_width_is_seen(monkeypatch, capsys):
    monkeypatch.setattr(self_check, "MODELS", self_check.MODELS[:1])
    monkeypatch.setattr(backend, "_product", lambda x_TI, tile_OI: x_TI @ tile_OI.T)
    assert main(["check", "--self", "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert any("width" in check["check"] and not check["passed"] for check in checks)


def test_a_reader_that_scales_otherwise_is_seen(monkeypatch):
    monkeypatch.setattr(self_check, "MODELS", self_check.MODELS[:1])
    monkeypatch.setattr(self_check, "pack", lambda w_OI: Twice(w_OI))
    assert broken() == ["packed weights multiply as dense ones"]


class Twice(np.ndarray):
    """A weight whose dequantized form is another."""

    def __new__(cls, w_OI):
        return np.asarray(w_OI).view(cls)

    def dequantize(self, dtype):
        return np.asarray(self, dtype) * 2


@pytest.mark.parametrize("name", self_check.MODELS)
def test_a_cache_that_only_forgets_tokens_is_seen(monkeypatch, name):
    rollback = Cache.rollback

    def too_little(cache, n):
        rollback(cache, max(0, n - 1))

    monkeypatch.setattr(Cache, "rollback", too_little)
    monkeypatch.setattr(self_check, "MODELS", (name,))
    monkeypatch.setattr(self_check, "_drafts_change_nothing", lambda *arguments: True)
    assert all("no trace" in check for check in broken()) and len(broken()) == 2
