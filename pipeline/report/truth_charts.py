"""Charts that compare clusters with true classes, from evaluation.json."""

from pipeline.report.figures import Chart
from pipeline.report.run_data import Facts


def confusion(evaluation: Facts, clusters: list[Facts]) -> Chart:
    """Classes against clusters."""
    found = evaluation["confusion"]
    names = {row["id"]: row["caption"] or "(no caption)" for row in clusters}
    head = ["Class", *(f"{c} {names[c]}" for c in found["clusters"])]
    rows = [
        [name, *(f"{n:,}" if n else "" for n in counts)]
        for name, counts in zip(found["classes"], found["counts"], strict=True)
    ]
    left = evaluation["samples"] - found["shown"]
    others = f" {left:,} samples of smaller classes and clusters are not shown." if left else ""
    return {
        "title": "Classes against clusters",
        "text": "The colour shows the share of a class in a cluster. Clusters are sorted by their "
        f"most common class.{others}",
        "alt": f"Heat map of {len(rows):,} true classes against {len(head) - 1:,} clusters",
        "table": {"head": head, "rows": rows},
        "data": {key: found[key] for key in ("classes", "clusters", "counts")},
    }


def confidence(evaluation: Facts) -> Chart:
    """Accuracy by confidence."""
    tenths = evaluation["by_confidence"]
    first, last = (f"{100 * tenths[i]['right']:.0f} %" for i in (0, -1))
    return {
        "title": "Accuracy by confidence",
        "text": "Tenths of the samples, by confidence. A sample is right if it has the most "
        f"common class of its cluster: {first} of the least confident tenth, {last} of the most.",
        "alt": f"Bars of the accuracy of each tenth, from {first} to {last}",
        "table": {
            "head": ["Tenth", "Samples", "Mean confidence", "Right"],
            "rows": [
                [i, f"{t['samples']:,}", f"{t['confidence']:.3f}", f"{100 * t['right']:.1f} %"]
                for i, t in enumerate(tenths, start=1)
            ],
        },
        "data": tenths,
    }
