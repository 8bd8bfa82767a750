"""Tells a misspelled key of a parameter group from one that somebody else put there.

Groups carry keys of trainers and schedulers (timm's lr_scale, Megatron's wd_mult), which pass. A
key that nearly is one of ours would be a setting that nobody reads, so it raises.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Of torch and of widespread trainers and schedulers, whatever else they look like.
_FOREIGN = {"params", "param_names", "name", "lr_scale", "lr_mult", "wd_mult"}
_FOREIGN |= {"initial_lr", "max_lr", "min_lr", "swa_lr", "decoupled_weight_decay"}
_SHORT = {"wd": "weight_decay", "decay": "weight_decay", "learning_rate": "lr", "r": "rank"}
_SHORT |= {"gap": "update_proj_gap", "projection": "proj"}
_CLOSE = 0.8  # of difflib's ratio: "rnk" has 0.86 to "rank", "lr_scale" 0.77 to "scale"


def meant(key: str, known: Collection[str]) -> str | None:
    """Which of the ``known`` keys was meant by one that is not among them; None if none was."""
    if not isinstance(key, str) or key in _FOREIGN:
        return None
    plain = key.lower().replace("-", "_").strip()
    if plain in known or _SHORT.get(plain) in known:
        return plain if plain in known else _SHORT[plain]
    words = set(plain.split("_"))
    if len(words) > 1:  # proj_gap, update_gap
        whole = [name for name in sorted(known) if words < set(name.split("_"))]
        if whole:
            return whole[0]
    return next(iter(difflib.get_close_matches(plain, sorted(known), n=1, cutoff=_CLOSE)), None)
