"""What the model takes for true of each card, and where it is from.

[guide]  CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; "Compute
         Capabilities".
[sheet]  the vendor's data sheets and whitepapers (A100, Ada, H100, H200): SMs, boost clocks, rates.
[luo]    Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture through
         Microbenchmarking, arXiv 2402.13499: latencies, mma's share of the peak.
[copy]   85 to 92 % of the data sheet, as device-to-device copies reach; bench/roofline.py's.
[fit]    so that the gaussian projection comes out as an H200 has run it (README.md).
[guess]  nobody publishes it; test_sm_model.py shows what it does.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of all cards here, in clocks.
SCHEDULERS = 4  # of an SM, one instruction per clock each [guide]
ALU = 2  # a warp's integer or logic instruction: 64 results per SM and clock [guide]
FMA_PIPE = 2  # a warp on one of the FMA pipes, 16 lanes each [sheet]
WIDE_MULTIPLY = 6  # IMAD.WIDE and IMAD.HI, where IMAD takes 2 [fit]
MUFU = 8  # 16 results per SM and clock [guide]
UNIFORM = 2  # the uniform data path [guess]
UNIFORM_LATENCY = 12  # [guess]
MUFU_LATENCY = 20  # beyond the pipe itself [guess]
MUFU_QUEUE = 16  # clocks of work that may wait before the pipe [guess]
LSU_QUEUE = 5  # memory instructions that may wait per scheduler [guess]
LSU_LATENCY = 4  # from issue to the data path [guess]
OPERANDS_READ = 8  # a memory instruction's registers are free again [guess]
SHARED_LATENCY = 24  # 29 clocks in all with the steps before [luo]
L1_LATENCY = 33  # 38 to 43 clocks in all [luo]
L2_LATENCY = 280  # 262 to 273 clocks [luo], and some load
L2_BYTES = 64  # that L2 sends an SM per clock [guess]
BURST = 32 * 1024  # bytes that an SM may be ahead of its share of the bandwidth [guess]
STORES_IN_L2 = 64 * 1024  # bytes of an SM's stores that L2 keeps back from DRAM [guess]
DATA_BYTES = 128  # of shared memory or L1 per SM and clock [guide]
WGMMA = 4  # of a warp's 16 x 8 x 16 by wgmma: H100's and H200's dense rate, as below [sheet]
WGMMA_LATENCY = 32  # from the end of a product in the pipe to the warp that waits [guess]
BARRIER = 16  # from the last arrival to the first instruction [guess]
TAKEN_BRANCH = 8  # [guess]


@dataclass(frozen=True)
class Card:
    name: str
    architecture: str
    sms: int  # [sheet]
    clock: float  # Hz, boost [sheet]
    bandwidth: float  # of a copy, bytes per second [copy]
    latency: float  # of DRAM under load, seconds: 1.4 times what an idle card shows [luo], [guess]
    fma_pipes: int  # 64 or 128 float32 results per SM and clock [guide]
    float64: int  # clocks of a warp: 32, 2 or 64 results per SM and clock [guide]
    mma: int  # of mma.m16n8k16 with float32 sums per scheduler, from the dense rate

    @property
    def share(self) -> float:
        """Bytes per clock that one SM gets of the copy bandwidth."""
        return self.bandwidth / self.sms / self.clock

    @property
    def latency_clocks(self) -> float:
        return self.latency * self.clock


# mma: 2048 multiply-adds over the rate per scheduler and clock. A100 312 Tflop/s: 256. RTX 4090
# 165 Tflop/s, as float32 sums run at half rate: 64. H100, H200 989 Tflop/s: 512, of which mma.sync,
# in contrast to wgmma, reaches 63 % [luo].
CARDS = {
    card.name: card
    for card in (
        Card("A100", "sm_80", 108, 1.41e9, 1.70e12, 500e-9, fma_pipes=1, float64=4, mma=8),
        Card("RTX 4090", "sm_89", 128, 2.52e9, 0.92e12, 400e-9, fma_pipes=2, float64=64, mma=32),
        Card("H100", "sm_90a", 132, 1.755e9, 2.90e12, 600e-9, fma_pipes=2, float64=2, mma=6),
        Card("H200", "sm_90a", 132, 1.83e9, 4.30e12, 650e-9, fma_pipes=2, float64=2, mma=6),
    )
}
