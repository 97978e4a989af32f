"""What may change in the recipe of a run that has begun, and what not.

free: it decides nothing that is computed. warned: it changes what comes, on purpose. refused: the run would no longer
be one run; `--allow-drift` takes it all the same. What was accepted stands in the ledger.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from infra.config_io import ConfigError
from infra.ledger import Ledger, RunState
from jobs.recipe import Recipe
from jobs.run_dir import RunDir

DriftClass = Literal["free", "warned", "refused"]

# By the longest prefix of the dotted key; stages stand below. A new setting has to be given its class here (a test):
# only a part that is refused as a whole, or has done its work before the first step, stands by its name alone.
CLASSES: Mapping[str, DriftClass] = {
    "name": "refused",
    "seed": "refused",
    "workspace": "free",
    "world": "free",
    "clips": "free",
    "prepare": "free",
    "data": "refused",
    "loader": "refused",
    "loader.prefetch_batches": "free",
    "loader.num_threads": "free",
    "loader.cache_dir": "free",
    "loader.cache_gib": "free",
    "loader.device": "warned",
    "loader.max_damaged_steps": "free",
    "model": "refused",
    "model.video.recompute": "free",
    "model.text.recompute": "free",
    "model.video.offload_activations": "free",
    "model.text.offload_activations": "free",
    "engine": "refused",
    "engine.betas": "warned",
    "engine.eps": "warned",
    "engine.weight_decay": "warned",
    "engine.gradient_clipping": "warned",
    "engine.gradient_reduction": "warned",
    "engine.offload_optimizer": "warned",
    "engine.offload_parameters": "warned",
    "engine.nvme_path": "free",
    "engine.bucket_bytes": "free",
    "cluster.address": "free",
    "cluster.num_cpus": "free",
    "cluster.num_workers": "warned",
    "cluster.cpus_per_worker": "warned",
    "cluster.use_gpu": "warned",
    "cluster.max_failures": "free",
    "cluster.max_crashes_at_one_step": "free",
    "cluster.max_preemptions": "free",
    "cluster.collective_timeout_s": "free",
    "cluster.device_memory": "free",
    "checkpoint.every_steps": "free",
    "checkpoint.keep_last": "free",
    "checkpoint.keep_best": "free",
    "checkpoint.mirror": "free",
    "evaluation.batch_size": "free",
    "evaluation.max_unreadable_share": "free",
    "evaluation.every_steps": "free",
    "guard.max_nonfinite_in_a_row": "free",
    "guard.max_rollbacks": "free",
    "guard.spike_sigma": "free",
    "guard.spike_window": "free",
    "tracking.backend": "free",
    "tracking.uri": "free",
    "tracking.experiment": "free",
    "tracking.upload_weights": "free",
    "inflation": "warned",
    "log_every_steps": "free",
}
# Of a stage that has begun. One that is done is refused whole; of one that has not begun all is warned but its name,
# which tells stages apart: one that is gone or stands elsewhere is another curriculum, one more at the end is not.
STAGE_CLASSES: Mapping[str, DriftClass] = {
    "name": "refused",
    "num_frames": "refused",
    "keep_rate": "refused",
    "num_local_blocks": "refused",
    "num_random_blocks": "refused",
    "block_size": "refused",
    "num_steps": "warned",
    "num_epochs": "warned",
    "global_batch_size": "refused",
    "micro_batch_size": "free",
    "scene_companions": "refused",
    "learning_rate": "warned",
    "warmup_steps": "warned",
    "floor": "warned",
}


@dataclass(frozen=True, slots=True)
class Drift:
    """One value that differs."""

    key: str
    old: str
    new: str
    kind: DriftClass

    def __str__(self) -> str:
        return f"{self.key}: the run has {self.old}, the recipe now says {self.new}"


def class_of(key: str, state: RunState, num_stages: int) -> DriftClass:
    """How a change of a dotted key is taken in a run that has come so far, and has so many stages."""
    parts = key.split(".")
    if parts[0] == "stages":
        number = int(parts[1]) + 1
        if number > num_stages:
            return "warned"
        if parts[2] == "name" or state.stage(number).status in ("trained", "done"):
            return "refused"
        return "warned" if not state.stage(number).starts else STAGE_CLASSES[parts[2]]
    for length in range(len(parts), 0, -1):
        if (found := CLASSES.get(".".join(parts[:length]))) is not None:
            return found
    raise KeyError(key)


def find_drift(old: Recipe, new: Recipe, state: RunState) -> list[Drift]:
    """All values that differ, in the order of their keys."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    nothing = "nothing"
    return [
        Drift(
            key,
            str(before.get(key, nothing)),
            str(after.get(key, nothing)),
            class_of(key, state, len(old.stages)),
        )
        for key in sorted(before.keys() | after.keys())
        if before.get(key, nothing) != after.get(key, nothing)
    ]


def require_allowed(found: Sequence[Drift], run: RunDir, allow_drift: bool) -> None:
    """Raises ConfigError that names what is refused, unless it is allowed."""
    refused = [drift for drift in found if drift.kind == "refused"]
    if refused and not allow_drift:
        raise ConfigError(
            str(run.path),
            [
                *map(str, refused),
                "the run was started with another recipe; continue it with svitt resume, choose another --run-dir, or "
                "take the change into this run with --allow-drift",
            ],
        )


def record_drift(found: Sequence[Drift], ledger: Ledger) -> None:
    """Adds accepted changes to the run's fact `drift`: a list of {key, old, new, class}, all of them so far. One that
    the newest entry of its key tells already is that of a command which was killed before it took it over.
    """
    known = list(ledger.read().facts.get("drift", []))
    newest = {entry["key"]: entry for entry in known}
    entries = [{"key": d.key, "old": d.old, "new": d.new, "class": d.kind} for d in found]
    known += [entry for entry in entries if newest.get(entry["key"]) != entry]
    ledger.record_run(drift=known)


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys to plain values; an empty list is a value."""
    if isinstance(tree, dict) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    return {
        key: value
        for name, part in items
        for key, value in flat(part, f"{prefix}.{name}" if prefix else name).items()
    }


class LostHistoryError(RuntimeError):
    """A stage whose ledger tells of checkpoints of which none is good any more."""


def require_history(state: RunState, number: int, run: RunDir) -> None:
    """Called where a stage has no good checkpoint: raises LostHistoryError when it has had one, so that a run with
    history never starts from zero by itself.
    """
    facts = state.stage(number).facts
    if facts.get("step", 0) > 0:
        raise LostHistoryError(
            f"stage {number} has been trained to step {facts['step']}, but none of the checkpoints in "
            f"{run.checkpoints(number)} is good: the last one was {facts.get('checkpoint')}. Bring one back (from "
            "checkpoint.mirror or a backup), or start the run anew: svitt submit --fresh"
        )
