"""What makes a test depend on one seed or one BLAS is not in the tests."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
BARE = {
    "seeds: helpers.seeds.shifted": r"(?:manual_seed|default_rng|random\.Random)\((?!shifted\(|number\))[^)]",
    "sums: numeric.assert_close": r"(?<!not )torch\.allclose\(|testing\.assert_close\((?!.*rtol=0, atol=0)",
}


@pytest.mark.parametrize("habit", BARE)
def test_tests_use_the_helpers(habit):
    found = []
    for path in TESTS.rglob("*.py"):
        if path != Path(__file__):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if re.search(BARE[habit], line) and not line.lstrip().startswith(('"', "'", "#")) and "``" not in line:
                    found.append(f"{path.relative_to(TESTS)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
