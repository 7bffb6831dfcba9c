"""Which cases of a long list run in ``make test``, and which in ``make test-all`` alone."""

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
