"""Attention within a piece on a GPU, forward and backward, by every kernel that can do it there.

python tools/attention_kernels.py FILE  writes the JSON that nbs/15_attention_pieces.py plots.
FlashAttention-4 takes part where the extra `fa4` is installed.
"""

import datetime
import importlib.metadata
import json
import statistics
import sys
from unittest.mock import patch

import torch

from pithtrain.bench import in_turns, median_ms
from pithtrain.kernels import attention

ROWS, LENGTH = 4, 4096
CASES = {  # name: query heads, key heads, features of keys and of values, window, mean length of documents
    "causal, 128": (32, 4, 128, 128, None, None),
    "causal, 192 and 128": (16, 16, 192, 128, None, None),
    "causal, 64": (64, 8, 64, 64, None, None),
    "causal, 256": (16, 2, 256, 256, None, None),
    "window of 128, 64": (64, 8, 64, 64, 128, None),
    "documents of 512, 128": (32, 4, 128, 128, None, 512),
    "documents of 512, 192 and 128": (16, 16, 192, 128, None, 512),
    "documents of 512, 256": (16, 2, 256, 256, None, 512),
}


def problem(
    heads: int, kv_heads: int, features: int, value_features: int, window: int | None, documents: int | None
) -> tuple[list[torch.Tensor], attention.Piece]:
    """Queries, keys, values and the output's gradient, bf16; and the piece that is all there is."""
    sizes = ((heads, features), (kv_heads, features), (kv_heads, value_features), (heads, value_features))
    tensors = [torch.randn(ROWS, LENGTH, n, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n, d in sizes]
    cuts = None
    if documents:
        inner = torch.randint(1, ROWS * LENGTH, (ROWS * LENGTH // documents,))
        cuts = torch.cat([torch.arange(0, ROWS * LENGTH + 1, LENGTH), inner]).unique()
    (piece,) = attention.pieces([range(LENGTH)], [range(LENGTH)], ROWS, LENGTH, window, cuts)
    return tensors, piece


@torch.no_grad()
def measure(case: tuple) -> dict[str, float]:
    """Median ms of forward and backward by each kernel that takes the case; the kernels' turns alternate."""
    (q, k, v, grad), piece = problem(*case)
    scale = q.shape[-1] ** -0.5

    def both() -> None:
        out, lse = attention.attend_piece(q, k, v, scale, piece)
        attention.piece_gradients(grad, q, k, v, out, lse, scale, piece)

    flash_4 = attention.installed_flash_attention_4()
    kernels = {"FlashAttention-2": (False, None), "FlashAttention-4": (False, flash_4), "cuDNN": (True, None)}
    if flash_4 is None:
        del kernels["FlashAttention-4"]
    with patch.object(attention, "installed_flash_attention_4", lambda: None):  # beside it cuDNN gives way
        if not attention.cudnn_fits(q, k, v, piece):
            del kernels["cuDNN"]
    turns = {name: [] for name in kernels}
    for name in in_turns(kernels, 4):
        cudnn, module = kernels[name]
        with (
            patch.object(attention, "cudnn_fits", lambda *_, cudnn=cudnn: cudnn),
            patch.object(attention, "installed_flash_attention_4", lambda module=module: module),
        ):
            turns[name].append(median_ms(both, q.device, 10))
    return {name: statistics.median(ms) for name, ms in turns.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    packages = ("torch", "flash-attn-4", "nvidia-cutlass-dsl-libs-base")
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    result = {
        "device": torch.cuda.get_device_name(),
        "versions": {p: importlib.metadata.version(p) for p in packages if p in installed},
        "date": datetime.date.today().isoformat(),
        "rows": ROWS,
        "length": LENGTH,
        "ms": {name: measure(case) for name, case in CASES.items()},
    }
    print(json.dumps(result, indent=2))
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=2)
