"""Products of many bfloat16 rows by compiled kernels: right, whoever shares them, and honest about non-numbers."""

from __future__ import annotations

import pytest
import torch
from builders import assert_close, kernels, threads_set
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modification.executor.products import Products, direct_pays


@pytest.fixture(scope="module")
def native():
    return kernels()


def given_rows(rows, inputs, outputs, bias, seed=0):
    """Rows and a linear layer for them, of order 1."""
    noise = torch.Generator().manual_seed(seed)
    part = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    part.weight.copy_(torch.randn(outputs, inputs, generator=noise) / inputs**0.5)
    if bias:
        part.bias.copy_(torch.randn(outputs, generator=noise))
    return torch.randn(rows, inputs, generator=noise).bfloat16(), part


@settings(max_examples=150)
@given(
    rows=st.integers(1, 70), inputs=st.integers(1, 100) | st.sampled_from([768, 769, 1536, 2000]),
    outputs=st.integers(1, 40), bias=st.booleans(), threads=st.integers(1, 4), seed=st.integers(0, 99),
)
def test_a_product_is_the_exact_one_rounded(native, rows, inputs, outputs, bias, threads, seed):
    """For any sizes, with and without a bias; and the same bits for every number of threads and each row alone."""
    with torch.no_grad():
        x, part = given_rows(rows, inputs, outputs, bias, seed)
        made = Products(native)(x, part)
        exact = nn.functional.linear(x.double(), part.weight.double(), part.bias.double() if bias else None)
        # Half a unit in the last place of bfloat16, and what float32 sums lose.
        assert ((made.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
        with threads_set(threads):
            assert torch.equal(Products(native)(x, part), made)
        assert torch.equal(torch.cat([Products(native)(row[None], part) for row in x]), made)


def test_memory_that_is_used_again_changes_nothing(native):
    """A large product, a small one, the large one again."""
    products, (x, part), (y, other) = Products(native), given_rows(50, 1600, 30, True), given_rows(3, 20, 7, False)
    first, small = products(x, part), products(y, other)
    assert torch.equal(products(x, part), first)
    assert torch.equal(small, Products(native)(y, other))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 70), inputs=st.integers(1, 60) | st.sampled_from([769, 1536, 2000]),
    outputs=st.integers(1, 40), threads=st.integers(1, 4),
)
def test_nothing_is_written_beyond_what_was_asked_for(native, rows, inputs, outputs, threads):
    """Of the room and of the result."""
    with torch.no_grad():
        x, part = given_rows(rows, inputs, outputs, False)
        need = native.mod_product_room(rows, inputs, outputs, threads)
        room, made = torch.full((need + 64,), 7.0), torch.full((rows * outputs + 64,), 7.0, dtype=torch.bfloat16)
        at = [tensor.data_ptr() for tensor in (x, part.weight)], [tensor.data_ptr() for tensor in (made, room)]
        native.mod_product(*at[0], None, *at[1], rows, inputs, outputs, threads)
        assert (room[need:] == 7).all()
        assert (made[rows * outputs :] == 7).all()
        assert torch.equal(made[: rows * outputs].view(rows, outputs), Products(native)(x, part))


@pytest.mark.skipif(not direct_pays(torch.float32), reason="this torch has no product for it")
def test_weights_of_another_type_are_not_read_as_bfloat16(native):
    """As when a float32 model runs under autocast: rows come in bfloat16."""
    x, part = given_rows(20, 50, 13, True)
    wide = nn.Linear(50, 13)
    wide.load_state_dict({name: weight.float() for name, weight in part.state_dict().items()})
    made = Products(native)(x, wide)
    assert made.dtype == torch.bfloat16
    assert_close(made, Products(native)(x, part))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(native, value):
    """In its row, and nowhere else."""
    x, part = given_rows(20, 50, 13, False)
    clean = Products(native)(x, part)
    x[4, 7] = value
    made = Products(native)(x, part)
    assert not made[4].isfinite().any()
    rest = torch.arange(20) != 4
    assert torch.equal(made[rest], clean[rest])


@pytest.mark.skipif(not direct_pays(torch.bfloat16), reason="this processor has bfloat16 products of its own")
def test_without_a_compiler_it_is_the_same_within_rounding(native):
    x, part = given_rows(40, 300, 21, True)
    assert_close(Products(None)(x, part), Products(native)(x, part))
