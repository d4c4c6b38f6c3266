"""The benchmarks time what is right and refuse what is wrong."""

import dataclasses

import pytest
import torch

from benchmarks.contenders import CONTENDERS, Layer
from benchmarks.measure import WrongResultError, check, interleaved_samples
from benchmarks.problem import make_problem
from benchmarks.shapes import LayerShape, parse_shapes

SHAPE = LayerShape(tokens=33, in_features=48, out_features=40, r=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_is_the_layer_it_claims_to_be(name, dtype):
    contender = CONTENDERS[name]
    if contender.unavailable() is not None:
        pytest.skip(contender.unavailable())
    problem = make_problem(SHAPE, dtype, torch.device("cpu"))
    layer = contender.build(problem)
    assert set(check(contender, layer, problem)) == {"y", "dx", *layer.trainable}
    assert contender.update == "none" or set(layer.trainable) == {"dA", "dB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["no update", "no activation", "detached features", "scaled dy"])
def test_a_wrong_contender_is_refused(fault, dtype):
    problem = make_problem(SHAPE, dtype, torch.device("cpu"))
    A, B = (torch.nn.Parameter(t.to(dtype)) for t in problem.adapters["neat"])

    def forward(x):
        features = A @ problem.weight
        features = features if fault == "no activation" else torch.relu(features)
        features = features.detach() if fault == "detached features" else features
        delta = B * 0 @ features if fault == "no update" else B @ features
        y = torch.nn.functional.linear(x, problem.weight + delta, problem.bias)
        return 1.1 * y - 0.1 * y.detach() if fault == "scaled dy" else y

    with pytest.raises(WrongResultError, match="float64"):
        check(CONTENDERS["neat"], Layer(forward, {"dA": A, "dB": B}), problem)


def test_contenders_take_turns_until_their_time_is_spent():
    calls = []

    def sampler(name):
        return lambda: (calls.append(name), 10.0)[1]

    samplers = {name: sampler(name) for name in ("first", "second")}
    samples = interleaved_samples(samplers, {"first": 1, "second": 4}, seconds=0.04, at_most=3)
    assert calls == ["first", "second", "first", "first"]
    assert {name: len(values) for name, values in samples.items()} == {"first": 3, "second": 1}
    assert all(len(values) == 1 for values in interleaved_samples(samplers, dict.fromkeys(samplers, 1), 0.0).values())


def test_shapes_are_read_as_they_are_printed():
    assert parse_shapes(str(SHAPE)) == (SHAPE,)
    assert dataclasses.astuple(SHAPE) == (33, 48, 40, 4)
    for text in ("33x48x40", "33x48x40x0", "axbxcxd", "gpus"):
        with pytest.raises(ValueError, match="TOKENSxINxOUTxR"):
            parse_shapes(text)
