"""Hand-made outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

COLUMNS = [
    "target", "defense", "n", "seed", "threat", "surrogate", "attack", "loss", "eps", "restart", "member", "sample",
    "label", "prediction", "correct", "margin", "linf", "zero_gradient", "part", "cell",
]  # fmt: skip


def rows(
    correct: Iterable[bool],
    *,
    defense: str = "dverge",
    n: int = 3,
    seed: int = 0,
    threat: str = "whitebox",
    eps: float = 0.01,
    target: str | None = None,
    surrogate: str = "",
    attack: str = "pgd",
    loss: str = "ce",
    restart: int = 0,
    member: str = "ensemble",
    first: int = 0,
) -> pd.DataFrame:
    """A row per verdict in ``correct``, samples counted from ``first``."""
    held = np.asarray(list(correct), dtype=bool)
    clean = threat == "clean"
    label = np.arange(len(held)) % 10
    return pd.DataFrame(
        {
            "target": target or f"{defense}-{n}-s{seed}",
            "defense": defense,
            "n": n,
            "seed": seed,
            "threat": threat,
            "surrogate": surrogate,
            "attack": "" if clean else attack,
            "loss": "" if clean else loss,
            "eps": 0.0 if clean else eps,
            "restart": restart,
            "member": member,
            "sample": np.arange(first, first + len(held)),
            "label": label,
            "prediction": np.where(held, label, (label + 1) % 10),
            "correct": held,
            "margin": np.where(held, 1.0, -1.0),
            "linf": 0.0 if clean else eps,
            "zero_gradient": False,
            "part": "",
            "cell": f"{defense}{n}{seed}{threat}{surrogate}{attack}{loss}{eps}{restart}",
        }
    )[COLUMNS]


def share(right: int, total: int = 100) -> list[bool]:
    """``right`` of ``total`` survive, the first ones."""
    return [index < right for index in range(total)]


def study(
    defenses: Sequence[str] = ("baseline", "adp", "gal", "dverge", "advt", "dverge-advt"),
    sizes: Sequence[int] = (3, 5, 8),
    seeds: Sequence[int] = (0,),
    radii: Sequence[float] = (0.01, 0.02, 0.03, 0.05, 0.07),
    samples: int = 100,
    versions: Sequence[tuple[str, str, str]] = (("surrogate-3", "pgd", "ce"), ("surrogate-5", "mdi2", "cw")),
) -> pd.DataFrame:
    """Plausible outcomes of every threat, the same at each call."""
    random = np.random.default_rng(0)
    slope = {"baseline": 150.0, "adp": 100.0, "gal": 40.0, "dverge": 25.0, "advt": 6.0, "dverge-advt": 7.0}
    top = {"advt": 0.77, "dverge-advt": 0.84}
    parts = []
    for place, defense in enumerate(defenses):
        for n in sizes:
            for seed in seeds:
                who = {"defense": defense, "n": n, "seed": seed}
                hard = random.random(samples)
                clean = top.get(defense, 0.92)
                parts.append(rows(hard < clean, threat="clean", **who))
                for eps in radii:
                    fall = slope.get(defense, 20.0 + place) * eps * (3 / n) ** 0.3
                    parts.append(rows(hard < clean * np.exp(-2.5 * fall), eps=eps, **who))
                    for surrogate, attack, loss in versions:
                        held = hard < clean * np.exp(-fall) * random.uniform(0.9, 1.0)
                        parts.append(
                            rows(held, threat="blackbox", eps=eps, surrogate=surrogate, attack=attack, loss=loss, **who)
                        )
                for source in range(1, n + 1):
                    for member in [*map(str, range(1, n + 1)), "ensemble"]:
                        rate = 1.0 if member == str(source) else min(0.97, slope.get(defense, 20.0) / 160)
                        parts.append(
                            rows(
                                random.random(samples) >= rate, threat="transfer", eps=0.03, surrogate=str(source),
                                member=member, **who,
                            )
                        )  # fmt: skip
                if defense == "dverge":
                    for attack, held in (("fgsm", 0.7), ("pgd", 0.45), ("pgd:steps=1000", 0.44)):
                        parts.append(rows(hard < held, threat="convergence", attack=attack, **who))
    return pd.concat(parts, ignore_index=True)


def history(epochs: int = 60, sizes: Sequence[int] = (3, 5, 8)) -> pd.DataFrame:
    random = np.random.default_rng(1)
    epoch = np.arange(1, epochs + 1)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "run": f"dverge-{n}-s0", "defense": "dverge", "n": n, "seed": 0, "epoch": epoch,
                    "diversity": 1 + 2 * (1 - np.exp(-epoch / 20)) + random.normal(0, 0.2, epochs),
                    "transferability": 0.1 + 0.8 * np.exp(-epoch / (10 * n / 3)) + random.normal(0, 0.02, epochs),
                }
            )
            for n in sizes
        ],
        ignore_index=True,
    )  # fmt: skip
