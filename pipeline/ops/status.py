"""Command status: how far each stage of a run is, and what running the same command again would do.

reads   manifests; names of all parts; footers of the parts of stages that have not finished; the
        lock. Writes nothing, starts no Ray.

What a rerun would do is decided by the functions that the stages themselves decide with: each
fingerprint follows from the settings and the one before, so that of the last stage is known before
the first has run.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.artifacts import inputs, layout, outputs, stages
from pipeline.artifacts.stages import Stage
from pipeline.embed import survey
from pipeline.ops.text import filled, table
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store import lock, partial_sums
from pipeline.store.listing import Shard, shard_of
from pipeline.train.checkpoints import Checkpoints

HEADS = ("stage", "state", "done", "samples", "rejected", "samples/s", "left")


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage. A number is None where it is unknown or does not apply."""

    stage: str
    state: str  # done | partly | not begun | out of date | under way | unknown
    rerun: str  # what running the same command again would do
    done: int | None = None  # parts; steps of train
    total: int | None = None
    samples: int | None = None
    rejected: int | None = None
    samples_per_s: float | None = None
    left_s: int | None = None


@dataclass(frozen=True)
class StatusQuery:
    """The settings and shards that the stages are compared with."""

    sections: config.Sections
    shards: list[Shard] | None  # None: those of the run
    as_made: bool  # use the settings of the run; those of `sections` for stages that have not run

    def settings(self, stage: str, made_with: dict[str, Any] | None) -> Any:
        """The settings of a stage; `made_with` are those in its manifest."""
        cfg = self.sections[stage]
        if stage == "embed" and self.shards is None and inputs.are_given(made_with or {}):
            cfg = self.sections["embeddings"]
        return config.as_made(cfg, made_with) if self.as_made and made_with else cfg


def collect(query: StatusQuery, paths: layout.RunPaths) -> list[StageStatus]:
    """A row per stage, in their order."""
    first, embedded = embed_row(query, paths)
    rows = [first]
    made: outputs.Manifests = {stages.STAGES[0].folder: embedded} if embedded else {}
    for stage in stages.STAGES[1:]:
        if (row := _row(stage, query, made, paths, rows)) is not None:
            rows.append(row)
    if first.rerun.startswith("refused"):
        rows[1:] = [replace(later, rerun="not reached: embed is refused") for later in rows[1:]]
    return rows


def _row(
    stage: Stage,
    query: StatusQuery,
    made: outputs.Manifests,
    paths: layout.RunPaths,
    rows: list[StageStatus],
) -> StageStatus | None:
    """The row of a later stage; adds its fingerprint to `made`. None if `run` would skip it."""
    before = _manifest(stage, paths)
    if before and "taken_from" in before:
        row = _taken(stage.name, before, made)
        if row.state == "done":
            made[stage.folder] = before
        return row
    settings = query.settings(stage.name, (before or {}).get("config"))
    if stage.asked_by and not getattr(settings, stage.asked_by):
        if not before:
            return None
        settings = config.as_made(settings, before["config"])  # `run` leaves its result as it is
    if len(made) < len(rows) and not stage.facts:
        return None
    try:
        if len(made) < len(rows):
            raise UserError("the result of the stage before it is not known")
        want = stage.settings.expected(settings, made, paths)
    except UserError as error:
        begun = before or rows[0].state != "not begun"
        rerun = f"cannot tell: {error}" if begun else "all of it"
        return StageStatus(stage.name, "unknown" if begun else "not begun", rerun)
    made[stage.folder] = {"fingerprint": want.made_of}
    row = stage_row(stage, want, paths)
    if row.state == "done" and (missing := (before or {}).get("missing_pictures")):
        row = replace(row, rerun=f"all of it: {missing} pictures were missing")
    return row


def _manifest(stage: Stage, paths: layout.RunPaths) -> dict[str, Any] | None:
    if stage.name == "evaluate":
        return paths.top.peek("evaluation.json")
    return paths.folder(stage.folder).peek()


def _taken(stage: str, manifest: dict[str, Any], made: outputs.Manifests) -> StageStatus:
    """The row of a stage that `ratecluster assign` copied from another run."""
    last = [facts["fingerprint"] for facts in made.values()][-1:]
    whose = f"it is of {manifest['taken_from']}"
    if last == [manifest["upstream"]]:
        return StageStatus(stage, "done", f"nothing: {whose}", samples=manifest.get("samples"))
    return StageStatus(stage, "out of date", f"{whose}; run `ratecluster assign` again")


