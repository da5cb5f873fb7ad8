"""Checksums of tensors in host memory, at the speed of memory: what waits there may be hit by a flipped bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_BLOCK = 4096
"""Words that are summed together; sums are hashed in order, so that blocks cannot trade places."""


def checksum(tensors: Iterable[torch.Tensor | None]) -> bytes:
    """16 bytes that depend on every byte of the tensors (in host memory; None counts as an empty one).

    Words of 8 bytes are added up, modulo 2^64, in blocks: any change of one word changes the result. Hashing all bytes
    would take ten times as long, on the thread that answers requests.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor is None:
            digest.update(b"-")
            continue
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        whole = flat.numel() - flat.numel() % (8 * _BLOCK)
        if whole:
            sums = flat[:whole].view(torch.int64).view(-1, _BLOCK).sum(dim=1)
            digest.update(sums.numpy().tobytes())
        digest.update(flat[whole:].numpy().tobytes())
        digest.update(flat.numel().to_bytes(8, "little"))
    return digest.digest()
