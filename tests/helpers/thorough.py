"""Which cases of a long list run in ``make test``, and which in ``make test-all`` alone."""

import itertools

import pytest


def sampled(cases, every):
    """All of the cases; those that are not the first of ``every`` in a row are marked ``thorough``."""
    found = []
    for i, case in enumerate(cases):
        marks = [pytest.mark.thorough] if i % every else []
        if hasattr(case, "marks"):  # a pytest.param
            found.append(pytest.param(*case.values, id=case.id, marks=(*case.marks, *marks)))
        else:
            found.append(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks))
    return found


def pairwise(possible=lambda *_: True, /, **parameters):
    """Parametrised by all combinations that are ``possible``; those that add no new pair of values are ``thorough``.

    Any value of one parameter meets any of another in ``make test``.
    """
    cases = [
        case for case in itertools.product(*map(enumerate, parameters.values())) if possible(*(v for _, v in case))
    ]
    pairs = [set(itertools.combinations(((k, i) for k, (i, _) in enumerate(case)), 2)) for case in cases]
    missing, taken = set().union(*pairs), set()
    while missing:
        taken.add(best := max(range(len(cases)), key=lambda i: len(pairs[i] & missing)))
        missing -= pairs[best]
    marks = [() if i in taken else pytest.mark.thorough for i in range(len(cases))]
    found = [pytest.param(*(v for _, v in case), marks=mark) for case, mark in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize(",".join(parameters), found, ids=str)
