"""`make test-mutants`: single changes to csrc/ and triton/, and for each the test that must fail.

    python tests/mutants.py [--list] [names or parts of names]

Every change is made in a copy of the tree. CUDA kernels are compiled for the emulated device and
Triton's are interpreted: no card is needed, none is used. A mutant that survives is a promise that
no test holds. Write that test, or say in `argued` why nobody can see the change.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("apollo_kernels", "csrc", "triton", "tests", "pyproject.toml")
LONGEST = 120  # seconds that a build and a test may take: a mutant may wait for ever
NOT_BUILT, NOTHING_RAN = 100, 101  # exit statuses beside pytest's


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    test: str  # in tests/; the node id of one small test
    argued: str = ""  # why it changes nothing that can be seen, if it survives


# fmt: off
CUDA = [
    Mutant(
        "maximize is forgotten", "csrc/common.cuh",
        "h.maximize ? -1.0f : 1.0f", "1.0f",
        "test_kernels.py::test_every_switch_reaches_moments_norm_and_weights[{'maximize': True}-8]",
    ),
    Mutant(
        "M as m + (1 - b1) (r - m)", "csrc/common.cuh",
        "fmaf(h.beta1_float, m, h.keep1 * r)", "fmaf(h.keep1, r - m, m)",
        "test_cuda_batch.py::test_a_first_moment_without_memory_forgets_what_was_huge[False-8]",
    ),
    Mutant(
        "1 - b2 subtracted in float32", "csrc/kernel_bindings.cpp",
        "h.keep2 = float(1.0 - beta2)", "h.keep2 = 1.0f - float(beta2)",
        "test_cuda_batch.py::test_clip_multiplies_r_and_q_and_the_step[8]",
    ),
    Mutant(
        "finite asked of R, not of its square", "csrc/common.cuh",
        "const bool ok = finite(r * r);", "const bool ok = finite(r);",
        "test_extremes.py::test_a_channel_of_rank_one_whose_square_overflows_keeps_its_moments"
        "[cuda-channel-(24, 16)]",
    ),
    Mutant(
        "0 / 0 without eps", "csrc/common.cuh",
        "denominator < kLeastNormal ? 0.0f : m", "m",
        "test_cuda_batch.py::test_without_eps_what_never_had_a_gradient_stays[False-8]",
    ),
    Mutant(
        "eps under the root", "csrc/common.cuh",
        "approx_root(v) + h.eps", "approx_root(v + h.eps)",
        "test_dense.py::test_eps_is_as_strong_at_the_first_step_as_later[cuda]",
    ),
    Mutant(
        "bias correction in float32", "csrc/common.cuh",
        "-expm1(t * log(beta))", "1.0 - double(powf(float(beta), float(t)))",
        "test_extremes.py::test_bias_corrections_are_right_to_the_last_bits[cuda-(0.9, 0.999)-1-8]",
    ),
    Mutant(
        "a block's sum in float32", "csrc/common.cuh",
        "double sum = 0.0;", "float sum = 0.0f;",
        "test_cuda_batch.py::test_tensor_scaling_adds_squares_beyond_float32[1-False]",
    ),
    Mutant(
        "16 bytes read at the end of a row", "csrc/common.cuh",
        "if (wide && n >= N) {\n      load(from);", "if (wide && n > 0) {\n      load(from);",
        "test_conventions.py::test_what_lies_beyond_the_end_of_a_row_is_neither_read_nor_written"
        "[cuda-dtype1-False-8]",
    ),
    Mutant(
        "16 bytes written at the end of a row", "csrc/common.cuh",
        "if (wide && n >= N) {\n      store(to);", "if (wide && n > 0) {\n      store(to);",
        "test_conventions.py::test_what_lies_beyond_the_end_of_a_row_is_neither_read_nor_written"
        "[cuda-dtype1-False-8]",
    ),
    Mutant(
        "lr in a tensor is not read", "csrc/common.cuh",
        "h.lr_tensor == nullptr ? h.lr : double(*h.lr_tensor)", "h.lr",
        "test_cuda_batch.py::test_lr_may_be_a_tensor_that_changes[dtype0]",
    ),
    Mutant(
        "a small decay is lost", "csrc/keep.h",
        "return {high, float(keep - double(high))};", "return {high, 0.0f};",
        "test_cuda_batch.py::test_a_small_decay_is_not_lost_and_none_keeps_every_bit",
    ),
    Mutant(
        "the parts of decay differ in sign", "csrc/keep.h",
        "if (double(high) >= keep) {", "if (false) {",
        "test_cuda_batch.py::test_an_infinite_weight_stays_so[0.1-dtype0]",
    ),
    Mutant(
        "the epoch of a step cut to 32 bits", "csrc/draw.cuh",
        "uint32_t(*p.step / launch.hyper.update_proj_gap)",
        "uint32_t(*p.step) / uint32_t(launch.hyper.update_proj_gap)",
        "test_cuda_batch.py::test_steps_beyond_two_to_the_24_are_counted",
    ),
    Mutant(
        "all rank tiles draw the first one's rows", "csrc/draw.cuh",
        "uint32_t(j0) + row", "row",
        "test_kernels.py::test_every_rank_and_orientation[std-200]",
    ),
    Mutant(
        "signs of the call's first word alone", "csrc/draw.cuh",
        "sign_word(words, k0);",
        "sign_word(words, 0);",
        "test_kernels.py::test_the_kernels_draw_the_contracts_numbers[right-8-rademacher]",
    ),
    Mutant(
        "sine and cosine change places", "csrc/philox.cuh",
        "pack_bf16(rho * approx_cos(x), rho * approx_sin(x))",
        "pack_bf16(rho * approx_sin(x), rho * approx_cos(x))",
        "test_kernels.py::test_the_kernels_draw_the_contracts_numbers[right-3-gaussian]",
    ),
    Mutant(
        "float32 in two pieces", "csrc/apollo.h",
        "dtype == kFloat16 ? 2 : 3", "2",
        "test_kernels.py::test_every_pair_of_dtypes[8-(torch.float32, torch.float32)]",
    ),
    Mutant(
        "float16 in one piece", "csrc/project_source.cuh",
        "constexpr int kPieces = pieces(kDtypeOf<T>);",
        "constexpr int kPieces = kDtypeOf<T> == kFloat16 ? 1 : pieces(kDtypeOf<T>);",
        "test_kernels.py::test_every_pair_of_dtypes[8-(torch.float32, torch.float16)]",
    ),
    Mutant(
        "a run of the tensor cores counts twice", "csrc/project_mma.cuh",
        "sums[i / 16][i / 4 % 4][i % 4] += run", "sums[i / 16][i / 4 % 4][i % 4] += 2 * run",
        "test_kernels.py::test_gradients_lie_in_memory_in_any_order[16-torch.float32-rows]",
    ),
    Mutant(
        "the last stage is not multiplied", "csrc/project_mma.cuh",
        "step < steps; step += kSteps",
        "step + kSteps < steps; step += kSteps",
        "test_kernels.py::test_gradients_lie_in_memory_in_any_order[16-torch.float32-rows]",
    ),
    Mutant(
        "whole stages are loaded beyond the end", "csrc/project_source.cuh",
        "Shape::kChannels ? length / kStep : 0;",
        "Shape::kChannels ? length / kStep + 1 : 0;",
        "test_cuda_batch.py::test_tiles_read_each_element_once_in_16_bytes_and_nothing_beyond"
        "[512-True]",
    ),
    Mutant(
        "narrow tiles are loaded whole", "csrc/project_source.cuh",
        "whole = wide && channels == Shape::kChannels ?",
        "whole = wide ?",
        "test_cuda_batch.py::test_tiles_read_each_element_once_in_16_bytes_and_nothing_beyond"
        "[360-False]",
    ),
    Mutant(
        "moments askew are taken in pairs", "csrc/plan.cpp",
        "m.rank % 2 == 0 &&", "",
        "test_cuda_batch.py::test_every_rank_class_and_orientation_takes_the_steps_of_the"
        "_restatement[False-False]",
    ),
    Mutant(
        "fragments of Z in another order", "csrc/project_mma.cuh",
        "swizzled<64>(warp_rank() + 8 * third + low, second)",
        "swizzled<64>(warp_rank() + 8 * second + low, third)",
        "test_kernels.py::test_the_kernels_draw_the_contracts_numbers[right-8-rademacher]",
    ),
    Mutant(
        "a column of X not turned", "csrc/project_mma.cuh",
        "(x_smem ^ 32 * m) + 16 * 128 * kk",
        "(x_smem + 32 * m) + 16 * 128 * kk",
        "test_kernels.py::test_gradients_lie_in_memory_in_any_order[16-torch.bfloat16-columns]",
    ),
    Mutant(
        "nobody waits for copies", "csrc/project_source.cuh",
        "    wait_for_copies();\n    if constexpr", "    if constexpr",
        "test_cuda_batch.py::test_full_tiles_and_their_tails_take_the_steps_of_the_restatement"
        "[rows-False]",
    ),
    Mutant(
        "panels of channels lie one upon the other", "csrc/project_source.cuh",
        "first() / 64 * kPanel", "0",
        "test_cuda_batch.py::test_full_tiles_and_their_tails_take_the_steps_of_the_restatement"
        "[columns-False]",
    ),
    Mutant(
        "the words of the stage before", "csrc/draw.cuh",
        "DISTRIBUTION::words(stream, k0, block + uint32_t(i));\n    }",
        "DISTRIBUTION::words(stream, k0 - kStep, block + uint32_t(i));\n    }",
        "test_kernels.py::test_the_kernels_draw_the_contracts_numbers[right-8-gaussian]",
    ),
    Mutant(
        "moments of the step before", "csrc/project_epilogue.cuh",
        "Moments& at = held[step % 2];", "Moments& at = held[(step + 1) % 2];",
        "test_cuda_batch.py::test_full_tiles_and_their_tails_take_the_steps_of_the_restatement"
        "[rows-False]",
    ),
    Mutant(
        "nobody squares for the other rank tiles", "csrc/project_mma.cuh",
        "p).j0 != 0) {", "p).j0 == 0) {",
        "test_cuda_batch.py::test_full_tiles_and_their_tails_take_the_steps_of_the_restatement"
        "[rows-False]",
    ),
    Mutant(
        "sparse moments are not handed on", "csrc/project_sparse.cuh",
        "    held = next;\n", "",
        "test_cuda_batch.py::test_full_tiles_of_the_sparse_projection_meet_their_tails",
    ),
    Mutant(
        "K is not counted down", "csrc/project_source.cuh",
        "const int left = length - step * kStep;",
        "const int left = length;",
        "test_kernels.py::test_gradients_lie_in_memory_in_any_order[16-torch.float32-sliced]",
    ),
    Mutant(
        "channels beyond the last are read", "csrc/project_source.cuh",
        "row(i) < (BY_ROW ? channels : left) ? inner : 0",
        "inner",
        "test_kernels.py::test_gradients_lie_in_memory_in_any_order[16-torch.float32-sliced]",
    ),
    Mutant(
        "q of every tile in the first one's place", "csrc/project_mma.cuh",
        "q_of(matrix, launch, end.chunk) + end.c0", "q_of(matrix, launch, end.chunk)",
        "test_kernels.py::test_every_rank_and_orientation[std-8]",
    ),
    Mutant(
        "tiles' offsets in 32 bits", "csrc/project_source.cuh",
        "outer * ld + inner",
        "int(outer * ld) + inner",
        "test_kernels.py::test_offsets_beyond_two_to_the_31[std-True-8]",
    ),
    Mutant(
        "tiles forget grad_scale and maximize", "csrc/project_epilogue.cuh",
        "rsqrtf(float(rank)) * sign_and_scale(launch.hyper)", "rsqrtf(float(rank))",
        "test_nonfinite.py::test_grad_scale_equals_the_unscaled_gradient[cuda-shape2-8-False]",
    ),
    Mutant(
        "the last rank row of a tile is left out", "csrc/project_epilogue.cuh",
        "8 * row < channels ? ranks : 0", "8 * row < channels ? ranks - 2 : 0",
        "test_kernels.py::test_every_rank_and_orientation[std-8]",
    ),
    Mutant(
        "rank tiles share a place for their sums", "csrc/project_epilogue.cuh",
        "int64_t(j0 / PRODUCT::kRanks) * channels + c0 + row", "int64_t(0) + c0 + row",
        "test_kernels.py::test_every_rank_and_orientation[std-200]",
    ),
    Mutant(
        "found_inf is not heeded by the tiles", "csrc/project_mma.cuh",
        "  if (skipped(launch.hyper)) return;\n", "",
        "test_cuda_batch.py::test_found_inf_skips_every_write[False]",
    ),
    Mutant(
        "dots forget grad_scale and maximize", "csrc/project_dot.cuh",
        "rsqrtf(float(p.rank)) * sign_and_scale(launch.hyper)", "rsqrtf(float(p.rank))",
        "test_nonfinite.py::test_grad_scale_equals_the_unscaled_gradient[cuda-shape0-4-False]",
    ),
    Mutant(
        "dots' offsets in 32 bits", "csrc/project_dot.cuh",
        "grad + c * p.grad_ld + k0 + slab_k", "grad + int(c * p.grad_ld) + k0 + slab_k",
        "test_kernels.py::test_offsets_beyond_two_to_the_31[reverse_std-True-1]",
    ),
    Mutant(
        "dots run beyond the end of K", "csrc/project_dot.cuh",
        "slab_k < last ? p.channels - next_c : 0", "p.channels - next_c",
        "test_kernels.py::test_gradients_lie_in_memory_in_any_order"
        "[2-torch.float32-sliced columns]",
    ),
    Mutant(
        "a slab of z is drawn for the first k", "csrc/project_dot.cuh",
        "stream, uint32_t(k + slab_k)", "stream, uint32_t(slab_k)",
        "test_kernels.py::test_a_long_contracted_side_is_split_and_summed[torch.float32-2]",
    ),
    Mutant(
        "only the first chunk of K is summed", "csrc/scale.cuh",
        "if (first + i >= chunks) break;", "if (first + i >= 1) break;",
        "test_kernels.py::test_a_long_contracted_side_is_split_and_summed[torch.float32-16]",
    ),
    Mutant(
        "q of the first chunk alone", "csrc/scale.cuh",
        "for (int64_t i = 0; i < p.q_rows; ++i) q +=", "for (int64_t i = 0; i < 1; ++i) q +=",
        "test_kernels.py::test_a_long_contracted_side_is_split_and_summed[torch.float32-16]",
    ),
    Mutant(
        "the scale of a tensor is not told", "csrc/scale.cuh",
        "launch.workspace[p.s] = float(s);", "(void)0;",
        "test_detail.py::test_quantiles_are_those_of_the_formulas_scales[cuda-tensor-random]",
    ),
    Mutant(
        "clip does not reach R", "csrc/scale.cuh",
        "      r[e] *= clip;\n", "",
        "test_cuda_batch.py::test_clip_multiplies_r_and_q_and_the_step[8]",
    ),
    Mutant(
        "clip does not reach q", "csrc/scale.cuh",
        "const float factor = sign_and_scale(h) * clip;", "const float factor = sign_and_scale(h);",
        "test_cuda_batch.py::test_clip_multiplies_r_and_q_and_the_step[8]",
    ),
    Mutant(
        "clip^2 before q", "csrc/scale.cuh",
        "q = factor * (factor * q);", "q *= factor * factor;",
        "test_clipping.py::test_a_clip_whose_square_vanishes_in_float32_is_no_zero"
        "[cuda-8-channel]",
    ),
    Mutant(
        "grad_scale does not reach q", "csrc/scale.cuh",
        "const float factor = sign_and_scale(h) * clip;", "const float factor = clip;",
        "test_cuda_batch.py::test_clip_multiplies_r_and_q_and_the_step[8]",
    ),
    Mutant(
        "clip does not reach the step", "csrc/scale.cuh",
        " * double(clip_factor(h)) * s);", " * s);",
        "test_cuda_batch.py::test_clip_multiplies_r_and_q_and_the_step[8]",
    ),
    Mutant(
        "grad_scale and maximize do not reach the step", "csrc/scale.cuh",
        "double(sign_and_scale(h)) * double(clip", "double(clip",
        "test_nonfinite.py::test_grad_scale_equals_the_unscaled_gradient[cuda-shape0-4-False]",
    ),
    Mutant(
        "found_inf is not heeded by scale", "csrc/scale.cuh",
        "  if (skipped(h)) return;\n  const int32_t matrix", "  const int32_t matrix",
        "test_nonfinite.py::test_found_inf_skips_every_write_where_the_contracted_side_is_cut"
        "[cuda]",
    ),
    Mutant(
        "the first block of a matrix limits it", "csrc/scale.cuh",
        "== unsigned(blocks - 1);", "== 0;",
        "test_cuda_batch.py::test_any_block_of_a_matrix_may_come_last_to_the_limiter[channel]",
    ),
    Mutant(
        "the count of blocks does not turn over", "csrc/scale.cuh",
        "atomicInc(&record.arrived, unsigned(blocks - 1))",
        "atomicInc(&record.arrived, unsigned(blocks))",
        "test_cuda_batch.py::test_any_block_of_a_matrix_may_come_last_to_the_limiter[channel]",
    ),
    Mutant(
        "s of a channel without R is infinite", "csrc/scale.cuh",
        "sqrtf(nn) / (sqrtf(rr) + float(kTiny))", "sqrtf(nn) / sqrtf(rr)",
        "test_extremes.py::test_eps_may_be_zero_where_gradients_are"
        "[cuda-torch.float32-shape5-8-channel]",
    ),
    Mutant(
        "limit adds the first 256 parts", "csrc/scale.cuh",
        "for (int64_t b = threadIdx.x; b < blocks; b += kScaleThreads)",
        "for (int64_t b = threadIdx.x; b < blocks && b < kScaleThreads; b += kScaleThreads)",
        "test_cuda_batch.py::test_more_channels_than_blocks_that_limit_adds_at_once[tensor]",
    ),
    Mutant(
        "alpha is scale itself", "csrc/scale.cuh",
        "float(sqrt(h.scale))", "float(h.scale)",
        "test_cuda_batch.py::test_every_switch_takes_the_steps_of_the_restatement",
    ),
    Mutant(
        "scale_front is forgotten", "csrc/scale.cuh",
        "(h.scale_front ? alpha : 1.0f)", "1.0f",
        "test_rule.py::test_scale_front_puts_alpha_into_the_stored_norm[cuda]",
    ),
    Mutant(
        "disable_nl is forgotten", "csrc/scale.cuh",
        "if (ok && !h.disable_nl) {", "if (ok) {",
        "test_rule.py::test_disable_nl_lets_the_norm_grow_and_leaves_it_unset[cuda]",
    ),
    Mutant(
        "the norm may grow by two percent", "csrc/scale.cuh",
        "/ kGrowth", "/ 1.02f",
        "test_rule.py::test_the_norm_of_the_update_grows_by_at_most_one_percent[cuda]",
    ),
    Mutant(
        "a norm of zero holds the next update", "csrc/scale.cuh",
        "if (previous >= kLeast) factor", "if (previous >= 0.0f) factor",
        "test_rule.py::test_a_zero_first_gradient_does_not_freeze_the_parameter[cuda]",
    ),
    Mutant(
        "a bad update is taken", "csrc/scale.cuh",
        "const bool ok = finite(float(u2)) && finite(u);", "const bool ok = true;",
        "test_cuda_batch.py::test_a_bad_gradient_keeps_weight_and_norm_but_counts_the_step"
        "[False-8-nan]",
    ),
    Mutant(
        "every matrix advances the step", "csrc/apply.cuh",
        "threadIdx.x == 0 && (p.flags & kLeads)", "threadIdx.x == 0",
        "test_cuda_batch.py::test_expert_matrices_share_a_step_that_one_of_them_advances[False]",
    ),
    Mutant(
        "every update counts as limited", "csrc/scale.cuh",
        "if (factor < 1.0f) atomicAdd", "if (factor <= 1.0f) atomicAdd",
        "test_cuda_batch.py::test_the_limiter_holds_a_sudden_growth",
    ),
    Mutant(
        "weights' offsets in 32 bits", "csrc/apply.cuh",
        "static_cast<W*>(p.weight) + at.row * p.weight_ld",
        "static_cast<W*>(p.weight) + int(at.row * p.weight_ld)",
        "test_kernels.py::test_offsets_beyond_two_to_the_31[std-True-1]",
    ),
    Mutant(
        "found_inf is not heeded by apply", "csrc/apply.cuh",
        "  if (skipped(launch.hyper)) return;\n", "",
        "test_cuda_batch.py::test_found_inf_skips_every_write[False]",
    ),
    Mutant(
        "columns take the first one's s", "csrc/apply.cuh",
        "of_all : coefficients[e]", "of_all : coefficients[0]",
        "test_cuda_batch.py::test_every_rank_class_and_orientation_takes_the_steps_of_the"
        "_restatement[False-False]",
    ),
    Mutant(
        "a thread stays in its row", "csrc/apply.cuh",
        "      weight += weight_stride;\n", "",
        "test_kernels.py::test_gradients_lie_in_memory_in_any_order[2-torch.float32-rows]",
    ),
    Mutant(
        "columns take the bits of rows", "csrc/weights.cuh",
        "half(w, row_major ? inner + e : outer)", "half(w, inner + e)",
        "test_cuda_batch.py::test_weights_are_rounded_by_the_contracts_bits[columns]",
    ),
    Mutant(
        "halves of a random word change places", "csrc/weights.cuh",
        "(l & 1 ? 16 : 0)", "(l & 1 ? 0 : 16)",
        "test_cuda_batch.py::test_weights_are_rounded_by_the_contracts_bits[rows]",
    ),
    Mutant(
        "the largest weights are rounded by chance", "csrc/weights.cuh",
        "0x7F7F0000u", "0x7F800000u",
        "test_stochastic_rounding.py::test_the_largest_numbers_are_not_rounded_up_to_infinity"
        "[cuda-1.0]",
    ),
    Mutant(
        "bits of the step before", "csrc/weights.cuh",
        "uint32_t(record.t)", "uint32_t(record.t - 1)",
        "test_cuda_batch.py::test_weights_are_rounded_by_the_contracts_bits[rows]",
    ),
    Mutant(
        "half of the key rounds", "csrc/weights.cuh",
        "uint32_t(p.key >> 32)", "0u",
        "test_stochastic_rounding.py::test_every_back_end_rounds_as_the_specification_does"
        "[cuda-std-shape0-rows]",
    ),
    Mutant(
        "int8 takes the random bits of bf16", "csrc/weights.cuh",
        "outer, step, kRoundingInt8}}", "outer, step, kRounding}}",
        "test_quantized.py::test_the_step_is_the_contracts[cuda-4-std-shape0]",
    ),
    Mutant(
        "int8 beside wide gradients takes half of each call", "csrc/weights.cuh",
        "N < 8 ? inner % 8 : 0", "0",
        "test_quantized.py::test_equal_updates_give_equal_codes_to_the_last_bit[cuda-1.0]",
    ),
    Mutant(
        "int8 groups are half as wide as their grids", "csrc/weights.cuh",
        "int lanes = kGroup / N / 2;", "int lanes = kGroup / N / 4;",
        "test_quantized.py::test_a_group_goes_far_beyond_its_old_range_and_comes_back[cuda]",
    ),
    Mutant(
        "what lies beyond an int8 row widens its range", "csrc/weights.cuh",
        "      if (e >= n) y[e] = 0.0f;\n", "      if (e > n + N) y[e] = 0.0f;\n",
        "test_quantized.py::test_the_step_is_the_contracts[cuda-4-std-shape3]",
    ),
    Mutant(
        "an int8 NaN is taken", "csrc/weights.cuh",
        "y[e] = y[e] == y[e] ? fminf(", "y[e] = e >= 0 ? fminf(",
        "test_quantized.py::test_an_update_that_is_nan_keeps_its_weight[cuda]",
    ),
    Mutant(
        "infinite int8 weights have no code", "csrc/weights.cuh",
        "fabsf(y[e]) <= kLargest);", "y[e] == y[e]);",
        "test_quantized.py::test_equal_updates_give_equal_codes_to_the_last_bit[cuda-3e+37]",
    ),
    Mutant(
        "an int8 grid is stored by no lane", "csrc/weights.cuh",
        "if (next != grid && inner % kGroup == 0 && n > 0)", "if (next == grid && inner < 0)",
        "test_quantized.py::test_equal_updates_give_equal_codes_to_the_last_bit[cuda-1.0]",
    ),
    Mutant(
        "int8 grids are never refined", "csrc/int8.cuh",
        "if (inside && 2.0f * scale_of(fresh) >= scale_of(grid))", "if (inside)",
        "test_quantized.py::test_a_group_goes_far_beyond_its_old_range_and_comes_back[cuda]",
    ),
    Mutant(
        "quotients of int8 weights are not corrected", "csrc/int8.cuh",
        "fmaf(fmaf(-quotient, scale, w), reciprocal, quotient) + zero", "quotient + zero",
        "test_quantized.py::test_equal_updates_give_equal_codes_to_the_last_bit[cuda-1.0]",
        argued="the emulated reciprocal is rounded correctly, so a quotient errs by one bit, which "
        "moves few codes, and none of this test",
    ),
    Mutant(
        "int8 scales near 0 are not lifted", "csrc/int8.cuh",
        "scale_of(grid) < 0x1p-64f ? 0x1p64f : 1.0f", "1.0f",
        "test_quantized.py::test_equal_updates_give_equal_codes_to_the_last_bit[cuda-1e-35]",
    ),
    Mutant(
        "int8 rows and columns change places under AdamW", "csrc/adamw.cuh",
        "return row + (column + i) / columns;", "return row + (column + i) % columns;",
        "test_quantized.py::test_equal_updates_give_equal_codes_to_the_last_bit[cuda-1.0]",
    ),
    Mutant(
        "tiles of apply cut int8 groups", "csrc/plan.cpp",
        "weight_dtype_ == kInt8 ? kGroup / vector : 1", "1",
        "test_quantized.py::test_the_step_is_the_contracts[cuda-4-std-shape3]",
    ),
    Mutant(
        "lanes leave before their int8 group is done", "csrc/apply.cuh",
        "      at.beyond = first >= at.inner;\n", "",
        "test_quantized.py::test_the_step_is_the_contracts[cuda-4-std-shape0]",
    ),
    Mutant(
        "rows beyond the end leave an int8 warp", "csrc/apply.cuh",
        "if (!kInGroups<W>) return;", "return;",
        "test_quantized.py::test_the_step_is_the_contracts[cuda-4-std-shape0]",
    ),
    Mutant(
        "an int8 warp is whole though its lanes reach beyond", "csrc/apply.cuh",
        "      at.whole = at.whole && first + N * lanes <= at.inner;\n", "",
        "test_quantized.py::test_the_step_is_the_contracts[cuda-4-std-shape5]",
    ),
    Mutant(
        "dense parameters forget clip", "csrc/adamw.cuh",
        "sign_and_scale(h) * clip_factor(h)", "sign_and_scale(h)",
        "test_cuda_batch.py::test_dense_parameters_follow_the_low_rank_rule_without_a_projection"
        "[0.25]",
    ),
    Mutant(
        "dense parameters forget grad_scale and maximize", "csrc/adamw.cuh",
        "sign_and_scale(h) * clip_factor(h)", "clip_factor(h)",
        "test_nonfinite.py::test_grad_scale_equals_the_unscaled_gradient[cuda-shape3-4-False]",
    ),
    Mutant(
        "found_inf is not heeded by adamw", "csrc/adamw.cuh",
        "  if (skipped(h)) return;\n", "",
        "test_cuda_batch.py::test_found_inf_skips_every_write[False]",
    ),
    Mutant(
        "found_inf is not heeded by advance", "csrc/adamw.cuh",
        "  if (skipped(launch.hyper)) return;\n", "",
        "test_cuda_batch.py::test_found_inf_skips_every_write[False]",
    ),
    Mutant(
        "one bad dense step counts for ever", "csrc/adamw.cuh",
        "  launch.bad[i] = 0;\n", "",
        "test_nonfinite.py::test_the_run_goes_on_after_a_bad_step[cuda-nan-shape1]",
    ),
    Mutant(
        "every block of a dense parameter walks the first", "csrc/adamw.cuh",
        "(int64_t(blockIdx.x) - p.first_block) * kDenseElements", "int64_t(0)",
        "test_dense.py::test_a_dense_parameter_of_many_tiles_follows_the_rule"
        "[cuda-torch.float32]",
    ),
    Mutant(
        "a bad dense element keeps its neighbours", "csrc/adamw.cuh",
        "          if (finite(x[e] * x[e])) step(e);\n", "",
        "test_cuda_batch.py::test_a_dense_element_whose_square_is_not_finite_keeps_weight_and"
        "_moments[20000]",
    ),
    Mutant(
        "a bad dense element is taken", "csrc/adamw.cuh",
        "usual = usual && finite(x[e] * x[e]);", "usual = usual && e >= 0;",
        "test_cuda_batch.py::test_a_dense_element_whose_square_is_not_finite_keeps_weight_and"
        "_moments[20000]",
    ),
    Mutant(
        "M and V of int8 moments change bits", "csrc/moments.cuh",
        "SIGNED ? drawn.w[e] & 0xFFFFu : drawn.w[e] >> 16",
        "SIGNED ? drawn.w[e] >> 16 : drawn.w[e] & 0xFFFFu",
        "test_dense_state.py::test_one_step_from_nothing_is_the_contract_s[cuda-int8]",
    ),
    Mutant(
        "a unit of int8 moments follows at once", "csrc/moments.cuh",
        "fresh + (1u << 23) >= unit", "fresh >= unit",
        "test_cuda_batch.py::test_narrow_moments_are_float32_ones_rounded_as_the_specification_has_it"
        "[int8-torch.float32-torch.float32]",
    ),
    Mutant(
        "a small V in int8 becomes 0", "csrc/moments.cuh",
        "return x > 0.0f && code == 0 ? 1u : code;", "return code;",
        "test_dense_state.py::test_a_small_second_moment_never_becomes_zero[cuda]",
    ),
    Mutant(
        "bf16 moments are rounded up to infinity", "csrc/moments.cuh",
        "fminf(vv[e], kLargestMoment)", "vv[e]",
        "test_dense_state.py::test_the_largest_gradients_leave_finite_numbers"
        "[cuda-(0.0, 0.0)-0.0-bfloat16]",
    ),
    Mutant(
        "int8 moments have no code for their largest", "csrc/moments.cuh",
        "if (highest > __float_as_uint(kLargestMoment))", "if (highest == 0xFFFFFFFFu)",
        "test_dense_state.py::test_the_largest_gradients_leave_finite_numbers"
        "[cuda-(0.0, 0.0)-0.0-int8]",
    ),
    Mutant(
        "the largest of a block of moments is a lane's own", "csrc/moments.cuh",
        "__reduce_max_sync(0xFFFFFFFFu, __float_as_uint(own))", "__float_as_uint(own)",
        "test_dense_state.py::test_one_step_from_nothing_is_the_contract_s[cuda-int8]",
    ),
    Mutant(
        "lanes leave before their block of moments is done", "csrc/adamw.cuh",
        "kInGroups<M> ? N * int(threadIdx.x % 32) : 0", "0",
        "test_cuda_batch.py::test_narrow_moments_are_float32_ones_rounded_as_the_specification_has_it"
        "[int8-torch.float32-torch.float32]",
    ),
    Mutant(
        "narrow moments share launches with float32 ones", "apollo_kernels/cuda.py",
        "item.grad.dtype, item.exp_avg.dtype", "item.grad.dtype",
        "test_cuda_batch.py::test_narrow_moments_are_taken_where_they_lie_as_they_are_counted",
    ),
    Mutant(
        "a tile of apply is whole though rows are missing", "csrc/apply.cuh",
        "row + rows <= at.outer", "row < at.outer",
        "test_cuda_batch.py::test_tiles_of_every_width_meet_their_ends[rows-torch.float32]",
    ),
    Mutant(
        "a tile of apply is whole though rows end within a vector", "csrc/apply.cuh",
        "at.inner % N == 0 && row", "row",
        "test_cuda_batch.py::test_tiles_of_every_width_meet_their_ends[rows-torch.float32]",
    ),
    Mutant(
        "tiles of apply lie side by side only", "csrc/apply.cuh",
        "tile / across * rows", "0 * rows",
        "test_cuda_batch.py::test_tiles_of_every_width_meet_their_ends[rows-torch.float32]",
    ),
    Mutant(
        "R lies on top of q", "csrc/plan.cpp",
        "      m.r += r;\n", "      m.r += q;\n",
        "test_cuda_batch.py::test_every_rank_class_and_orientation_takes_the_steps_of_the"
        "_restatement[True-False]",
    ),
    Mutant(
        "parts of a matrix run into the next one's", "csrc/plan.cpp",
        "parts_size_ += 3 * kDoubleFloats * most;", "parts_size_ += 2 * most;",
        "test_cuda_batch.py::test_any_block_of_a_matrix_may_come_last_to_the_limiter[tensor]",
    ),
    Mutant(
        "a chunk begins within a run of signs", "csrc/plan.cpp",
        "ceil_div(ceil_div(k, chunks), 512) * 512", "ceil_div(ceil_div(k, chunks), 8) * 8",
        "test_kernels.py::test_a_long_contracted_side_is_split_and_summed[torch.float32-16]",
    ),
    Mutant(
        "a cut matrix is not summed", "csrc/plan.cpp",
        "separate_ || (later && !sparse) || t.chunks > 1",
        "separate_ || (uses_dots(ranks) && !sparse)",
        "test_kernels.py::test_a_long_contracted_side_is_split_and_summed[torch.float32-16]",
    ),
    Mutant(
        "separate is forgotten", "csrc/plan.cpp",
        "separate_ || (later && !sparse) || t.chunks > 1",
        "(uses_dots(ranks) && !sparse) || t.chunks > 1",
        "test_cuda_batch.py::test_clip_multiplies_r_and_q_and_the_step[8]",
    ),
    Mutant(
        "all gradients move to the first address", "csrc/plan.cpp",
        "reinterpret_cast<void*>(addresses[i])", "reinterpret_cast<void*>(addresses[0])",
        "test_cuda_batch.py::test_gradients_that_move_are_followed[False]",
    ),
    Mutant(
        "a map ends where the row after the next begins", "csrc/plan.cpp",
        "i + 1 < rows.size() ? rows[i + 1].*first", "i + 1 < rows.size() ? rows[i].*first + 1",
        "test_cuda_batch.py::test_every_rank_class_and_orientation_takes_the_steps_of_the"
        "_restatement[True-False]",
    ),
    Mutant(
        "scale takes the map of apply", "csrc/plan.cpp",
        "map = map_begin(hyper.distribution) + of.project_blocks", "0",
        "test_cuda_batch.py::test_every_rank_class_and_orientation_takes_the_steps_of_the"
        "_restatement[True-False]",
    ),
    Mutant(
        "the head of a part is left out of R", "csrc/plan.cpp",
        "m.chunks = chunks + heads;",
        "m.chunks = chunks;",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[cuda-rademacher-8-1]",
    ),
    Mutant(
        "the head's k are counted from the part's first", "csrc/project_head.cuh",
        "const uint32_t k0 = first / block * block;",
        "const uint32_t k0 = first;",
        "test_parts.py::test_parts_draw_the_numbers_of_the_whole_bit_for_bit[cuda-gaussian-8-0]",
    ),
    Mutant(
        "the head's signs of the block before", "csrc/project_head.cuh",
        "RowSigns<1>{numbers, j}.get(sign, k0 / rank);",
        "RowSigns<1>{numbers, j}.get(sign, k0 / rank - 1);",
        "test_parts.py::test_parts_draw_the_numbers_of_the_whole_bit_for_bit[cuda-sparse-12-0]",
    ),
    Mutant(
        "a part begins with its first k, not with a block", "csrc/plan.cpp",
        "std::min(ceil_div(m.k_first, block) * block, m.k_end)",
        "m.k_first",
        "test_parts.py::test_parts_draw_the_numbers_of_the_whole_bit_for_bit[cuda-gaussian-8-1]",
    ),
    Mutant(
        "X is not counted from the whole's first k", "csrc/plan.cpp",
        "uintptr_t(m.k_first * stride * size_of(grad_dtype_))",
        "uintptr_t(0 * stride * size_of(grad_dtype_))",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[cuda-rademacher-8-1]",
    ),
    Mutant(
        "owners are sent the first chunk alone", "csrc/parts.cuh",
        "here && i < p.chunks; ++i",
        "here && i < 1; ++i",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[cuda-rademacher-8-0]",
    ),
    Mutant(
        "owners are sent q of the first chunk alone", "csrc/parts.cuh",
        "here && i < p.q_rows; ++i",
        "here && i < 1; ++i",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[cuda-rademacher-8-0]",
    ),
    Mutant(
        "every matrix has the first one's norms", "csrc/parts.cuh",
        "launch.norms[count * i + n]",
        "launch.norms[n]",
        "test_parts.py::test_parts_take_every_kind_of_step[cuda-tensor-None-False]",
    ),
    Mutant(
        "all owners' scales are the first one's", "csrc/plan.cpp",
        "there / own.share * own_.s_size + own.s",
        "own.s",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[cuda-rademacher-8-1]",
    ),
    Mutant(
        "R that an owner was sent is read by 16 bytes anywhere", "csrc/scale.cuh",
        "aligned<4>(r_of(p, launch, 0), p.rank)",
        "true",
        "test_parts.py::test_parts_take_every_kind_of_step[cuda-channel-None-True]",
        argued="g++ makes of it loads that may lie anywhere; a card faults, and UBSan complains",
    ),
    Mutant(
        "a part's rounding begins at row 0", "csrc/weights.cuh",
        "return {uint32_t(p.row), uint32_t(p.column)};",
        "return {0, uint32_t(p.column)};",
        "test_parts.py::test_parts_are_rounded_by_their_place_in_the_whole[cuda-ends0-0-False]",
    ),
    Mutant(
        "a part's rounding begins at column 0", "csrc/weights.cuh",
        "return {uint32_t(p.row), uint32_t(p.column)};",
        "return {uint32_t(p.row), 0};",
        "test_parts.py::test_parts_are_rounded_by_their_place_in_the_whole[cuda-ends6-1-False]",
    ),
    Mutant(
        "a row that begins within a call is rounded by eights", "csrc/weights.cuh",
        "by_eights(row_major && p.column % 8 == 0)",
        "by_eights(row_major)",
        "test_parts.py::test_parts_are_rounded_by_their_place_in_the_whole[cuda-ends6-1-False]",
    ),
    Mutant(
        "a dense part's moments are rounded as the whole's first", "csrc/moments.cuh",
        "call(uint64_t(p.first + begin) / 4)",
        "call(uint64_t(begin) / 4)",
        "test_parts.py::test_a_dense_part_rounds_its_moments_by_their_number_in_the_whole[cuda-dtype0]",
    ),
]

TRITON = [
    Mutant(
        "maximize is forgotten", "triton/adamw.py",
        "(-1.0 if hyper.maximize else 1.0)", "1.0",
        "test_triton_batch.py::test_a_step_of_every_rank_and_orientation"
        "[torch.float32-tensor-True]",
    ),
    Mutant(
        "M as m + (1 - b1) (g - m)", "triton/adamw.py",
        "tl.fma(g, w1, b1 * m)", "m + w1 * (g - m)",
        "test_triton_batch.py::test_moments_forget_at_once_with_beta_zero[fused]",
    ),
    Mutant(
        "finite asked of the gradient, not of its square", "triton/adamw.py",
        "good = finite(g2)", "good = finite(g)",
        "test_triton_batch.py::test_an_entry_whose_square_overflows_keeps_its_moments",
    ),
    Mutant(
        "0 / 0 without eps", "triton/adamw.py",
        "m / tl.where(some, denominator, 1.0), some", "m / denominator, denominator == denominator",
        "test_triton_batch.py::test_without_eps_n_is_zero_where_nothing_was_ever_seen",
    ),
    Mutant(
        "eps under the root", "triton/adamw.py",
        "tl.sqrt(v) + eps", "tl.sqrt(v + eps)",
        "test_dense.py::test_eps_is_as_strong_at_the_first_step_as_later[triton]",
    ),
    Mutant(
        "lr in a tensor is not read", "triton/adamw.py",
        "tl.full((), tl.load(lr_at), F64)", "tl.full((), lr, F64)",
        "test_triton_kernels.py::test_a_rate_in_a_tensor_is_read_on_the_device",
    ),
    Mutant(
        "bias correction in float32", "triton/adamw.py",
        "1.0 - tl.exp(t.to(F64) * log_b)", "(1.0 - tl.exp((t.to(F64) * log_b).to(F32))).to(F64)",
        "test_extremes.py::test_bias_corrections_are_right_to_the_last_bits"
        "[triton-(0.9, 0.999)-1-8]",
    ),
    Mutant(
        "the parts of decay differ in sign", "triton/adamw.py",
        "(high.to(F64) >= keep)", "(high.to(F64) > 2.0)",
        "test_triton_batch.py::test_an_infinite_weight_stays_infinite[False-torch.float32]",
    ),
    Mutant(
        "a small decay is lost", "triton/adamw.py",
        "tl.fma(w, tl.broadcast_to(high, w.shape), w * low)", "w * high",
        "test_triton_batch.py::test_decay_is_one_rounding_away_from_exact[0.001-0.0001]",
    ),
    Mutant(
        "a second bad dense step counts as good", "triton/adamw.py",
        "    tl.store(bad + number, 0)\n", "",
        "test_nonfinite.py::test_a_dense_parameter_counts_once_however_many_of_its_elements_are_bad"
        "[triton]",
    ),
    Mutant(
        "every bad tile is counted", "triton/adamw.py",
        "(tl.atomic_xchg(bad + number, 1) == 0).to(tl.int64)",
        "tl.full((), 1, tl.int64)",
        "test_nonfinite.py::test_a_dense_parameter_counts_once_however_many_of_its_elements_are_bad"
        "[triton]",
    ),
    Mutant(
        "words of narrow moments change places", "triton/philox.py",
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
        "test_dense_state.py::test_one_step_from_nothing_is_the_contract_s[triton-bfloat16]",
    ),
    Mutant(
        "M and V of narrow moments change bits", "triton/philox.py",
        "return w & 0xFFFF, w >> 16", "return w >> 16, w & 0xFFFF",
        "test_dense_state.py::test_one_step_from_nothing_is_the_contract_s[triton-int8]",
    ),
    Mutant(
        "a unit of int8 moments follows at once", "triton/moments.py",
        "(2 * fresh >= unit)", "(fresh >= unit)",
        "test_dense_state.py::test_every_back_end_stores_what_the_specification_does"
        "[triton-torch.float32-int8]",
    ),
    Mutant(
        "a small V in int8 becomes 0", "triton/moments.py", "tl.maximum(q, 1)", "q",
        "test_dense_state.py::test_a_small_second_moment_never_becomes_zero[triton]",
    ),
    Mutant(
        "narrow moments are rounded up to infinity", "triton/moments.py",
        "tl.minimum(tl.maximum(x, -LARGEST), LARGEST)", "x",
        "test_dense_state.py::test_the_largest_gradients_leave_finite_numbers"
        "[triton-(0.0, 0.0)-0.0-bfloat16]",
    ),
    Mutant(
        "blocks of int8 moments reach into the next row", "apollo_kernels/moments.py",
        "and (item.units is None or whole)", "",
        "test_dense_state.py::test_every_back_end_stores_what_the_specification_does"
        "[triton-torch.float32-int8]",
    ),
    Mutant(
        "found_inf leaves the record of the step before", "triton/adamw.py",
        "    tl.store(record, 0.0)  # no tile writes anything, unless the end is reached\n", "",
        "test_nonfinite.py::test_found_inf_skips_every_write[triton-1.0-None-(5,)-{}]",
    ),
    Mutant(
        "dense parameters forget clip", "triton/adamw.py",
        "widen(tl.load(g_at, mask=inside, other=0)) * gradient_factor(direction, grad_scale, clip)",
        "widen(tl.load(g_at, mask=inside, other=0)) * gradient_factor(direction, grad_scale, None)",
        "test_triton_batch.py::test_the_dense_rule_is_the_low_rank_one_without_a_projection"
        "[torch.float32-True]",
    ),
    Mutant(
        "float32 in two pieces", "triton/project.py",
        "part = tl.dot(z, to_bf16(rest - middle.to(tl.float32)), input_precision=\"ieee\")",
        "part = tl.zeros_like(acc)",
        "test_extremes.py::test_every_bit_of_a_gradient_reaches_the_moments"
        "[triton-torch.float32-shape0-8]",
    ),
    Mutant(
        "the epoch of a step cut to 32 bits", "triton/project.py",
        "step // gap", "(step & 0xFFFFFFFF) // gap",
        "test_extremes.py::test_steps_are_counted_beyond_what_float32_holds[triton-8-4294967301-3]",
    ),
    Mutant(
        "K is read beyond its end", "triton/project.py",
        "inside = k0 + k < size", "inside = k0 + k >= 0",
        "test_triton_kernels.py::test_strides_and_offsets[contiguous-rows of a wider matrix]",
    ),
    Mutant(
        "a chunk begins at the first k", "triton/project.py",
        "begin = (chunk * length).to(tl.int32)", "begin = (chunk * 0).to(tl.int32)",
        "test_triton_kernels.py::test_a_long_contracted_side_is_cut_into_chunks[True-8-rademacher]",
    ),
    Mutant(
        "q of every chunk in the first one's place", "triton/project.py",
        " + chunk * channels.to(tl.int64) + c\n", " + c\n",
        "test_triton_kernels.py::test_a_long_contracted_side_is_cut_into_chunks[True-8-rademacher]",
    ),
    Mutant(
        "found_inf is not heeded by project", "triton/project.py",
        "    if not STORE:  # noqa", "    if STORE and not STORE:  # noqa",
        "test_nonfinite.py::test_found_inf_skips_every_write[triton-1.0-None-(24, 16)-{'rank': 8}]",
    ),
    Mutant(
        "project forgets grad_scale", "triton/project.py",
        "gradient_factor(direction, grad_scale, None)", "gradient_factor(direction, None, None)",
        "test_nonfinite.py::test_grad_scale_equals_the_unscaled_gradient[triton-shape2-8-False]",
    ),
    Mutant(
        "all rank tiles draw the first one's rows", "triton/project.py",
        "draw(key, epoch, r_tile * BR, k0,", "draw(key, epoch, r_tile * 0, k0,",
        "test_triton_kernels.py::test_the_tiles_of_wide_ranks[False]",
    ),
    Mutant(
        "halves of a random word change places", "triton/philox.py",
        "tl.join(w & 0xFFFF, w >> 16)", "tl.join(w >> 16, w & 0xFFFF)",
        "test_triton_kernels.py::test_stochastic_rounding_takes_the_contract_s_bits"
        "[row-major-True]",
    ),
    Mutant(
        "found_inf is not heeded by combine", "triton/scale.py",
        "    if tables.is_skipped(found_inf):\n        return\n    row, _, tile",
        "    row, _, tile",
        "test_nonfinite.py::test_found_inf_skips_every_write_where_the_contracted_side_is_cut"
        "[triton]",
    ),
    Mutant(
        "found_inf is not heeded by limit", "triton/scale.py",
        "unless the end is reached\n    if tables.is_skipped(found_inf):",
        "unless the end is reached\n    if False:",
        "test_triton_batch.py::test_found_inf_writes_nothing[fused]",
    ),
    Mutant(
        "clip does not reach R", "triton/scale.py",
        "    factor = gradient_factor(direction, grad_scale, clip)\n    if not SPARSE:",
        "    factor = gradient_factor(direction, grad_scale, None)\n    if not SPARSE:",
        "test_triton_batch.py::test_clip_and_grad_scale_act_on_r_and_q_and_the_step",
    ),
    Mutant(
        "clip does not reach q and the step", "triton/scale.py",
        "    factor = gradient_factor(direction, grad_scale, clip)\n\n",
        "    factor = gradient_factor(direction, grad_scale, None)\n\n",
        "test_triton_batch.py::test_clip_and_grad_scale_act_on_r_and_q_and_the_step",
    ),
    Mutant(
        "clip^2 before q", "triton/scale.py",
        "u2 += raw * (raw * _total(q_at, c, channels, q_parts))",
        "u2 += (raw * raw) * _total(q_at, c, channels, q_parts)",
        "test_clipping.py::test_a_clip_whose_square_vanishes_in_float32_is_no_zero"
        "[triton-8-channel]",
    ),
    Mutant(
        "squares of a tensor added in float32", "triton/scale.py",
        "n2 += _total(n2_at, c, channels, r_tiles).to(F64)\n",
        "n2 += _total(n2_at, c, channels, r_tiles).to(F64)\n"
        "        r2 = tl.sum(r2, 0).to(F32).to(F64) + tl.zeros((BLOCK,), F64)\n",
        "test_triton_batch.py::test_tensor_scaling_takes_gradients_of_2e18[fused]",
    ),
    Mutant(
        "a norm of zero holds the next update", "triton/scale.py",
        "tl.where(previous < TINY, 1.0, 1.0 / growth)", "1.0 / growth",
        "test_rule.py::test_a_zero_first_gradient_does_not_freeze_the_parameter[triton]",
    ),
    Mutant(
        "a bad update is taken", "triton/scale.py",
        "    if finite(u):\n", "    if True:\n",
        "test_nonfinite.py::test_a_bad_first_step_leaves_the_limiter_unset[triton-nan]",
    ),
    Mutant(
        "every matrix advances the step", "triton/scale.py",
        "if tl.load(row + tables.LOW_RANK.leads) != 0:", "if True:",
        "test_triton_batch.py::test_expert_matrices_share_a_step_that_one_of_them_advances"
        "[fused-0]",
    ),
    Mutant(
        "alpha is scale itself", "triton/scale.py",
        "math.sqrt(hyper.scale)", "hyper.scale + 0.0",
        "test_triton_batch.py::test_a_step_of_every_rank_and_orientation"
        "[torch.float32-channel-False]",
    ),
    Mutant(
        "disable_nl is forgotten", "triton/scale.py",
        "not hyper.disable_nl", "True",
        "test_triton_batch.py::test_the_limiter_s_counter_and_switches",
    ),
    Mutant(
        "the norm may grow by two percent", "triton/scale.py",
        "/ GROWTH, 1.0)", "/ 1.02, 1.0)",
        "test_rule.py::test_the_norm_of_the_update_grows_by_at_most_one_percent[triton]",
    ),
    Mutant(
        "every update counts as limited", "triton/scale.py",
        "(limit_factor < 1.0)", "(limit_factor <= 1.0)",
        "test_triton_batch.py::test_the_limiter_s_counter_and_switches",
    ),
    Mutant(
        "scale_front is forgotten", "triton/scale.py",
        "u *= alpha\n\n", "u *= 1.0\n\n",
        "test_rule.py::test_scale_front_puts_alpha_into_the_stored_norm[triton]",
    ),
    Mutant(
        "columns' bits are not turned", "triton/apply.py",
        "bits = tl.trans(bits)", "bits = tl.reshape(bits, (BC, BK))",
        "test_triton_kernels.py::test_stochastic_rounding_takes_the_contract_s_bits"
        "[row-major-False]",
    ),
    Mutant(
        "weights beyond the end of K are written", "triton/apply.py",
        "(by_c < channels) & (by_k < size)", "(by_c < channels) & (by_k >= 0)",
        "test_triton_kernels.py::test_strides_and_offsets[rows of a wider matrix-contiguous]",
    ),
    Mutant(
        "bits of the step before", "triton/apply.py",
        "tl.load(clock + number)", "tl.load(clock + number) - 1",
        "test_triton_kernels.py::test_stochastic_rounding_takes_the_contract_s_bits"
        "[row-major-True]",
    ),
    Mutant(
        "int8 takes the bits of bf16", "triton/apply.py",
        "i0, l0, M, N, ROUNDING_INT8)", "i0, l0, M, N)",
        "test_quantized.py::test_the_step_is_the_contracts[triton-4-std-shape0]",
    ),
    Mutant(
        "an int8 grid is never renewed", "triton/int8.py",
        "tl.where(inside & (2 * fresh_scale >= scale), grid, fresh)", "grid",
        "test_quantized.py::test_the_step_is_the_contracts[triton-4-std-shape3]",
    ),
    Mutant(
        "what lies beyond an int8 row widens its range", "triton/int8.py",
        "new = tl.where(inside, tl.minimum(tl.maximum(new, -LARGEST), LARGEST), 0.0)",
        "new = tl.minimum(tl.maximum(new, -LARGEST), LARGEST)",
        "test_quantized.py::test_the_step_is_the_contracts[triton-4-std-shape3]",
    ),
    Mutant(
        "int8 rows and calls are swapped under AdamW", "triton/philox.py",
        "c0, i = (call % per_row).to(tl.uint32), (call // per_row).to(tl.uint32)",
        "c0, i = (call // per_row).to(tl.uint32), (call % per_row).to(tl.uint32)",
        "test_quantized.py::test_the_step_is_the_contracts[triton-None-std-shape4]",
    ),
    Mutant(
        "the largest weights are rounded by chance", "triton/element.py",
        "(raw & 0x7FFFFFFF) < 0x7F7F0000", "(raw & 0x7FFFFFFF) < 0x7F800000",
        "test_stochastic_rounding.py::test_the_largest_numbers_are_not_rounded_up_to_infinity"
        "[triton-1.0]",
    ),
    Mutant(
        "offsets in 32 bits", "triton/table.py",
        "    x = tl.load(row + COLUMN)\n", "    x = tl.load(row + COLUMN).to(tl.int32)\n",
        "test_triton_kernels.py::test_offsets_beyond_two_to_the_31",
    ),
    Mutant(
        "a gradient of another alignment is followed", "triton/table.py",
        "if self._alignment(addresses) != self._aligned:", "if False:",
        "test_triton_batch.py::test_gradients_move[low-rank]",
    ),
    Mutant(
        "every row of a batch leads", "triton/step.py",
        "leads=int(item.leads)", "leads=1",
        "test_triton_batch.py::test_expert_matrices_share_a_step_that_one_of_them_advances"
        "[separate-0]",
    ),
    Mutant(
        "what lies before a part is read", "triton/project.py",
        "            inside &= k0 + k >= first\n",
        "            inside &= k0 + k >= 0\n",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[triton-rademacher-72-1]",
    ),
    Mutant(
        "what lies before a part is read by a sparse projection", "triton/sparse.py",
        "inside &= k0 + unit >= k_first",
        "inside &= k0 + unit >= 0",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[triton-sparse-8-1]",
    ),
    Mutant(
        "a part begins with block 0", "triton/project.py",
        "begin += tables.load_number(row, tables.LOW_RANK.k_begin, True).to(tl.int32)",
        "begin += 0",
        "test_parts.py::test_parts_draw_the_numbers_of_the_whole_bit_for_bit[triton-gaussian-8-0]",
    ),
    Mutant(
        "owners' q goes to the first one", "triton/scale.py",
        "tl.store(to + tl.load(row + tables.LOW_RANK.sent_q) + c % share, q, mask=wanted)",
        "tl.store(sent + tl.load(row + tables.LOW_RANK.sent_q) + c % share, q, mask=wanted)",
        "test_parts.py::test_parts_of_the_contracted_side_take_the_step_of_the_whole[triton-sparse-8-1]",
    ),
    Mutant(
        "|R|^2 of one rank", "triton/scale.py",
        "r2, n2 = tl.load(norms + 3 * number), tl.load(norms + 3 * number + 1)",
        "r2, n2 = tl.load(norms), tl.load(norms + 1)",
        "test_parts.py::test_parts_take_every_kind_of_step[triton-tensor-None-True]",
    ),
    Mutant(
        "a part's rounding begins at row 0", "triton/apply.py",
        "i0 += tl.load(row + tables.LOW_RANK.row).to(tl.int32)\n            l0",
        "l0",
        "test_parts.py::test_parts_are_rounded_by_their_place_in_the_whole[triton-ends10-0-False]",
    ),
    Mutant(
        "a part's rounding begins at column 0", "triton/apply.py",
        "l0 += tl.load(row + tables.LOW_RANK.column).to(tl.int32)",
        "l0 += 0",
        "test_parts.py::test_parts_are_rounded_by_their_place_in_the_whole[triton-ends8-1-False]",
    ),
    Mutant(
        "a dense part's moments are rounded as the whole's first", "triton/adamw.py",
        "first += tl.load(row + tables.DENSE.first)",
        "first += 0",
        "test_parts.py::test_a_dense_part_rounds_its_moments_by_their_number_in_the_whole[triton-dtype3]",
    ),
]
# fmt: on

MUTANTS = [
    mutant._replace(name=f"{group}: {mutant.name}")
    for group, mutants in (("CUDA", CUDA), ("Triton", TRITON))
    for mutant in mutants
]


def changed(mutant: Mutant, tree: Path) -> str:
    """The text of the mutant's file with the change."""
    text = (tree / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1:
        sys.exit(f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}, not once")
    text = text.replace(mutant.old, mutant.new)
    if mutant.file.endswith(".py"):
        compile(text, f"{mutant.file} ({mutant.name})", "exec")  # a test should not fail for that
    return text


class Passed:
    """A plugin of pytest: how many tests have passed, by their ids without parameters too."""

    def __init__(self) -> None:
        self.ids: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" and report.passed:
            self.ids[report.nodeid] += 1
            self.ids[report.nodeid.partition("[")[0]] += 1


def child(tree: Path, tests: list[str], output: Path) -> None:
    """Builds what has changed in a tree and runs tests there. The exit status says what came."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # The package by a link of its own: the root on the path would let triton/ pose as Triton.
    sys.path[:] = [str(tree / "packages"), str(tree / "tests"), *sys.path[1:]]
    os.chdir(tree)
    import emulated
    import pytest

    try:
        emulated.build(flags=["-O1"])
    except Exception as error:
        print(error)
        os._exit(NOT_BUILT)
    plugin = Passed()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-c", str(tree / "pyproject.toml")]
    status = int(pytest.main([*options, *(f"tests/{t}" for t in tests)], plugins=[plugin]))
    if status == 0 and any(f"tests/{t}" not in plugin.ids for t in tests):
        print("nothing ran of", [t for t in tests if f"tests/{t}" not in plugin.ids])
        status = NOTHING_RAN
    sys.stdout.flush()
    os._exit(status)


def run(tree: Path, tests: list[str], longest: float) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and what was said."""
    output = tree / "output.txt"
    process = multiprocessing.get_context("fork").Process(target=child, args=(tree, tests, output))
    process.start()
    process.join(longest)
    if process.is_alive():
        process.kill()
        process.join()
        return None, output.read_text()
    return process.exitcode, output.read_text()


def copy_of(tree: Path, to: Path) -> Path:
    """A copy with the times of the files, by which emulated.build knows what it has to compile."""
    return shutil.copytree(tree, to, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))


