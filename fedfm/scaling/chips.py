"""Published figures of chips: those that programs are compiled for, and GPUs.

Sources: Google Cloud's pages on each TPU, docs.cloud.google.com/tpu/docs/v5e,
/v5p and /v6e, read 2026-11: peak bf16 FLOP/s, HBM capacity and bandwidth, and
the network's bandwidth per pod or chip. The speed of an ICI link, one way, is
the one that jax-ml.github.io/scaling-book/tpus measures, a tenth under the
published 400, 1200 and 800 GB/s a chip (both ways, all links). Usable HBM is
what libtpu itself reports when a program does not fit. Of GPUs: NVIDIA's data
sheets of the A100, H100 and H200 (SXM), without sparsity.
"""

from collections.abc import Sequence
from typing import NamedTuple

_GIB = 1 << 30


class Chip(NamedTuple):
  """A kind of chip.

  Attributes:
    name: As in a topology's name.
    flops: Peak bf16 FLOP/s.
    hbm_bytes: Bytes that a program may use.
    hbm_bandwidth: Bytes/s.
    link_bandwidth: Bytes/s of one ICI link, one way.
    network_bandwidth: Bytes/s of a chip's share of the data center network.
    matrix_unit: Side of the matrix unit.
    clock: Hz; with `flops` it gives the FLOPs of a cycle.
    torus: Dimensions of the torus.
    largest: Largest topology.
    wraps: Whether a dimension of this many chips, in a slice of these sizes, is
      a ring.
  """

  name: str
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  matrix_unit: int
  clock: float
  torus: int
  largest: str

  def is_ring(self, dim: int, sizes: Sequence[int]) -> bool:
    """Whether a dimension of a slice is closed to a ring.

    Args:
      dim: The dimension.
      sizes: Chips along each dimension of the slice.

    Returns:
      On a 2D torus: all of its 16 chips. On a 3D one: a slice of whole cubes
      of 4 x 4 x 4.
    """
    if self.torus == 2:
      return sizes[dim] == 16
    return all(n % 4 == 0 for n in sizes)


CHIPS = {
  "v5e": Chip(
    name="v5e",
    flops=197e12,
    hbm_bytes=15.75 * _GIB,
    hbm_bandwidth=819e9,
    link_bandwidth=45e9,
    network_bandwidth=6.4e12 / 8 / 256,
    matrix_unit=128,
    clock=1.5e9,
    torus=2,
    largest="16x16",
  ),
  "v5p": Chip(
    name="v5p",
    flops=459e12,
    hbm_bytes=95.74 * _GIB,
    hbm_bandwidth=2765e9,
    link_bandwidth=90e9,
    network_bandwidth=50e9 / 8,
    matrix_unit=128,
    clock=1.75e9,
    torus=3,
    largest="16x16x24",
  ),
  "v6e": Chip(
    name="v6e",
    flops=918e12,
    hbm_bytes=31.25 * _GIB,
    hbm_bandwidth=1640e9,
    link_bandwidth=90e9,
    network_bandwidth=25.6e12 / 8 / 256,
    matrix_unit=256,
    clock=1.75e9,
    torus=2,
    largest="16x16",
  ),
}

# How jax names a device, where a program runs on it: `Device.device_kind`.
_DEVICE_KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}
# Dense peaks in FLOP/s by dtype, by what the names of GPUs contain.
_GPU_FLOPS = {
  "A100": {"bfloat16": 312e12, "float32": 19.5e12},
  "H100": {"bfloat16": 989e12, "float32": 67e12},
  "H200": {"bfloat16": 989e12, "float32": 67e12},
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Published peak FLOP/s of a device.

  Args:
    device_kind: As jax reports it.
    dtype: Compute dtype.

  Returns:
    The dense peak; None where none is published, or the device is not known.

  Examples:
    >>> peak_flops("TPU v5 lite", "bfloat16") == CHIPS["v5e"].flops
    True
    >>> peak_flops("NVIDIA H100 80GB HBM3", "float32")
    67000000000000.0
  """
  if device_kind in _DEVICE_KINDS:
    chip = CHIPS[_DEVICE_KINDS[device_kind]]
    return chip.flops if dtype == "bfloat16" else None
  for name, peaks in _GPU_FLOPS.items():
    if name in device_kind:
      return peaks.get(dtype)
  return None
