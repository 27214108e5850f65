"""Golden fixtures: reference numbers of the official code, found by what their json says, never by
file name.

The folder is `DIM_GOLDEN` (default `../shared/golden` beside the checkout). A test over it is
written

    @pytest.mark.parametrize("case, arrays", golden_cases.params("selective_scan"))
    def test_scan(case, arrays): ...

and becomes one skipped test, with the reason, where the folder or the kind is absent.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("DIM_GOLDEN") or ROOT / ".." / "shared" / "golden").resolve()


class Arrays(Mapping):
    """The arrays of one `.npz` by name, read at the first use; none where there is no file."""

    def __init__(self, path):
        self.path = path

    @functools.cached_property
    def arrays(self):
        if not self.path.exists():  # a case whose json says it all, such as a list of shapes
            return {}
        with np.load(self.path, allow_pickle=False) as npz:
            return dict(npz)

    def __getitem__(self, name):
        return self.arrays[name]

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


@functools.cache
def _all_cases():
    cases = []
    for path in sorted(GOLDEN.glob("*.json")):
        case = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(case, dict) and "kind" in case:
            cases.append((path.stem, case, Arrays(path.with_suffix(".npz"))))
    return cases


def cases(*kinds):
    """Every case of these kinds as (name, json dict, arrays by name); an empty list without the
    folder.
    """
    return [case for case in _all_cases() if case[1]["kind"] in kinds]


def params(*kinds):
    """`cases` as pytest parameters (json dict, arrays), named by case; one skipped parameter if
    there are none.
    """
    found = cases(*kinds)
    if not found:
        reason = f"no golden case of kind {' or '.join(kinds)} in {GOLDEN} (set DIM_GOLDEN)"
        return [pytest.param(None, None, id="absent", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(case, arrays, id=name) for name, case, arrays in found]


@functools.cache
def det_weights():
    """The folder's own `det_weights` module, which makes every weight from its official name; skips
    without it.
    """
    path = GOLDEN / "det_weights.py"
    if not path.exists():
        pytest.skip(f"no det_weights.py in {GOLDEN} (set DIM_GOLDEN)")
    spec = importlib.util.spec_from_file_location("det_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(actual, expected, tol, name="result"):
    """Same shape, and the largest difference at most `tol` of `expected`'s largest value, or of 1
    if that is zero; the message shows the ratio. A NaN fails.
    """
    actual, expected = (torch.as_tensor(x).detach().cpu().double() for x in (actual, expected))
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    error = ((actual - expected).abs().max() / (expected.abs().max().item() or 1.0)).item()
    assert error <= tol, (
        f"{name}: error {error:.3g} of the largest value, {error / tol:.3g} times the tolerance "
        f"{tol:g}"
    )
