"""The evaluation as text tables. Imports no heavy package: `run` prints them when all is done."""

from typing import Any


def text(result: dict[str, Any]) -> str:
    """All tables of evaluation.json."""
    more = [caption_table(result["captions"])] if "captions" in result else []
    return "\n".join([score_table(result), *more])


def score_table(result: dict[str, Any]) -> str:
    """The scores of the clusters and the baselines, in percent."""
    width = max(len(line["name"]) for line in result["rows"])
    lines = [f"{'':{width}}  {'k':>6}  {'ACC':>5}  {'NMI':>5}  {'ARI':>5}"]
    for line in result["rows"]:
        percents = "  ".join(f"{100 * line[key]:5.1f}" for key in ("acc", "nmi", "ari"))
        lines.append(f"{line['name']:{width}}  {line['k']:>6}  {percents}")
    return "\n".join(lines)


def caption_table(result: dict[str, Any]) -> str:
    """The scores of the captions, in percent."""
    lines = [f"captions of {result['rows'][0]['clusters']} clusters against their commonest class:"]
    width = max(len(row["name"]) for row in result["rows"])
    lines.append(f"{'':{width}}  class names   same  WordNet  text")
    for row in result["rows"]:
        values = [
            "    -" if row[key] is None else f"{100 * row[key]:5.1f}"
            for key in ("accuracy", "path_similarity", "text_similarity")
        ]
        start = f"{row['name']:{width}}  {row['class_names']:11}"
        lines.append(f"{start}  {values[0]}    {values[1]} {values[2]}")
    return "\n".join(lines)
