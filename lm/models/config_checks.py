"""What fields of a `ModelConfig` ask of each other, where that takes more than a line."""

from __future__ import annotations

import math
from typing import Any

from lm.config import check


def needs(config: Any, prefix: str, field: str, used: bool, **needed) -> None:
    """That where a field is used, others are what it needs."""
    found = {name: getattr(config, name) for name in needed}
    check(
        not used or found == needed,
        f"{prefix}.{field}={getattr(config, field)!r} needs "
        + " and ".join(f"{name}={value!r}" for name, value in needed.items())
        + f", not {' and '.join(map(repr, found.values()))}",
    )


def check_latents(config: Any, prefix: str) -> None:
    """Of multi-head latent attention."""
    shared, latent = config.shared_key_dim, config.kv_rank > 0
    for field in ("query_rank", "shared_key_dim", "value_dim"):
        check(
            latent or not getattr(config, field),
            f"{prefix}.{field}={getattr(config, field)} needs {prefix}.kv_rank, which is 0",
        )
    check(
        not latent or (0 < shared < config.head_width and shared % 2 == 0),
        f"{prefix}.shared_key_dim={shared} must be even and positive where kv_rank="
        f"{config.kv_rank} is, and less than head_dim={config.head_width}",
    )
    needed = {"architecture": "decoder", "cell": "attention", "positions": "rotary"}
    needed |= {"rotary_fraction": 1.0, "qk_norm": False, "attention_sinks": False}
    needs(config, prefix, "kv_rank", latent, **needed)
    check(
        not latent or (config.norm != "none" and not config.has_bias("qkv")),
        f"{prefix}.kv_rank={config.kv_rank} needs a norm, not norm={config.norm!r}, and no biases "
        f"of queries, keys and values: qkv_bias=False, not {config.has_bias('qkv')}",
    )
    check(
        not latent or config.kv_heads == config.num_heads,
        f"{prefix}.num_kv_heads={config.kv_heads} must be num_heads={config.num_heads}, or None, "
        f"where kv_rank={config.kv_rank} is positive",
    )


def check_groups(config: Any, prefix: str) -> None:
    """Of routers that choose by groups."""
    groups, limit, experts = config.router_groups, config.router_group_limit, config.num_experts
    best = config.router_group_best
    check(
        groups == 1 or (experts % groups == 0 and experts >= best * groups),
        f"{prefix}.router_groups={groups} must divide num_experts={experts} into groups of {best} "
        "or more",
    )
    check(
        limit <= groups and (groups == 1 or config.experts_per_token <= experts // groups * limit),
        f"{prefix}.router_group_limit={limit} must be at most router_groups={groups}, and so "
        f"many groups have experts_per_token={config.experts_per_token} experts",
    )


def check_rotary(config: Any, prefix: str) -> None:
    """How angles are slowed."""
    if config.positions != "rotary":
        return
    pairs = config.rotary_dim // 2
    for name in ("rotary_short", "rotary_long") if config.rotary_scaling == "longrope" else ():
        factors = getattr(config, name)
        check(
            len(factors) == pairs and all(0 < x < math.inf for x in factors),
            f"{prefix}.{name}={factors} must be {pairs} positive numbers, one for each pair of "
            f"rotated dimensions, where rotary_scaling='longrope'",
        )
    check(
        pairs > 1 or "dynamic" not in map(config.scaling_of, (False, True)),
        f"{prefix}.rotary_scaling='dynamic' needs more than {2 * pairs} rotated dimensions",
    )
    check(
        config.rotary_local_scaling == "none" or config.rotary_local_base is not None,
        f"{prefix}.rotary_local_scaling={config.rotary_local_scaling!r} needs rotary_local_base",
    )