def base(to: Path) -> Path:
    to.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            copy_of(ROOT / name, to / name)
        else:
            shutil.copy2(ROOT / name, to / name)
    (to / "packages").mkdir()
    (to / "packages" / "apollo_kernels").symlink_to("../apollo_kernels")
    return to


def verdict(mutant: Mutant, unchanged: Path, folder: Path) -> tuple[str, str]:
    """What became of a mutant, in a word or two, and the output of its test."""
    tree = copy_of(unchanged, folder / "mutant")
    (tree / mutant.file).write_text(changed(mutant, unchanged))
    status, output = run(tree, [mutant.test], LONGEST)
    shutil.rmtree(tree)
    if status is None:
        return "killed (took too long)", output
    if status < 0:
        return f"killed (signal {-status})", output
    if status == 1:
        return "killed", output
    if status == 0:
        return "survived, argued" if mutant.argued else "SURVIVED", output
    return "did not build", output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants, or parts of their names")
    parser.add_argument("--list", action="store_true", help="say what there is and do nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the tests say")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    for mutant in chosen:
        changed(mutant, ROOT)
        if options.list:
            print(f"{mutant.name}\n    {mutant.file}   {mutant.test}")
    if options.list or not chosen:
        sys.exit(not chosen)

    # Before a child is forked: torch and Triton, which take seconds, and where kernels run.
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import triton.language  # noqa: F401

    begin, results = time.monotonic(), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unchanged = base(folder / "unchanged")
        status, output = run(unchanged, sorted({m.test for m in chosen}), 20 * LONGEST)
        if status != 0:
            sys.exit(f"{output}\nThe tests fail without any change (status {status}).")
        print(f"{time.monotonic() - begin:5.1f} s  the tests pass without any change", flush=True)
        for mutant in chosen:
            since = time.monotonic()
            result, output = verdict(mutant, unchanged, folder)
            results[result.partition(" (")[0]] += 1
            print(f"{time.monotonic() - since:5.1f} s  {result}: {mutant.name}", flush=True)
            if options.verbose or result in ("SURVIVED", "did not build"):
                print(output)
    summary = ", ".join(f"{count} {result}" for result, count in results.items())
    print(f"{len(chosen)} mutants in {time.monotonic() - begin:.0f} s: {summary}")
    sys.exit(results["SURVIVED"] + results["did not build"] > 0)


if __name__ == "__main__":
    main()
