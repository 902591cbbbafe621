"""Reports that no model stands behind: large ones, and hostile ones."""

from __future__ import annotations

from typing import Any

MARK = "<script>hacked=1</script></script><img src=x onerror=hacked=1>\"'`{{7*7}}${1}&amp;\u2028\u202eשלום 漢字"


def certificate(theorem: str, kind: str, bound: float | None, text: str = "") -> dict[str, Any]:
    return {
        "theorem": theorem,
        "kind": kind,
        "bound": bound,
        "trivial": 2.0,
        "statement": f"a statement of {theorem} {text}",
        "assumptions": [f"an assumption of {theorem} {text}"],
        "delta": 0.01 if kind == "sampled" else None,
        "vacuous": bound is None or bound >= 2.0,
    }


def report(groups: int, text: str = "") -> dict[str, Any]:
    """All keys that the page knows, with `text` in every place where text may stand."""

    def group(i: int) -> dict[str, Any]:
        n, locked = 64 * (1 + i % 5), i % 7 == 6
        kept = n if locked else n // 4 * (1 + i % 3)
        return {
            "name": f"stage.{i}.convolution {text}",
            "channels": n,
            "kept": kept,
            "unit": 4 if i % 3 == 0 else 1,
            "note": f"a note {text}",
            "locked_because": f"a reason {text}" if locked else None,
            "certificates": []
            if locked
            else [
                certificate("T10", "measured", 0.1 / (i + 1), text),
                certificate("T8", "proved", 0.1 * (i + 1), text),
                certificate("T6", "sampled", None, text),
            ],
            "rank": 32,
            "errors": None if locked else [0.3 * (1 - k / n) ** 2 for k in range(n + 1)],
            "macs": [1000 * n, 1000 * kept],
        }

    sizes = {"before": 1_234_567, "after": 456_789}
    numbers = range(groups)
    times = {"median": 0.0123, "low": 0.0119, "high": 0.0131}
    faster = {"median": 0.0071, "low": 0.007, "high": 0.0074}
    return {
        "schema": 1,
        "model": f"Net {text}",
        "parameters": sizes,
        "macs": {"before": 987_654_321, "after": 123_456_789},
        "bytes": {"before": 4_938_268, "after": 1_827_156},
        "notes": [f"what else there is to know {text}"],
        "queries": f"256 inputs {text}",
        "path": {
            "asked": f"agreement=0.95 {text}",
            "level": 0.05,
            "delta": 0.01,
            "samples": 400,
            "source": f"the user's data {text}",
            "certificate": {**certificate("T19", "sampled", 0.05, text), "trivial": 0.9},
            "steps": [
                {
                    "share": s,
                    "macs": round(987_654_321 * s),
                    "parameters": round(1_234_567 * s),
                    "risk": 0.08 * (1 - s),
                    "bound": 0.08 * (1 - s) + 0.015,
                    "passed": s > 0.6,
                }
                for s in (0.96, 0.81, 0.65, 0.54)
            ],
        },
        "agreement": {**certificate("T11", "sampled", 0.034, text), "trivial": 0.9},
        "groups": [group(i) for i in numbers],
        "refits": [
            {"weight": f"w{i} {text}", "before": 0.2, "after": 0.02, "joined": i % 2 == 0} for i in range(groups)
        ],
        "settings": {
            "method": {"name": f"functional{text}", f"key {text}": text},
            "budget": {"macs": 0.5},
            "queries": f"Strokes({text})",
            "seed": 0,
        },
        "call": f"prune({text})",
        "seconds": {f"capture{text}": 1.5},
        "memory": {"limit": 8 << 30, "held": 1 << 20, "spilled": 0, "peaks": {f"capture{text}": 2e9, "select": 3e9}},
        "versions": {f"torch {text}": text},
        "latency": {
            "device": f"cpu {text}",
            "threads": 1,
            "note": f"a note on time {text}",
            "rows": [{"batch": b, "before": times, "after": faster, "speedup": 1.73} for b in (1, 8)],
        },
        "accuracy": {"before": 0.8942, "after": 0.8731, "samples": 10_000},
        "artifact": {"loads_with": f"coreprune.load {text}", "why": f"a cause {text}"},
    }
