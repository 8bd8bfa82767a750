"""Nothing is silent: what is hardly meant so warns, once and by name; what is meant does not."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from apollo_kernels import APOLLO, APOLLOAdamW, apollo, param_groups
from apollo_kernels.commands import check

pytestmark = pytest.mark.filterwarnings("default")  # conftest.py ignores most of them elsewhere


def bare(*shape):
    return nn.Parameter(torch.zeros(shape or (16, 8)))


def said(call):
    """What ``call`` warns of, and where."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    assert all(w.filename == __file__ for w in caught)  # at the line that asks for it
    return [str(w.message) for w in caught], result


def remark(call):
    """The one warning of ``call``."""
    texts, _ = said(call)
    assert len(texts) == 1, texts
    return texts[0]


def model():
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))


# ---- no rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda m: APOLLO(m.named_parameters(), lr=1e-2),
    lambda m: APOLLOAdamW(m.named_parameters(), lr=1e-2),
    lambda m: APOLLO([{"params": list(m.named_parameters()), "weight_decay": 0.1}]),
])  # fmt: skip
def test_no_rank_at_all_is_told(make):
    text = remark(lambda: make(model()))
    for piece in ("no group has a rank", "'0.weight'", "(6 in all)", "ten times", "'rank': None"):
        assert piece in text, text


def test_a_rank_of_none_says_that_adamw_is_meant():
    given = {"params": model().parameters(), "rank": None}
    assert said(lambda: APOLLO([given, {"params": [bare()]}]))[0] == []
    assert said(lambda: APOLLO(apollo(model(), rank=4)))[0] == []
    assert said(lambda: APOLLO(model().parameters(), rank=4))[0] == []


def test_the_check_of_the_command_line_means_adamw():
    case = next(case for case in check.CASES if case.name == "AdamW")
    call = functools.partial(check.follows_the_formula, case, "torch", torch.device("cpu"))
    assert said(call)[0] == []


def test_it_is_told_once_and_copies_and_later_groups_add_nothing():
    texts, optimizer = said(lambda: APOLLO([bare()]))
    assert len(texts) == 1
    assert said(lambda: optimizer.add_param_group({"params": [bare()]}))[0] == []
    assert said(lambda: copy.deepcopy(optimizer).add_param_group({"params": [bare()]}))[0] == []
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    assert said(optimizer.step)[0] == []


# ---- no matrix ---------------------------------------------------------------------------------


def test_a_rank_for_vectors_alone_is_told():
    vectors = [("a.bias", bare(8)), ("b.bias", bare(4))]
    text = remark(lambda: APOLLO([{"params": [("w", bare())]}, {"params": vectors, "rank": 4}]))
    assert "rank 4 has no effect on parameter 'a.bias' (0 of group 1), parameter 'b.bias'" in text
    assert "rank 4 has no effect" in remark(lambda: APOLLO(vectors, rank=4))


def test_vectors_that_take_the_rank_of_the_optimizer_beside_matrices_are_meant():
    groups = [{"params": [bare()]}, {"params": [bare(8)], "weight_decay": 0.0}]
    assert said(lambda: APOLLO(groups, rank=4))[0] == []
    assert said(lambda: APOLLO([bare(), bare(8)], rank=4))[0] == []
    assert said(lambda: APOLLO([{"params": [], "rank": 4}, {"params": [bare(8)]}]))[0] == []


def test_batch_dims_that_leave_no_matrix_are_told():
    params = [("experts", bare(2, 8, 6)), ("w", bare())]
    text = remark(lambda: APOLLO([{"params": params, "rank": 4, "batch_dims": 1}]))
    assert "rank 4 has no effect on parameter 'w' (1 of group 0)" in text
    assert "after batch_dims 1" in text


# ---- no saving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [8, 16])
def test_matrices_of_lora_whose_side_is_no_longer_than_the_rank_are_told(rank):
    lora = [("a.lora_A", bare(8, 64)), ("a.lora_B", bare(64, 8)), ("w", bare(64, 64))]
    text = remark(lambda: APOLLO([{"params": lora, "rank": rank}]))
    assert f"rank {rank} is clamped" in text and "LoRA" in text and "as large as AdamW's" in text
    assert "'a.lora_A'" in text and "'a.lora_B'" in text and "'w'" not in text
    assert said(lambda: APOLLO([{"params": lora, "rank": 7}]))[0] == []


