"""Every registered cell, every form: the contract. Nothing here names a cell.

Fast tests hold every cell to the laws of values, gradients, splits, resets and causality, and one
cell to that of the default chunk and to those of the machinery that all share (heads, dtypes, jax's
transformations). The other cells' turn at those, layouts, variants, the cells of blocks, and the
full product of cells, lengths, scenarios and forms, are marked slow. A test covers all forms of a
cell, which share compiled code.
"""

import contract
import contract_checks as checks
import pytest

GROUPED_BY = "case"  # tests of one case share compiled code, see conftest.py
CELLS = contract.cases(variants=False, blocks=False)
WHOLE = contract.cases(variants=False)  # with the cells of blocks
CASES = contract.cases()
slow = pytest.mark.slow


SHORTEST = [min(CELLS, key=lambda case: len(case.fields))]  # the cell that compiles fastest
# The first cell with strengths whose default chunk is not the small one.
CHUNKED = [
    case
    for case in CELLS
    if "rate" in {field.kind for field in case.fields.values()}
    and contract.small(case) != case._replace(cell=case.spec.cell())
][:1]


def each(cases, fast=CASES):
    """One test for each case, slow where it is none of `fast`."""
    rows = [pytest.param(case, marks=() if case in fast else slow) for case in cases]
    return pytest.mark.parametrize("case", rows, ids=[case.name for case in cases])


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
            checks.check_forms(case, form, contract.problem(case, 0, 29, scenario))


@each(CASES, fast=SHORTEST)
def test_bfloat16_inputs(case):
    for form in contract.forms(case):
        checks.check_bfloat16(case, form)


@each(WHOLE, fast=SHORTEST)
def test_one_head(case):
    for form in contract.forms(case):
        checks.check_values(case, form, contract.problem(case, 1, 9, heads=1))


@each(WHOLE, fast=CHUNKED)
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


@each(WHOLE, fast=SHORTEST)
def test_transformations(case):
    for form in contract.forms(case):
        checks.check_transformations(case, form)


@each(WHOLE, fast=SHORTEST)
def test_shared_heads(case):
    for form in contract.forms(case):
        checks.check_shared_heads(case, form)


@each(CASES, fast=())
def test_layout(case):
    checks.check_layout(case)


@each(CASES, fast=CELLS)
def test_slope(case):
    checks.check_slope(case)


def lengths(case):
    """All of a cell; one token and the longest of its variants."""
    every = contract.lengths(case.cell)
    return every if case in WHOLE else [every[0], every[-1]]


@slow
@each_form(CASES, compared, length=lengths)
def test_every_length_and_scenario(case, form, length):
    for scenario in contract.scenarios(case):
        checks.check_forms(case, form, contract.problem(case, 3, length, scenario))


@slow
@each_form(WHOLE, compared, state=lambda case: (False, True))
def test_every_scenario_without_masks_or_state(case, form, state):
    length = max(contract.lengths(case.cell))
    for scenario in contract.scenarios(case):
        for masks in (False, True)[: 1 if state else 2]:
            given = contract.problem(case, 3, length, scenario, state=state, masks=masks)
            checks.check_forms(case, form, given)


@slow
@each_form(WHOLE, second=contract.forms)
def test_every_split(case, form, second):
    case, length = contract.small(case, 4), 3 * 4 + 5
    checks.check_split(case, form, second, length, range(1, length, 2))
    checks.check_decode(case, form, length, 6)


@slow
@each_form(WHOLE)
def test_every_law(case, form):
    checks.check_resets(case, form, checks.as_it_is)
    checks.check_unwritten(case, form, checks.as_it_is)
    checks.check_removed(case, form, checks.as_it_is)
    checks.check_without_jit(case, form)
    checks.check_bfloat16(case, form, narrow_gates=False)
    checks.check_float64(case, form)
    if form not in compared(case):
        checks.check_causality(case, form)
    for counts in ((1, 2, 4), (1,)):
        checks.check_shared_heads(case, form, counts)


@slow
@each_form(WHOLE, compared, scenario=contract.scenarios)
def test_every_scenario_in_long_chunks(case, form, scenario):
    for cell in (case.spec.cell(), contract.small(case, 64).cell):
        given = contract.problem(case, 4, 197, scenario)
        case = case._replace(cell=cell)
        checks.check_forms(case, form, given, scenario == "equal", optimised=True)
