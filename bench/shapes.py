"""Shapes of the LLaMA models of the paper (Table 11; 13B as published)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama:
    hidden: int
    mlp: int
    layers: int
    vocabulary: int = 32000

    def layer_matrices(self) -> list[tuple[int, int]]:
        """The seven matrices of one layer, [out, in]: they take the low-rank step."""
        h, f = self.hidden, self.mlp
        return [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]

    def matrices(self, layers: int | None = None) -> list[tuple[int, int]]:
        return self.layer_matrices() * (self.layers if layers is None else layers)


LLAMA = {
    "60m": Llama(512, 1376, 8),
    "130m": Llama(768, 2048, 12),
    "350m": Llama(1024, 2736, 24),
    "1b": Llama(2048, 5461, 24),
    "7b": Llama(4096, 11008, 32),
    "13b": Llama(5120, 13824, 40),
}