def embed_row(
    query: StatusQuery, paths: layout.RunPaths
) -> tuple[StageStatus, dict[str, Any] | None]:
    """The row of embed, and its manifest, or the one that it is about to write."""
    manifest, names = paths.embeddings.peek(), sorted(paths.embeddings.names())
    parts = [name for name in names if name.endswith(".parquet")]
    made_with = (manifest or {}).get("config")
    if parts and not manifest:
        stem = parts[0].removesuffix(".parquet")
        made_with = outputs.part_facts(paths.embeddings, [stem])[stem].get("config")
    cfg, shards = query.settings("embed", made_with), query.shards
    if shards is None and manifest:
        shards = [shard_of(s["shard"]) for s in manifest["shards"]]
    if shards is None:
        state = "partly" if parts else "not begun"
        given = inputs.are_given(made_with or {})
        what, option = ("files", "--embeddings") if given else ("shards", "--shards")
        rerun = f"the {what} without a part; give {option} to see which" if parts else "all of it"
        return StageStatus("embed", state, rerun, len(parts) or None), None
    shards = survey.settled(shards, paths)
    if whole := survey.if_done(cfg, shards, paths):
        counts = {name: whole.get(name) for name in ("samples", "rejected", "samples_per_s")}
        return StageStatus("embed", "done", "nothing", len(shards), len(shards), **counts), whole
    found = survey.survey(cfg, shards, paths)
    reason = survey.refusal(cfg, found, paths)
    row = StageStatus(
        "embed",
        "out of date" if manifest else "partly" if parts else "not begun",
        f"refused: {reason}" if reason else _embedding(found, len(shards)),
        len(found.done),
        len(shards),
        sum(facts["samples"] for facts in found.done),
        sum(facts["rejected"] for facts in found.done),
    )
    expected = {
        "fingerprint": survey.fingerprint(cfg, shards),
        "config": config.facts(cfg),
        "shards": [{"shard": asdict(shard)} for shard in shards],
    }
    return row, manifest if reason else expected


def _embedding(found: survey.Survey, total: int) -> str:
    changed, extended = len(found.changed), len(found.extended)
    new = len(found.todo) - changed - extended
    first = f", the first {found.todo[0].stem}" if found.todo else ""
    more = f", {extended} to be extended by encoders of embed.also" if extended else ""
    text = f"{len(found.todo)} of {total} shards: {new} new, {changed} changed{more}{first}"
    if not found.todo:
        text = f"none of {total} shards, the manifest alone"
    if found.removed:
        text += f"; {len(found.removed)} removed, the first {found.removed[0]}: left out"
    return text


def stage_row(stage: Stage, want: outputs.ExpectedOutputs, paths: layout.RunPaths) -> StageStatus:
    """The row of a stage, from the manifest in its folder."""
    manifest, reason = want.compare()
    found = manifest or {}
    total, done, unit = _progress(stage, want, found, reason, paths)
    row = StageStatus(want.stage, "done", "nothing", done, total)
    if manifest and not reason:
        samples = found.get("labels", found.get("samples"))
        return replace(row, samples=samples, samples_per_s=found.get("samples_per_s"))
    rerun = f"{unit} {done} to {total}" if done and unit == "steps" else "all of it"
    if done and unit == "parts":
        rerun = f"{(total or 0) - done} of {total} parts"
    if not done and partial_sums.exists(want.folder, want.made_of):
        return replace(row, state="partly", rerun="from where it was interrupted")
    state = "partly" if done else "out of date" if manifest else "not begun"
    return replace(row, state=state, rerun=f"{rerun}: {reason}" if reason else rerun)


def _progress(
    stage: Stage,
    want: outputs.ExpectedOutputs,
    found: dict[str, Any],
    reason: str,
    paths: layout.RunPaths,
) -> tuple[int | None, int | None, str]:
    """How many units a stage has, how many are finished, and what a unit is."""
    if stage.unit == "steps":
        total = want.cfg.steps
        reached = 0 if found else Checkpoints(paths, want.made_of).reached()
        return total, reached if reason or not found else found["steps"], "steps"
    if not stage.parts:
        return None, None, ""
    folder = paths.folder(next(iter(stage.parts)))
    total = len(want.files[folder])
    if found and not reason:
        return total, total, "parts"
    same = not found or found["fingerprint"] == want.made_of
    resumes = same and stage.unit == "parts"
    return total, len(want.parts(folder)) if resumes else 0, "parts"


def owner_of(root: str) -> dict[str, Any] | None:
    """The process that holds the lock, and whether it is alive; None if the lock is free."""
    _, facts = lock.read(root)
    return None if facts.get("released") else {**facts, "lives": lock.lives(facts)}


def with_heartbeat(rows: list[StageStatus], owner: dict[str, Any] | None) -> list[StageStatus]:
    """The rows; the stage under way has the numbers of its owner's last heartbeat."""
    doing = (owner or {}).get("doing")
    if not owner or not doing or owner["lives"] is False:
        return rows
    names = ("done", "total", "samples", "rejected", "samples_per_s", "left_s")
    now = {name: doing[name] for name in names}
    return [
        replace(row, state="under way", **now) if row.stage == doing["stage"] else row
        for row in rows
    ]


def text(root: str, owner: dict[str, Any] | None, rows: list[StageStatus]) -> str:
    """The rows as text for a terminal; no line is longer than text.WIDTH."""
    width = max(len(row.stage) for row in rows)
    lines = [
        f"root   {root}",
        f"lock   {_held(owner)}",
        "",
        *table([HEADS, *map(_cells, rows)], 2),
        "",
        "Running the same command again would do:",
        *(f"  {row.stage:<{width}}  {row.rerun}" for row in rows),
    ]
    return "\n".join(map(filled, lines))


def _held(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "free"
    who = lock.describe(owner)
    if owner["lives"] is False:
        return f"left by {who}, whose process has ended; the next command takes over the lock"
    return f"held by {who}; last heartbeat {owner.get('at', 'not yet')}"


def _cells(row: StageStatus) -> tuple[str, ...]:
    done = "–" if row.done is None else f"{row.done:,}"
    if row.total is not None:
        done += f"/{row.total:,}"
    numbers = [_number(n) for n in (row.samples, row.rejected, row.samples_per_s)]
    left = "–" if row.left_s is None else f"{row.left_s // 60}:{row.left_s % 60:02d}"
    return row.stage, row.state, done, *numbers, left


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
