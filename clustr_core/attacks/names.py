"""What norms and attacks are called, and the paper's constants; read without PyTorch."""

from typing import Literal

Norm = Literal["linf", "l2"]
PAPER_EPS = (2 / 255, 8 / 255, 16 / 255, 25.5 / 255)
PAPER_STEPS = (20, 100)
PAPER_RESTARTS = 10
PAPER_STEP_SIZE = 2 / 255
# the attacks that a profile can name, and what each climbs unless told otherwise
ATTACKS: dict[str, tuple[str, ...]] = {
    "pgd": ("ce", "margin"),
    "paper": ("ce",),
    "cell-walk": ("cells",),
    "transfer": ("margin",),
    "square": ("margin",),
    "autoattack": ("standard",),
}
# what PGD can climb by name
LOSSES = ("ce", "margin", "dlr")
