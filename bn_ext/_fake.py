"""Fake kernels give sizes, dtypes and strides of results without data, for torch.compile and meta tensors.

They are the operators themselves, which end before they compute anything: checks and results are the same.
"""

from __future__ import annotations

import torch

from bn_ext._load import _C

for _name, _fake in _C.fakes.items():
    torch.library.register_fake(f"bn_ext::{_name}", _fake)
