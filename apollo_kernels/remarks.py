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
# Of all low-rank weights, from where on it is worth a word that a rank saves nothing. Many a model
# has a router, or keys and values of few heads, that are smaller than the rank of the others.
_MUCH = 0.1

Group = Mapping[str, Any]
NameOf = Callable[[int, int], str]  # of the parameter at a place of a group, as an error calls it


def of_all(
    groups: Sequence[Group], given: Sequence[Collection[str]], name_of: NameOf
) -> Iterator[str]:
    """Of the groups that an optimizer is made with.

    Args
        given: the keys that each of them came with, before it got defaults.
    """
    for index, group in enumerate(groups):
        yield from _of_group(group, given[index], partial(name_of, index))
    ranked = [i for i, group in enumerate(groups) if group["rank"] is not None]
    yield from _of_small_matrices({i: groups[i] for i in ranked}, name_of)
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


def of_added(group: Group, given: Collection[str], index: int, name_of: NameOf) -> Iterator[str]:
    """Of a group that is added later, as number ``index``."""
    yield from _of_group(group, given, partial(name_of, index))
    yield from _of_small_matrices({index: group}, name_of)


def _of_group(group: Group, given: Collection[str], called: Callable[[int], str]) -> Iterator[str]:
    rank, params = group["rank"], group["params"]
    if rank is None:
        return
    layouts = [state.layout_of(p, group) for p in params]
    if any(layouts) and group["scale_type"] == "channel" and rank < 4:
        yield (
            f"scale_type='channel' with rank {rank} trains badly: the ratio of two norms over "
            "so few entries is ill-conditioned; take rank 4 or more, or scale_type='tensor'"
        )
    flat = [i for i, p in enumerate(params) if layouts[i] is None and p.dim() > 1]
    if "rank" in given and params and not any(layouts):
        yield _without_matrix(group, range(len(params)), called)
    elif flat:
        yield _without_matrix(group, flat, called)
    cubes = [
        i
        for i, p in enumerate(params)
        if p.dim() == 3 and experts.count_matrices(p.shape, called(i))
    ]
    if cubes and "batch_dims" not in given and group["batch_dims"] == 0:
        yield (
            f"{_listed(cubes, called)}: three dimensions, stepped as one matrix, the first x the "
            "rest. If the first counts matrices, as of experts, set batch_dims=1 in the group "
            "(apollo_kernels.param_groups does); batch_dims=0 there says that it does not"
        )


def _of_small_matrices(groups: Mapping[int, Group], name_of: NameOf) -> Iterator[str]:
    """Where the rank is no smaller than the contracted side, the moments have the weight's size."""
    small: dict[int, list[int]] = {}
    saved_nothing = matrices = 0
    for index, group in groups.items():
        for place, p in enumerate(group["params"]):
            layout = state.layout_of(p, group)
            matrices += p.numel() if layout else 0
            if layout and _saves_nothing(layout):
                saved_nothing += p.numel()
                small.setdefault(index, []).append(place)
    if saved_nothing < _MUCH * matrices:
        return
    for index, places in small.items():
        yield (
            f"rank {groups[index]['rank']} is clamped to, or equals, the contracted side of "
            f"{_listed(places, partial(name_of, index))}: nothing is saved there, their state is "
            "as large as AdamW's. Small matrices, as those of LoRA, are better off in a group "
            "without a rank"
        )


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
