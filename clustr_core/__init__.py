"""Clusters, certificates, the magnet loss and attacks: the small, tested package under the book.

`import clustr_core as cc` offers the public names, each loaded when it is first used: `cc.pgd`, `cc.certify`, `cc.fit`
and the others that `dir(cc)` lists. Everything else is imported from its wing.
"""

import importlib
from typing import Any

_HOMES = {
    "data": "Dataset load_dataset",
    "models.clusters": "Clusters fit_clusters",
    "models.classifiers": "ClusterClassifier LinearClassifier cluster_logits nearest_logits",
    "models.encoders": "register_encoder",
    "models.official": "load_official save_official",
    "attacks.result": "AttackResult",
    "attacks.gradient": "fgsm pgd",
    "attacks.cells": "cell_walk",
    "attacks.transfer": "transfer",
    "attacks.temperature": "Rescaled rescaled",
    "attacks.autoattack": "autoattack square",
    "attacks.minimum_norm": "MinimumNorm ddn fmn",
    "attacks.paper": "ScoreModel paper_pgd",
    "attacks.registry": "register_attack run_own",
    "certificates.ladder": "Certificate certified_radius certify",
    "certificates.lipschitz": "lipschitz_lower_bound lipschitz_upper_bound",
    "certificates.registry": "register_lipschitz",
    "certificates.smoothing": "certify_smoothed predict_smoothed",
    "training.losses": "magnet_loss full_magnet_loss certificate_loss",
    "training.sampling": "ClusterBatches",
    "training.recipes": (
        "AdversarialTraining Clustr ClustrCert ClustrLip ClustrQTrades CrossEntropy FastAdversarialTraining "
        "FreeAdversarialTraining FreeClustr LipschitzMargin Recipe Smoothing Trades"
    ),
    "training.loop": "fit",
    "training.registry": "register_recipe",
    "training.run": "Run load_run",
    "measuring.profile": "Profile Protocol load_profile",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A public name, from the module where it lives."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no public name {name!r}; dir({__name__}) lists those it has")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
