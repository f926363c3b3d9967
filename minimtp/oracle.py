"""For other engines' test suites: checks that name a defect, or say what may be claimed.  Needs nothing but NumPy."""

from .oracle_cache import check_cache
from .oracle_drafter import check_drafter, expectations
from .oracle_logits import assert_logits_close
from .oracle_rules import assert_same_law, check_acceptance

__all__ = [
    "assert_logits_close",
    "assert_same_law",
    "check_acceptance",
    "check_cache",
    "check_drafter",
    "expectations",
]
