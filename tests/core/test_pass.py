"""A pass says what a call reads, writes and holds, stage by stage."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from bn_ext._C import Pass, backward_chain
from bn_ext.activation import NAMES

ALL = frozenset({"dx", "dweight", "dbias"})
WITH_RESIDUAL = ALL | {"dresidual"}


class Stages(NamedTuple):
    """Tensors, and whether a mask is among them: read to reduce, read to apply, written; tensors held."""

    reduce_reads: tuple[int, bool]
    apply_reads: tuple[int, bool]
    writes: tuple[int, bool]
    holds: int


def stages(call: Pass) -> Stages:
    return Stages(call.reduce_reads, call.apply_reads, call.writes, call.holds)


def layer(direction: str, activation: str, residual: bool) -> Pass:
    return Pass((2, 3, 4), direction=direction, activation=activation, residual=residual)


NO, ONE, TWO, THREE = ((tensors, False) for tensors in range(4))
LAYERS = {
    ("forward", "identity", False): Stages(ONE, ONE, ONE, 1),
    ("forward", "silu", False): Stages(ONE, ONE, ONE, 1),
    ("forward", "identity", True): Stages(ONE, TWO, ONE, 1),
    ("forward", "silu", True): Stages(ONE, TWO, ONE, 1),
    ("forward", "relu", True): Stages(ONE, TWO, (1, True), 1),
    ("forward", "relu", False): Stages(ONE, ONE, ONE, 1),
    ("inference", "identity", False): Stages(NO, ONE, ONE, 1),
    ("inference", "relu", True): Stages(NO, TWO, ONE, 1),
    ("backward", "identity", False): Stages(TWO, TWO, ONE, 2),
    ("backward", "identity", True): Stages(TWO, TWO, ONE, 2),  # dresidual is dy
    ("backward", "relu", False): Stages(TWO, TWO, ONE, 2),
    ("backward", "relu", True): Stages((2, True), (2, True), TWO, 2),
    ("backward", "silu", False): Stages(TWO, TWO, ONE, 2),
    ("backward", "silu", True): Stages(THREE, THREE, TWO, 2),
}


@pytest.mark.parametrize(("direction", "activation", "residual"), LAYERS)
def test_stages_of_layers(direction: str, activation: str, residual: bool) -> None:
    assert stages(layer(direction, activation, residual)) == LAYERS[direction, activation, residual]


# Activation, residual, gradients, training.
PARTIAL = {
    ("identity", False, frozenset({"dx"}), True): Stages(TWO, TWO, ONE, 2),
    ("identity", False, frozenset({"dx"}), False): Stages(NO, ONE, ONE, 1),
    ("identity", False, frozenset({"dbias"}), True): Stages(ONE, NO, NO, 0),
    ("identity", False, frozenset({"dweight"}), True): Stages(TWO, NO, NO, 0),
    ("identity", False, ALL, False): Stages(TWO, ONE, ONE, 1),
    ("relu", True, frozenset({"dresidual"}), True): Stages(NO, (1, True), ONE, 1),
    ("relu", True, frozenset({"dbias"}), True): Stages((1, True), NO, NO, 0),
    ("relu", True, WITH_RESIDUAL, False): Stages((2, True), (1, True), TWO, 1),
    ("relu", False, frozenset({"dx"}), False): Stages(NO, TWO, ONE, 1),
    ("silu", True, frozenset({"dbias"}), True): Stages(THREE, NO, NO, 0),
    ("silu", True, frozenset({"dresidual"}), True): Stages(NO, THREE, ONE, 1),
    ("silu", True, WITH_RESIDUAL, False): Stages(THREE, THREE, TWO, 1),
    ("relu", True, frozenset(), True): Stages(NO, NO, NO, 0),
}


@pytest.mark.parametrize(("activation", "residual", "gradients", "training"), PARTIAL)
def test_stages_of_backwards_that_want_less(
    activation: str, residual: bool, gradients: frozenset[str], training: bool
) -> None:
    call = layer("backward", activation, residual).wanting(set(gradients), training=training)
    assert stages(call) == PARTIAL[activation, residual, gradients, training]


def test_a_backward_reads_a_residual_or_branch_bits() -> None:
    """The residual where the activation is curved, bits where one tells the branch of z and spares a tensor."""
    straight = {"relu", "relu6", "leaky_relu", "hardsigmoid"}
    for name in NAMES:
        curved = name not in straight | {"identity"}
        assert backward_chain(name, residual=True) == (curved, name in straight), name
        assert backward_chain(name, residual=True, frozen=True) == (curved, name in straight), name
        assert backward_chain(name, residual=False) == (False, False), name
        assert backward_chain(name, residual=False, frozen=True) == (False, name in straight), name


def test_a_pass_is_a_value() -> None:
    assert layer("forward", "relu", True) == layer("forward", "relu", True)
    different = [layer(*call) for call in LAYERS]
    assert all(a != b for a, b in itertools.combinations(different[:5], 2))
    backward = layer("backward", "relu", True)
    assert backward.wanting(set(WITH_RESIDUAL)) == backward != backward.wanting(set(ALL))
    assert backward != backward.wanting(set(WITH_RESIDUAL), training=False)
    with pytest.raises(ValueError, match=r"gradient should be one of dbias, dresidual, dweight, dx, got dz"):
        backward.wanting({"dz"})
    with pytest.raises(ValueError, match="only a backward"):
        layer("forward", "relu", True).wanting({"dx"})
