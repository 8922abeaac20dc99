"""Policy optimisation in plain loops, written from the papers and from nothing of `lm`."""

import math


def kept(row_mask):
    return [t for t, m in enumerate(row_mask) if m > 0]


def tokens(mask):
    return [(n, t) for n, row in enumerate(mask) for t in kept(row)]


def moments(x, places):
    mean = sum(x[n][t] for n, t in places) / len(places)
    return mean, sum((x[n][t] - mean) ** 2 for n, t in places) / len(places)


def whitened(x, mask, shift_mean):
    mean, variance = moments(x, tokens(mask))
    out = [[0.0] * len(row) for row in x]
    for n, t in tokens(mask):
        out[n][t] = (x[n][t] - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return out


def rewards(score, ended, penalty, beta, logprob, ref, mask):
    """Ziegler et al. 2019, eq. 2, token by token: -β·log(π/ρ), and the score at the end."""
    out = [[0.0] * len(row) for row in mask]
    for n, t in tokens(mask):
        out[n][t] = -beta * (logprob[n][t] - ref[n][t])
    for n, row in enumerate(mask):
        if kept(row):
            out[n][kept(row)[-1]] += score[n] - (0 if ended[n] else penalty)
    return out


def gae(reward, value, mask, gamma, lam):
    """Schulman et al. 2016, eq. 16: Σ (γλ)^l δ_{t+l}, δ_t = r_t + γ V(s_{t+1}) - V(s_t)."""
    advantage = [[0.0] * len(row) for row in mask]
    returns = [[0.0] * len(row) for row in mask]
    for n, row in enumerate(mask):
        steps = kept(row)
        values = [value[n][t] for t in steps] + [0.0]
        delta = [reward[n][t] + gamma * values[i + 1] - values[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            advantage[n][t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(steps)))
            returns[n][t] = advantage[n][t] + values[i]
    return advantage, returns


def ratio(kind, new, old, n, t, mask):
    if kind == "token":
        return math.exp(new[n][t] - old[n][t])
    total = sum(new[n][s] - old[n][s] for s in kept(mask[n]))
    return math.exp(total / (len(kept(mask[n])) if kind == "mean" else 1))


def policy(kind, over, new, old, advantage, mask, low, high, length=0):
    """-min(r·A, clip(r)·A), as a mean: PPO's eq. 7, GRPO's eq. 3, DAPO's, Dr. GRPO's, GSPO's."""
    lengths = [len(kept(row)) for row in mask]
    total = 0.0
    for n, t in tokens(mask):
        r, a = ratio(kind, new, old, n, t, mask), advantage[n][t]
        loss = -min(r * a, min(max(r, 1 - low), 1 + high) * a)
        total += (
            loss
            / {
                "tokens": sum(lengths),
                "responses": sum(1 for k in lengths if k) * lengths[n],
                "constant": sum(1 for k in lengths if k) * length,
            }[over]
        )
    return total


def cispo(new, old, advantage, mask, high):
    """MiniMax-M1: -clip(r)·A·log π, over all tokens."""
    parts = [
        -min(math.exp(new[n][t] - old[n][t]), 1 + high) * advantage[n][t] * new[n][t]
        for n, t in tokens(mask)
    ]
    return sum(parts) / len(parts)


def critic(value, old, returns, mask, clip):
    parts = []
    for n, t in tokens(mask):
        near = min(max(value[n][t], old[n][t] - clip), old[n][t] + clip)
        worse = max((value[n][t] - returns[n][t]) ** 2, (near - returns[n][t]) ** 2)
        parts.append((0.5 * worse, worse > (value[n][t] - returns[n][t]) ** 2))
    return [sum(column) / len(parts) for column in zip(*parts)]


def statistics(new, old, advantage, mask, low, high):
    """Ratio, clip fraction and KL(old‖new) by k3 (Schulman 2020), over all tokens."""
    ratios, clipped, kls = [], [], []
    for n, t in tokens(mask):
        r = math.exp(new[n][t] - old[n][t])
        ratios.append(r)
        clipped.append(r > 1 + high if advantage[n][t] > 0 else r < 1 - low)
        kls.append(r - 1 - math.log(r))
    return [sum(values) / len(values) for values in (ratios, clipped, kls)]
