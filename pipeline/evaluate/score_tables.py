"""The evaluation as a text table. Imports no heavy package: `run` prints it when all is done."""

from typing import Any


def text(result: dict[str, Any]) -> str:
    """The scores of the clusters and the baselines, in percent."""
    width = max(len(line["name"]) for line in result["rows"])
    lines = [f"{'':{width}}  {'k':>6}  {'ACC':>5}  {'NMI':>5}  {'ARI':>5}"]
    for line in result["rows"]:
        percents = "  ".join(f"{100 * line[key]:5.1f}" for key in ("acc", "nmi", "ari"))
        lines.append(f"{line['name']:{width}}  {line['k']:>6}  {percents}")
    return "\n".join(lines)
