"""What is told of a setting of a model's cache."""

from __future__ import annotations

from typing import Any

from server.worker import messages


def setting_info(ready: messages.Ready, setting: str = "") -> dict[str, Any]:
    """A setting of a hot model in figures: bits per element, bytes per token at a stated context, mean KL (nats).

    `setting`: "exact" or a row of the ladder; "" for the one that the model runs at.
    """
    exact = ready.bytes_per_token_exact
    name, rank, bits, kl = ready.setting, ready.rank, ready.bits_per_element, ready.kl_mean
    size = ready.bytes_per_token
    row = next((row for row in ready.ladder if row.name == setting), None)
    if setting == "exact" != name:
        name, rank, bits, kl, size = setting, 0.0, 16.0, 0.0, exact
    elif row is not None and setting != name:
        name, rank, bits, kl, size = setting, row.rank, row.bits_per_element, row.kl_mean, exact / row.ratio
    ratio = exact / size if size else 1.0
    return {
        "setting": name,
        "rank": rank,
        "bits_per_element": bits,
        "kl_mean": kl,
        "bytes_per_token": size,
        "bytes_per_token_exact": ready.bytes_per_token_exact,
        "reference_context": ready.reference_context,
        "ratio": round(ratio, 3),
    }
