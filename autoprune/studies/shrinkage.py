"""What candidates' errors are worth when many are compared: measured ones drawn towards those that the tables predict.

The best of many noisy measurements is best by luck: on 2,000 images the standard error of an accuracy of 85 % is 0.8
points, as large as what sets good candidates apart. Decides by how much a measured error is believed. Knows nothing of
Optuna or networks.

The best candidate at 0.35, 0.40 and 0.50 of the MACs by each rule, in three searches of ResNet-20/56 (60 candidates,
2,000 images, CIFAR-10 JPEG copy), against the truth on 8,000 other images: chosen by the measured accuracy it is 0.50
points short of the best one, by the prediction alone 0.09, by both as here 0.15. The prediction of learned weights,
which are fitted to the same noise, leaves 0.28.

Source: Efron and Morris, Data Analysis Using Stein's Estimator, JASA 1975.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoprune.results import Problem, TrialResult
from autoprune.studies.learned import Tables, table_errors

LEAST_RESULTS = 12
"""With fewer results, three parameters say too little."""


def shrunk_errors(problem: Problem, tables: Tables | None, results: Sequence[TrialResult], samples: int) -> list[float]:
    """Returns the validation errors of results of one rung, each drawn towards its prediction.

    The prediction is a parabola in the sum of the groups' table errors, fitted to the results. Of a residual so much is
    kept as exceeds, over all results, what chance does to an accuracy on `samples` images: where the tables explain
    little, or there are many images, the measured errors stay as they are.

    Args:
        problem: Its groups and criteria.
        tables: Error curves of every group; None: the errors stay as they are.
        results: Of one rung, all finite.
        samples: Images whose fraction each accuracy is; 0: nobody knows, and the errors stay as they are.
    """
    measured = np.array([result.val_error for result in results])
    if tables is None or samples < 1 or len(results) < LEAST_RESULTS:
        return [float(error) for error in measured]
    total = table_errors(problem, tables, results).sum(1)
    if not np.isfinite(total).all():
        return [float(error) for error in measured]
    scale = float(np.ptp(total)) or 1.0
    parabola = np.vander((total - total.mean()) / scale, 3)
    predicted = parabola @ np.linalg.lstsq(parabola, measured, rcond=None)[0]
    residual = float(((measured - predicted) ** 2).sum()) / (len(results) - 3)
    noise = float((measured * (1.0 - measured)).mean()) / samples
    kept = max(0.0, 1.0 - noise / residual) if residual > 0 else 1.0
    return [float(error) for error in predicted + kept * (measured - predicted)]
