"""The version of each kind of measurement; read without PyTorch."""

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
