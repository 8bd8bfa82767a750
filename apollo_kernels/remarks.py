"""What a user is told of groups in which nothing is wrong, but which are hardly meant so.

Each remark is a line, which becomes a warning, once. It names parameters. A group that says a thing
outright (``"rank": None``, ``"batch_dims": 0``) is taken at its word.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from apollo_kernels import experts, state

_NAMED = 3  # parameters that a remark names
Group = Mapping[str, Any]


def of_group(group: Group, given: Collection[str], name_of: Callable[[int], str]) -> Iterator[str]:
    """Of a group that has been added.

    Args
        given: the keys that it came with, before it got defaults.
        name_of: the parameter at a place of it, as an error calls it.
    """
    rank, params = group["rank"], group["params"]
    if rank is None:
        return
    layouts = [state.layout_of(p, group) for p in params]
    pairs = list(enumerate(zip(params, layouts, strict=True)))
    if small := [i for i, (_, layout) in pairs if layout and _saves_nothing(layout)]:
        yield (
            f"rank {rank} is clamped to, or equals, the contracted side of "
            f"{_listed(small, name_of)}: nothing is saved there, their state is as large as "
            "AdamW's. Small matrices, as those of LoRA, are better off in a group without a rank"
        )
    if any(layouts) and group["scale_type"] == "channel" and rank < 4:
        yield (
            f"scale_type='channel' with rank {rank} trains badly: the ratio of two norms over "
            "so few entries is ill-conditioned; take rank 4 or more, or scale_type='tensor'"
        )
    flat = [i for i, (p, layout) in pairs if layout is None and p.dim() > 1]
    if "rank" in given and params and not any(layouts):
        yield _without_matrix(group, range(len(params)), name_of)
    elif flat:
        yield _without_matrix(group, flat, name_of)
    cubes = [i for i, p in enumerate(params) if experts.count_matrices(p.shape)]
    if cubes and "batch_dims" not in given and group["batch_dims"] == 0:
        yield (
            f"{_listed(cubes, name_of)}: three dimensions, stepped as one matrix, the first x the "
            "rest. If the first counts matrices, as of experts, set batch_dims=1 in the group "
            "(apollo_kernels.param_groups does); batch_dims=0 there says that it does not"
        )


def of_all(
    groups: Sequence[Group],
    given: Sequence[Collection[str]],
    name_of: Callable[[int, int], str],
) -> Iterator[str]:
    """Of the groups that an optimizer was made with, all together; arguments as of ``of_group``."""
    ranked = [i for i, group in enumerate(groups) if group["rank"] is not None]
    if not ranked and not any("rank" in keys for keys in given):
        places = range(len(groups[0]["params"]))
        yield (
            f"no group has a rank, so all parameters ({_listed(places, partial(name_of, 0))}) take "
            "AdamW's step, for which the learning rates of APOLLO are about ten times too large. "
            "Make the groups with apollo_kernels.apollo(model), or write 'rank': None into a group "
            "to say that it is meant"
        )
    if any(state.layout_of(p, groups[i]) for i in ranked for p in groups[i]["params"]):
        return
    for i in ranked:
        if places := range(len(groups[i]["params"])):
            yield _without_matrix(groups[i], places, partial(name_of, i))


def _without_matrix(group: Group, places: Sequence[int], name_of: Callable[[int], str]) -> str:
    lead = f" after batch_dims {group['batch_dims']}" if group["batch_dims"] else ""
    return (
        f"rank {group['rank']} has no effect on {_listed(places, name_of)}: a low-rank step needs "
        f"two dimensions{lead}, and this is AdamW's at the learning rate of the group"
    )


def _saves_nothing(layout: state.Layout) -> bool:
    contracted = layout.n if layout.rows else layout.m
    return 0 < contracted == layout.rank and layout.m * layout.n > 0


def _listed(places: Sequence[int], name_of: Callable[[int], str]) -> str:
    found = ", ".join(map(name_of, places[:_NAMED]))
    return found + (f", ... ({len(places)} in all)" if places[_NAMED:] else "")
