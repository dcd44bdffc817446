"""Initialisers: bounds and deviations of the papers, names, and errors that say what is expected."""

import json
import math

import pytest

from fastdl import initializers
from fastdl.kernels import dispatch

NAMES = [
    "constant",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "normal",
    "ones",
    "truncated_normal",
    "uniform",
    "zeros",
]


@pytest.mark.parametrize(
    ("name", "op", "params"),
    [
        ("glorot_uniform", "uniform", {"low": -math.sqrt(6 / 40), "high": math.sqrt(6 / 40)}),
        ("glorot_normal", "normal", {"mean": 0.0, "std": math.sqrt(2 / 40)}),
        ("he_uniform", "uniform", {"low": -math.sqrt(6 / 30), "high": math.sqrt(6 / 30)}),
        ("he_normal", "normal", {"mean": 0.0, "std": math.sqrt(2 / 30)}),
        ("truncated_normal", "truncated_normal", {"mean": 0.0, "std": 0.05}),
    ],
)
def test_formulas(name, op, params):
    found, values, constant = initializers.get(name).call((30, 10))
    assert (found, constant) == (op, None)
    assert values == pytest.approx(params)
    assert set(values) <= {p.name for p in dispatch.registry.spec(op).params}


def test_constants_need_no_op():
    assert initializers.get("zeros").call((3,)) == (None, {}, 0.0)
    assert initializers.get("ones").call((3,)) == (None, {}, 1.0)
    assert initializers.get(0.25).call((3,)) == (None, {}, 0.25)


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_go_through_json(name):
    initializer = initializers.get(name)
    assert initializer.name == name
    assert initializers.get(initializer) is initializer
    assert initializers.from_config(json.loads(json.dumps(initializer.to_config()))) == initializer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: initializers.get("xavier"), f"unknown initializer 'xavier', known: {', '.join(NAMES)}"),
        (lambda: initializers.get("he_normal").call((5,)), r"expected a shape \(fan_in, fan_out\).*found \(5,\)"),
        (lambda: initializers.get("he_normal").call((0, 5)), r"found \(0, 5\)"),
        (lambda: initializers.Normal(std=-1), r"Normal\(std=...\): expected a deviation >= 0, found -1"),
        (lambda: initializers.Constant("a"), r"Constant\(value=...\): expected a finite number, found 'a'"),
        (lambda: initializers.Uniform(1, 0), r"expected low <= high, found low=1.0, high=0.0"),
        (lambda: initializers.from_config({"name": "normal", "sd": 1}), r"found \['sd'\]"),
    ],
)
def test_bad_values_say_what_is_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
