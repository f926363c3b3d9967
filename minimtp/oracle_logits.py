"""How far an engine's numbers may be from the truth, by its precision; a test helper that says where they are further.

Needs NumPy alone. Rounding errors are, to first order, the format's epsilon times what the network makes of them, and
that factor does not depend on the format. So the error of one run, float32 against float64, tells that of the others.
"""

import numpy as np

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
MARGIN = {"float64": 8, "float32": 8, "float16": 3, "bfloat16": 3}  # another order of sums, rounding at other places
TYPICAL = 16  # errors of logits, in epsilons of the row's largest, where none were measured


def allowance(truth_TV, dtype, noise_T=None):
    """The largest difference of each row that precision explains -> [T].

    noise_T: the largest error of a float32 run in each row, where it is known; a row that had luck is taken for a
    middling one of its size. At least one rounding of each number.
    """
    size_T = np.max(np.abs(truth_TV), axis=-1, initial=0, where=np.isfinite(truth_TV)).astype(np.float64)
    roundings_T = np.full(len(size_T), float(TYPICAL))
    if noise_T is not None:
        roundings_T = np.divide(noise_T, EPSILON["float32"] * size_T, out=np.zeros_like(size_T), where=size_T > 0)
        roundings_T = np.maximum(roundings_T, np.median(roundings_T))
    return MARGIN[dtype] * EPSILON[dtype] * size_T * np.maximum(roundings_T, 1)


def differences(found_TV, truth_TV):
    """The largest difference of each row, and where in the row it is -> ([T], [T]). NaN differs by infinity."""
    found_TV, truth_TV = np.asarray(found_TV, np.float64), np.asarray(truth_TV, np.float64)
    with np.errstate(invalid="ignore"):
        off_TV = np.where(found_TV == truth_TV, 0, np.abs(found_TV - truth_TV))  # -inf is -inf
    off_TV[np.isnan(off_TV)] = np.inf
    at_T = off_TV.argmax(-1)
    return off_TV[np.arange(len(off_TV)), at_T], at_T


def assert_logits_close(found_TV, expected_TV, dtype="float32", noise_T=None, rows=5):
    """AssertionError, with a report by position, unless logits [T, V] are what the expected ones explain.

    dtype: what the engine under test computes in ("float64", "float32", "float16", "bfloat16"). noise_T: see allowance.
    """
    found_TV, expected_TV = np.atleast_2d(found_TV), np.atleast_2d(expected_TV)
    assert found_TV.shape == expected_TV.shape, f"logits {found_TV.shape}, expected {expected_TV.shape}"
    allowed_T, (off_T, at_T) = allowance(expected_TV, dtype, noise_T), differences(found_TV, expected_TV)
    bad = np.flatnonzero(~(off_T <= allowed_T))
    if not len(bad):
        return
    lines = [f"logits differ at {len(bad)} of {len(off_T)} positions, first at {bad[0]}, by more than {dtype} explains"]
    lines.append("position  difference  explained  at token       found    expected  argmax (expected)")
    for t in bad[:rows]:
        found, expected, best = found_TV[t, at_T[t]], expected_TV[t, at_T[t]], found_TV[t].argmax()
        lines.append(
            f"{t:8}  {off_T[t]:10.3g}  {allowed_T[t]:9.3g}  {at_T[t]:8}  {found:10.4g}  {expected:10.4g}"
            f"  {best} ({expected_TV[t].argmax()})"
        )
    raise AssertionError("\n".join(lines + ["..."] * (len(bad) > rows)))
