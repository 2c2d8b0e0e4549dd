"""Every registered cell, every form: the contract. Nothing here names a cell.

The plain tests run each law at least once for every cell; the full product of variants, lengths,
scenarios and forms is marked slow.
"""

import contract
import contract_checks as checks
import pytest

CELLS = contract.cases(variants=False)
CASES = contract.cases()
slow = pytest.mark.slow


def each(cases, **axes):
    """Parameters (case, form, ...): every form of every case times what `axes` list for a case."""
    rows = [(case, form) for case in cases for form in contract.forms(case)]
    for values in axes.values():
        rows = [(*row, value) for row in rows for value in values(row[0])]
    ids = ["-".join([row[0].name, *map(str, row[1:])]) for row in rows]
    return pytest.mark.parametrize(("case", "form", *axes), rows, ids=ids)


def small_chunks(case):
    """Chunks of 4 tokens, so that few tokens cross many borders."""
    return contract.small(case, 4)


@each(CASES)
def test_values_and_gradients(case, form):
    for scenario in contract.scenarios(case):
        checks.check_forms(case, form, contract.problem(case, 0, 29, scenario))


@each(CELLS)
def test_values_and_gradients_of_one_plain_document(case, form):
    given = contract.problem(case, 1, 29, "correlated", state=False, masks=False)
    checks.check_forms(case, form, given)


@each(CELLS)
def test_lengths(case, form):
    for length in contract.lengths(case.cell):
        checks.check_values(case, form, contract.problem(case, 1, length))


@each(CELLS)
def test_default_chunk(case, form):
    case = case._replace(cell=case.spec.cell())
    for scenario in ("equal", "gates"):
        checks.check_forms(case, form, contract.problem(case, 1, 150, scenario, masks=False))


@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_split_and_decode(case):
    case = small_chunks(case)
    for form in contract.forms(case):
        checks.check_split(case, form, form, 8, (1, 3, 5, 7))
        checks.check_split(case, "scan", form, 8, (3, 5))
        checks.check_decode(case, form, 8, 5)


@each(CELLS)
def test_reset_equals_separate_sequences(case, form):
    checks.check_resets(case, form)


@each(CELLS)
def test_unwritten_tokens(case, form):
    checks.check_unwritten(case, form)
    checks.check_removed(case, form)


@each(CASES)
def test_causality(case, form):
    checks.check_causality(case, form)
    if "gates" in contract.scenarios(case):
        checks.check_causality(case, form, "gates")


@each(CASES)
def test_bfloat16_inputs(case, form):
    checks.check_bfloat16(case, form)


@each(CELLS)
def test_transformations(case, form):
    checks.check_transformations(case, form)


@each(CELLS)
def test_shared_heads(case, form):
    checks.check_shared_heads(case, form)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout(case):
    checks.check_layout(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_slope(case):
    checks.check_slope(case)


@slow
@each(CASES, length=lambda case: contract.lengths(case.cell))
def test_every_length_and_scenario(case, form, length):
    for scenario in contract.scenarios(case):
        for state in (False, True):
            for masks in (False, True):
                given = contract.problem(case, 3, length, scenario, state=state, masks=masks)
                checks.check_forms(case, form, given)


@slow
@each(CASES)
def test_every_split(case, form):
    length = 3 * 4 + 5
    for second in contract.forms(case):
        checks.check_split(small_chunks(case), form, second, length, range(1, length, 2))
    checks.check_decode(small_chunks(case), form, length, 6)


@slow
@each(CASES)
def test_every_wrapper_of_variants(case, form):
    checks.check_resets(case, form)
    checks.check_unwritten(case, form)
    checks.check_removed(case, form)
    checks.check_transformations(case, form)
    for counts in ((4, 2, 1), (1, 2, 4), (2, 4), (1,)):
        checks.check_shared_heads(case, form, counts)
    checks.check_bfloat16(case, form, narrow_gates=False)


@slow
@each(CASES)
def test_default_chunk_in_every_scenario(case, form):
    plain = contract.cases()[[c.name for c in CASES].index(case.name)]
    for scenario in contract.scenarios(case):
        checks.check_forms(plain, form, contract.problem(plain, 4, 197, scenario))
