"""The data of the results browser, as tests need them."""

from collections.abc import Iterable

import pytest

from clustr_core.drawing import results_browser
from clustr_core.measuring import accuracy, chain, study


def without_intervals(studies: Iterable[study.Study]) -> dict:
    """Counts are sent, and the page computes their intervals: the package's cost seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (accuracy, chain):
            patch.setattr(module, "binomial_interval", lambda successes, trials: (0.0, 1.0))
        return results_browser.data(studies)
