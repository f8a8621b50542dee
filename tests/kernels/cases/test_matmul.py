"""What the kernels of masked layers share: the rounding of operands to TF32, bit by bit."""

import torch
import triton
import triton.language as tl
from ffw_fast.kernels import matmul

from .common import DEVICE, tf32


@triton.jit
def round_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane, mask=lane < count, other=0.0)
    tl.store(y_ptr + lane, matmul.round_to_tf32(x), mask=lane < count)


def test_rounding_to_tf32():
    source = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (20000,), generator=source, dtype=torch.int32)
    magnitudes = [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFFFF, 0x800000, 0x801000]  # from denormals
    magnitudes += [0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F803000, 0x3FFFEFFF, 0x3FFFF000]  # ties, and a carry to 2
    magnitudes += [0x7F7FEFFF, 0x7F7FF000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]  # largest, infinity, NaN
    edges = torch.tensor(magnitudes + [bits - 2**31 for bits in magnitudes], dtype=torch.int32)
    x = torch.cat([anything, edges]).view(torch.float32).to(DEVICE)
    y = torch.empty_like(x)
    round_kernel[(1,)](x, y, len(x), BLOCK=triton.next_power_of_2(len(x)), enable_fp_fusion=False)
    assert torch.equal(y.view(torch.int32), tf32(x).view(torch.int32))
