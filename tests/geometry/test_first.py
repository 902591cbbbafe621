import torch
from coreprune.geometry import caratheodory, lewis_weights, leverage_scores, mvee, span

def test_smoke(gen):
    p = torch.randn(50, 5, generator=gen, dtype=torch.float64)
    for sym in (True, False):
        e = mvee(p, symmetric=sym)
        assert e.gap <= 1e-2
    caratheodory(p, p.mean(0)); lewis_weights(p); leverage_scores(p); span(p)
