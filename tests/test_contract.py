"""Every registered cell, every form: the contract. Nothing here names a cell.

Fast tests hold every cell to the laws of values, gradients, splits, resets and causality, and one
cell to that of the default chunk and to those of the machinery that all share (heads, dtypes, jax's
transformations). Slow are the default chunk of the others, one cell of each implementation of the
chunked form (`KINDS`) at the laws of the machinery, layouts, variants, the cells of blocks, and the
product of cells, lengths, scenarios and forms. A test covers all forms of a cell, which share
compiled code; compilation is what a test costs.
"""

import contract
import contract_checks as checks
import pytest

GROUPED_BY = "case"  # tests of one case share compiled code, see conftest.py
CELLS = contract.cases(variants=False, blocks=False)
WHOLE = contract.cases(variants=False)  # with the cells of blocks
CASES = contract.cases()
slow = pytest.mark.slow
LENGTH = 29  # three chunks of 8 and a part of one; more than three of every shorter unit


SHORTEST = [min(CELLS, key=lambda case: len(case.fields))]  # the cell that compiles fastest
# The first cell with strengths whose default chunk is not the small one.
CHUNKED = [
    case
    for case in CELLS
    if "rate" in {field.kind for field in case.fields.values()}
    and contract.small(case) != case._replace(cell=case.spec.cell())
][:1]
# Of each implementation of the chunked form the cell with the most inputs.
KINDS = {type(case.cell).chunked: case for case in sorted(WHOLE, key=lambda c: len(c.fields))}
KINDS = list(KINDS.values())


def each(cases, fast=()):
    """One test for each of `fast`, and slow ones for the other cases."""
    every = [*fast, *(case for case in cases if case not in fast)]
    rows = [pytest.param(case, id=case.name, marks=() if case in fast else slow) for case in every]
    return pytest.mark.parametrize("case", rows)


def each_form(cases, forms=contract.forms, **axes):
    """One test for each case and form, times what `axes` list for a case."""
    rows = [(case, form) for case in cases for form in forms(case)]
    for values in axes.values():
        rows = [(*row, value) for row in rows for value in values(row[0])]
    ids = ["-".join([row[0].name, *map(str, row[1:])]) for row in rows]
    return pytest.mark.parametrize(("case", "form", *axes), rows, ids=ids)


def compared(case):
    """The forms that are compared with `scan`, which is compared with float64 on the way."""
    return contract.forms(case)[1:] or ["scan"]


@each(CASES, fast=CELLS)
def test_values_and_gradients(case):
    for form in contract.forms(case):
        for scenario in contract.scenarios(case):
            checks.check_forms(case, form, contract.problem(case, 0, LENGTH, scenario))


@each(KINDS, fast=SHORTEST)
def test_bfloat16_inputs(case):
    for form in contract.forms(case):
        checks.check_bfloat16(case, form)


@each(KINDS, fast=SHORTEST)
def test_one_head(case):
    for form in contract.forms(case):
        checks.check_values(case, form, contract.problem(case, 1, 9, heads=1))


@each(KINDS, fast=CHUNKED)
def test_default_chunk(case):
    """One plain document: no masks and no state.

    With equal keys and a rate of 2, a token multiplies what its key holds by 1 - 2 k.k.

    `scan` rounds that product differently at each token. A chunk form makes one error in k.k, the
    same at all T tokens, and what it holds is off by 2 T times that: the bound follows k.k.
    """
    case = case._replace(cell=case.spec.cell())
    given = contract.problem(case, 1, 197, "equal", state=False, masks=False)
    for form in contract.forms(case):
        checks.check_forms(case, form, given, rounded_products=True, optimised=True)


@each(WHOLE, fast=CELLS)
def test_split_and_decode(case):
    for form in contract.forms(case):
        checks.check_split(case, form, form, 16, (5, 11))
        checks.check_decode(case, form, 16, 11)


@each(WHOLE, fast=CELLS)
def test_resets_and_unwritten_tokens(case):
    for form in contract.forms(case):
        checks.check_resets(case, form)
        checks.check_unwritten(case, form)
        checks.check_removed(case, form)


@each(CASES, fast=CELLS)
def test_causality(case):
    for form in compared(case):
        checks.check_causality(case, form)
        if "gates" in contract.scenarios(case):
            checks.check_causality(case, form, "gates")


@each(KINDS, fast=SHORTEST)
def test_transformations(case):
    for form in contract.forms(case):
        checks.check_transformations(case, form)


@each(KINDS, fast=SHORTEST)
def test_shared_heads(case):
    for form in contract.forms(case):
        checks.check_shared_heads(case, form)


@each(WHOLE)
def test_layout(case):
    checks.check_layout(case)


@each(CASES, fast=CELLS)
def test_slope(case):
    checks.check_slope(case)


def lengths(case):
    """One token, whole chunks of each unit, and what is longer than `LENGTH`."""
    every = {1, *contract.units(case.cell)} if case in WHOLE else set()
    return sorted(every | {n for n in contract.lengths(case.cell) if n > LENGTH})


@slow
@each_form(CASES, compared, length=lengths)
def test_every_length_and_scenario(case, form, length):
    for scenario in contract.scenarios(case):
        checks.check_forms(case, form, contract.problem(case, 3, length, scenario))


@slow
@each_form(WHOLE, compared)
def test_every_scenario_without_masks_and_state(case, form):
    for scenario in contract.scenarios(case):
        given = contract.problem(case, 3, LENGTH, scenario, state=False, masks=False)
        checks.check_forms(case, form, given)


@slow
@each_form(KINDS, compared)
def test_without_masks_or_state(case, form):
    for state in (True, False):
        given = contract.problem(case, 3, LENGTH, state=state, masks=not state)
        checks.check_forms(case, form, given)


@slow
@each_form(WHOLE, second=contract.forms)
def test_every_split(case, form, second):
    """Parts that end in the middle of a chunk and at its end; they come in pairs of the same
    lengths, which share their compilations."""
    case, length = contract.small(case, 4), 3 * 4 + 5
    checks.check_split(case, form, second, length, (1, 4, 7, 10, 13, 16))
    if form == second:
        checks.check_decode(case, form, length, 7)


@slow
@each_form(KINDS, compared)
def test_every_law(case, form):
    checks.check_resets(case, form, checks.as_it_is)
    checks.check_unwritten(case, form, checks.as_it_is)
    checks.check_removed(case, form, checks.as_it_is)
    checks.check_without_jit(case, form)
    checks.check_bfloat16(case, form, narrow_gates=False)
    checks.check_float64(case, form)
    checks.check_shared_heads(case, form, (1,))


@slow
@each(KINDS)
def test_scan_alone(case):
    checks.check_causality(case, "scan")
    checks.check_without_jit(case, "scan")


@slow
@each_form(WHOLE, compared)
def test_every_scenario_in_long_chunks(case, form):
    case = contract.small(case, 64)
    for scenario in contract.scenarios(case):
        given = contract.problem(case, 4, 197, scenario)
        checks.check_forms(case, form, given, scenario == "equal", optimised=True)