def test_a_few_matrices_below_the_rank_beside_many_others_are_nothing_to_tell():
    """As routers, or keys and values of few heads: less than a tenth of the weights."""
    router, w = ("router", bare(8, 64)), ("w", bare(64, 80))
    assert said(lambda: APOLLO([router, w], rank=16))[0] == []
    assert "'router'" in remark(lambda: APOLLO([router, ("w", bare(64, 64))], rank=16))
    groups = [{"params": [router], "rank": 16}, {"params": [w], "rank": 4}]
    texts, optimizer = said(lambda: APOLLO(groups))
    assert texts == []
    added = {"params": [("lora_A", bare(8, 64))], "rank": 8}  # later groups are taken by themselves
    assert "'lora_A'" in remark(lambda: optimizer.add_param_group(added))


def test_many_names_are_counted():
    params = [(f"p{i}", bare(4, 4)) for i in range(9)]
    text = remark(lambda: APOLLO(params, rank=4))
    assert "'p2'" in text and "'p3'" not in text and "... (9 in all)" in text


# ---- three dimensions --------------------------------------------------------------------------


def test_three_dimensions_without_batch_dims_are_told():
    params = [("experts.w1", bare(6, 16, 8)), ("w", bare())]
    text = remark(lambda: APOLLO([{"params": params, "rank": 4}]))
    assert "parameter 'experts.w1' (0 of group 0): three dimensions" in text
    assert "batch_dims=1" in text and "'w'" not in text
    many = [("experts.w1", bare(32, 16, 8))]  # more of them than rows and columns
    assert "'experts.w1'" in remark(lambda: APOLLO([{"params": many, "rank": 4}]))


@pytest.mark.parametrize("keys", [{"batch_dims": 1}, {"batch_dims": 0}], ids=str)
def test_batch_dims_in_the_group_say_what_is_meant(keys):
    assert said(lambda: APOLLO([{"params": [bare(6, 16, 8)], "rank": 4, **keys}]))[0] == []


def test_a_convolution_in_a_group_of_param_groups_is_meant():
    net = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(8, 8))
    assert said(lambda: APOLLO(param_groups(net, rank=4, targets="all")))[0] == []


# ---- loaded states -----------------------------------------------------------------------------


def trained(make):
    net = model()
    optimizer = make(net.parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def ranked(rank=4):
    return APOLLO([{"params": list(model().named_parameters()), "rank": rank}])


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_another_optimizer_s_checkpoint_does_not_end_low_rank_steps(make):
    saved, optimizer = trained(make), ranked()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="group 0 of the loaded state has no 'rank'.*'0.weight'"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == before


def test_one_of_adamw_loads_where_adamw_is_meant():
    net = model()
    optimizer = APOLLO([{"params": list(net.named_parameters()), "rank": None}])
    assert said(lambda: optimizer.load_state_dict(trained(torch.optim.AdamW)))[0] == []
    assert optimizer.state[net[0].weight]["exp_avg"].shape == (16, 16)


def test_a_loaded_rank_of_none_is_told():
    dense, optimizer = trained(lambda ps: APOLLO([{"params": list(ps), "rank": None}])), ranked()
    text = remark(lambda: optimizer.load_state_dict(dense))
    assert "group 0 of the loaded state has rank None" in text and "'0.weight'" in text
    assert optimizer.param_groups[0]["rank"] is None


def test_two_parameters_with_one_key_in_a_loaded_state_are_told():
    saved = trained(lambda ps: APOLLO(ps, rank=4))
    assert said(lambda: ranked().load_state_dict(saved))[0] == []
    saved["state"][4]["seed"] = saved["state"][0]["seed"]
    text = remark(lambda: ranked().load_state_dict(saved))
    assert "parameter '2.weight' (4 of group 0) has the key of parameter '0.weight'" in text
