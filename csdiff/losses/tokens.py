"""The token-level Cauchy-Schwarz term."""

import math

import torch


def token_cauchy_schwarz_divergence(x_tokens, y_tokens, x_mask=None, y_mask=None, *, bandwidth=0.5, diagonal=True,
                                    normalize=False, block_size=None, group=None):
    if normalize:
        x_tokens, y_tokens = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (x_tokens, y_tokens))
    mx = torch.ones(x_tokens.shape[:2], dtype=torch.bool) if x_mask is None else x_mask
    my = torch.ones(y_tokens.shape[:2], dtype=torch.bool) if y_mask is None else y_mask

    def log_mean(a, b, ma, mb):
        e = -torch.cdist(a, b).square() / (2 * bandwidth**2)
        pair = ma[:, :, None] & mb[:, None]
        return e.masked_fill(~pair, -math.inf).flatten(1).logsumexp(1) - pair.flatten(1).sum(1).log()

    x, y = x_tokens, y_tokens
    return (log_mean(x, x, mx, mx) + log_mean(y, y, my, my) - 2 * log_mean(x, y, mx, my)).mean()
