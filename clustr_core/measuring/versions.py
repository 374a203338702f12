"""The version of each kind of measurement, and the columns of its rows; read without PyTorch."""

# what each kind of measurement does; raised by one when the same weights lead to other rows than before
# 1: rows are known by the weights, the protocol, the test set and this number, and no longer by a digest of source code
# diagnostics 2: seven published tests of an attack were added (`indicators`)
VERSIONS = {
    "attack": 1, "certificate": 1, "sandwich": 1, "diagnostics": 2, "ablation": 1,
    "embedding": 1, "formation": 1, "geometry": 1,
}  # fmt: skip
# the measurement behind each kind of table
MEASUREMENT_OF = {
    "attacks": "attack", "certificates": "certificate", "sandwich": "sandwich", "diagnostics": "diagnostics",
    "ablations": "ablation",
}  # fmt: skip
# what the rows of a kind of measurement are made of: texts, truths, whole numbers and any numbers
_SEEN = {"index": "whole number", "label": "whole number", "prediction": "whole number", "correct": "truth"}
_ATTACKED = {"steps": "whole number", "restarts": "whole number", **_SEEN, "adversarial_prediction": "whole number"}
_LENGTHS = dict.fromkeys(("feature_radius", "radius", "lipschitz", "lipschitz_lower_bound"), "number")
COLUMNS = {
    "attack": {
        "attack": "text", "norm": "text", "eps": "number", "loss": "text", **_ATTACKED, "robust": "truth",
        "gradients": "whole number",
    },
    "certificate": {"bound": "text", **_SEEN, **_LENGTHS},
    "sandwich": {
        "attack": "text", "index": "whole number", "label": "whole number", "correct": "truth", "radius": "number",
        "norm": "number", "gradients": "whole number",
    },
    "diagnostics": {
        "method": "text", "check": "text", "value": "number", "threshold": "number", "flagged": "truth",
        "source": "text", "meaning": "text",
    },
    "ablation": {"method": "text", "change": "text", "robust_accuracy": "number", "drop": "number"},
}  # fmt: skip


def columns_of(kind: str) -> list[str]:
    """The columns of a kind of table: those of its measurement, after the method."""
    columns = COLUMNS[MEASUREMENT_OF[kind]]
    return ["method", *(name for name in columns if name != "method")]
