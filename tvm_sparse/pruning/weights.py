"""A checkpoint's tensors as the runtime takes them: pruned, stacked into runtime parameters, transformed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from tvm_sparse.checkpoint.base import READ_ROWS, Checkpoint
from tvm_sparse.errors import Refusal
from tvm_sparse.layout import RuntimeParam
from tvm_sparse.pruning.pruner import Pruner, Zeros

_KEEP = Pruner("none")


class PrunedWeights:
    """Reads runtime parameters out of a checkpoint. `zeros` fills as matrices are read, by checkpoint name.

    Matrices are pruned and handed out on `device`, bit for bit as on a CPU.
    """

    def __init__(
        self, checkpoint: Checkpoint, pruner: Pruner, selected: Iterable[str], device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        # Norms of blocks are sums of floats, which another device adds in another order: those stay on the CPU.
        self._pruned_on = torch.device("cpu") if pruner.pattern.kind == "block" else self.device
        # Beside a GPU many cores read, best a whole matrix at a time: no projection of the 27B has more rows.
        self._rows = READ_ROWS * (1 if self.device.type == "cpu" else 20)
        self.pruner = pruner
        self.selected = frozenset(selected)
        self.zeros: dict[str, Zeros] = {}
        pruner.check((name, checkpoint.spec(name).shape) for name in sorted(self.selected))

    def exact_bf16(self, param: RuntimeParam) -> bool:
        """Whether a matrix is bfloat16 as it stands; else it can only be kept dense, in float32."""
        return all(self.checkpoint.exact_bf16(source) for source in param.sources)

    def blocks(self, param: RuntimeParam) -> Iterator[torch.Tensor]:
        """A matrix [N, K] in pruned row blocks, in order: bfloat16 where it is exact, else float32.

        Raises Refusal for NaN and infinity, by checkpoint name.
        """
        dtype = torch.bfloat16 if self.exact_bf16(param) else torch.float32
        for source in param.sources:
            pruner = self.pruner if source in self.selected else _KEEP
            shape = self.checkpoint.spec(source).shape
            zeros = Zeros((shape[0], shape[1]))

            def read(start: int, stop: int, source: str = source) -> torch.Tensor:
                return self.checkpoint.rows(source, start, stop).to(self._pruned_on, dtype).contiguous()

            yield from pruner.stream(source, zeros.shape, dtype, read, zeros, self._rows)
            self.zeros[source] = zeros

    def matrix(self, param: RuntimeParam) -> torch.Tensor:
        """A whole matrix [N, K], read once: the largest projection of the 27B is 356 MB."""
        dtype = torch.bfloat16 if self.exact_bf16(param) else torch.float32
        whole = torch.empty(param.shape, dtype=dtype, device=self._pruned_on)
        first = 0
        for source in param.sources:
            count = self.checkpoint.spec(source).shape[0]
            part = whole[first : first + count]
            at = 0
            for block in self.checkpoint.blocks(source, self._rows):
                part[at : at + len(block)] = block
                at += len(block)
            pruner = self.pruner if source in self.selected else _KEEP
            self.zeros[source] = pruner.matrix(source, part)
            first += count
        return whole.to(self.device)

    def vector(self, param: RuntimeParam) -> torch.Tensor:
        """A small parameter in float32, its transform applied. Raises Refusal for NaN and infinity."""
        value = self.checkpoint.tensor(param.sources[0]).float()
        if not bool(value.isfinite().all()):
            raise Refusal(
                f"tensor {param.sources[0]} holds NaN or infinity: repair the checkpoint, or give another one"
            )
        if param.transform == "one_plus":
            value = 1 + value
        return value.reshape(param.shape)
