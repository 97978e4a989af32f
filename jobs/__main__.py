"""The command line: `svitt VERB ...`, also `python -m jobs VERB ...`.

Verbs import what they need when they run, so that `svitt --help` answers at once.
"""

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from infra.config_io import ConfigError
from infra.memory_budget import parse_memory
from infra.redaction import RedactingFilter, redacted
from infra.runtime import prepare_process
from jobs.progress import ProgressReport
from jobs.recipe import Recipe, load_recipe, load_recipe_tree, resolve_paths
from jobs.run_dir import RunDir

RecipeArg = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RECIPE", help="A YAML file, or the name of a shipped one."),
]
RunArg = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR", help="A run directory.")]
ModelArg = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_DIR", help="A folder of svitt export.")
]
Workspace = Annotated[Path, tyro.conf.arg(help="Folder that relative paths of the recipe start from.")]
Overrides = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        name="set", metavar="KEY=VALUE", help="Overrides one value of the recipe; may be repeated."
    ),
]
AllowDrift = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="Takes over changes of the recipe that make it another run."),
]
Address = Annotated[
    str | None,
    tyro.conf.arg(help="A running Ray cluster: auto or http://HOST:8265. Without it a local Ray is used."),
]


def demo(
    recipe: Annotated[str, tyro.conf.arg(help="A recipe file or shipped name.")] = "demo",
    workspace: Workspace = Path("demo"),
    set_: Overrides = (),
) -> int:
    """Generate egocentric video, prepare it, train two stages, score them, show where to look."""
    from jobs.demo import run_demo

    resolved = _resolve(recipe, workspace, set_)
    return run_demo(resolved, _run_dir(resolved, None), _report())


def synth(recipe: RecipeArg, workspace: Workspace = Path(), set_: Overrides = ()) -> int:
    """Write the generated egocentric world: videos, narrations, taxonomy."""
    from jobs.data import synth as run

    run(_resolve(recipe, workspace, set_), _report())
    return 0


def clips(recipe: RecipeArg, workspace: Workspace = Path(), set_: Overrides = ()) -> int:
    """Turn narrations into an EgoClip TSV and an EgoMCQ JSON."""
    from jobs.data import clips as run

    run(_resolve(recipe, workspace, set_), _report())
    return 0


def prepare(
    recipe: RecipeArg,
    workspace: Workspace = Path(),
    set_: Overrides = (),
    address: Address = None,
    plan: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Only say what is needed, there and absent.")
    ] = False,
    verify: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Only read the shards again and name damaged ones."),
    ] = False,
    repair: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="The same, then rebuild what is damaged.")
    ] = False,
) -> int:
    """Turn narrated clips and a folder of videos into verified shards, on a Ray cluster."""
    from jobs.data import prepare_on
    from jobs.prepare_plan import plan_lines

    if plan + verify + repair > 1:
        raise ConfigError("svitt prepare", ["--plan, --verify and --repair exclude each other; give one"])
    resolved, report = _resolve(recipe, workspace, set_), _report()
    if plan:
        for line in plan_lines(resolved):
            report.say(line)
        return 0
    return prepare_on(resolved, address, report, "verify" if verify else "repair" if repair else None)


def submit(
    recipe: RecipeArg,
    workspace: Workspace = Path(),
    run_dir: Annotated[Path | None, tyro.conf.arg(help="Default: <workspace>/runs/<recipe name>.")] = None,
    set_: Overrides = (),
    address: Address = None,
    allow_drift: AllowDrift = False,
    fresh: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Puts what the run directory holds aside and starts from zero."),
    ] = False,
) -> int:
    """Train the stages of a recipe as chained Ray jobs. Submitting twice continues, it does not train twice."""
    from jobs.submit import open_run, put_aside, require_shards
    from jobs.submit import submit as run

    resolved, report = _resolve(recipe, workspace, set_), _report()
    require_shards(resolved)
    folder = _run_dir(resolved, run_dir)
    if fresh:
        put_aside(folder, report.say)
    return run(open_run(resolved, folder, allow_drift, report.say), address, report)


def resume(
    run_dir: RunArg, set_: Overrides = (), address: Address = None, allow_drift: AllowDrift = False
) -> int:
    """Continue a run from its last committed checkpoint, with the recipe it was started with."""
    from jobs.submit import require_shards, take_over
    from jobs.submit import submit as run

    found, report = _open(run_dir), _report()
    recipe = found.recipe()
    if set_:
        recipe = load_recipe(str(found.recipe_file), set_)
    require_shards(recipe)
    take_over(recipe, found, allow_drift, report.say)
    return run(found, address, report)


def status(
    run_dir: RunArg,
    json: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="All of it for a program to read.")
    ] = False,
) -> int:
    """Show stages, steps, time left, scores, checkpoints, faults survived and goodput of a run."""
    from jobs.status import show_status

    show_status(_open(run_dir), _report(), as_json=json)
    return 0


def stop(run_dir: RunArg) -> int:
    """Ask a run to save and leave."""
    from jobs.stop import ask_to_stop

    run = _open(run_dir)
    run.recipe()
    ask_to_stop(run, "user")
    _report().say(
        f"asked for: the run saves before its next step and leaves. Go on with: svitt resume {run.path}"
    )
    return 0


def logs(run_dir: RunArg, lines: Annotated[int, tyro.conf.arg(help="How many of each log.")] = 40) -> int:
    """Show the last lines of every log of a run."""
    from jobs.status import show_logs

    show_logs(_open(run_dir), lines, _report())
    return 0


def pretrain(run_dir: RunArg, stage: int, attempt: int = 1, address: Address = None) -> int:
    """Train one stage in the foreground: what a stage job runs."""
    from jobs.stage import run_stage

    return run_stage(run_dir, stage, attempt, address)


def control(run_dir: RunArg, address: Address = None) -> int:
    """Walk the stages of a run: what the controller job runs."""
    from jobs.controller import run_controller

    return run_controller(run_dir, address or "auto")


def evaluate(
    run_dir: RunArg,
    stage: Annotated[int | None, tyro.conf.arg(help="Default: the newest stage with a checkpoint.")] = None,
    retrieval: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Also text-video retrieval over all held-out clips."),
    ] = False,
    vtm: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Also EgoMCQ by the matching head.")
    ] = False,
    sweep: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(
            metavar="SETTING=VALUES",
            help="Also EgoMCQ against cost under other sparsity, such as keep_rate=0.5,0.7; may be repeated: all "
            "combinations.",
        ),
    ] = (),
    epic_mir: Annotated[
        tuple[str, str] | None,
        tyro.conf.arg(
            metavar="SHARDS ANNOTATIONS",
            help="Also EPIC-KITCHENS-100's multi-instance retrieval: a set that prepare made of its test clips, and "
            "the folder of its retrieval_annotations.",
        ),
    ] = None,
) -> int:
    """Score a stage's newest checkpoint again: EgoMCQ inter and intra, the temporal probe."""
    from jobs.rescore import Extras, rescore

    return rescore(_open(run_dir), stage, _report(), Extras(retrieval, vtm, sweep, epic_mir))


def report(
    run_dir: RunArg,
    output: Annotated[Path | None, tyro.conf.arg(help="Default: RUN_DIR/report.html.")] = None,
    pictures: Annotated[bool, tyro.conf.arg(help="With what the model looks at; needs a checkpoint.")] = True,
) -> int:
    """Write one page about a run: curriculum, curves, scores, faults, and what the model looks at."""
    from jobs.report import write_report

    run = _open(run_dir)
    return write_report(run, output or run.path / "report.html", _report(), pictures)


def compare(
    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="RUN_DIR", help="Run directories; the first is what the others are held against."
        ),
    ],
    html: Annotated[Path | None, tyro.conf.arg(help="Also as a page with curves.")] = None,
    csv: Annotated[Path | None, tyro.conf.arg(help="Also as CSV.")] = None,
) -> int:
    """Show what differs between runs: settings, data, code; their scores, and whether that is luck; their cost."""
    from jobs.compare import compare as run

    return run(runs, _report(), html, csv)


def lineage(
    target: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="MODEL",
            help="champion, latest-stage, a version's number, a checkpoint's folder or a run directory.",
        ),
    ],
    workspace: Annotated[Path, tyro.conf.arg(help="Whose mlflow.db has the aliases and versions.")] = Path(),
    uri: Annotated[str | None, tyro.conf.arg(help="Another MLflow, such as http://127.0.0.1:5000.")] = None,
    model: Annotated[
        str | None, tyro.conf.arg(help="Registered model, a recipe's name. Default: the only one.")
    ] = None,
    json: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="All of it for a program to read.")
    ] = False,
) -> int:
    """Show where a model comes from: version, checkpoint, parents, data, code, recipe, scores."""
    from jobs.lineage import show_lineage

    return show_lineage(target, workspace, uri, model, _report(), as_json=json)


def champion(
    run_dir: RunArg,
    force: Annotated[
        str | None,
        tyro.conf.arg(metavar="REASON", help="Makes it champion whatever its score, and keeps why."),
    ] = None,
    stage: Annotated[
        int | None, tyro.conf.arg(help="With --force. Default: the newest that is done.")
    ] = None,
) -> int:
    """Tell MLflow of a run's checkpoints and hold them against the champion, or make one champion by hand."""
    from jobs.champion import show_champion

    return show_champion(_open(run_dir), stage, force, _report())


def rebuild(
    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR", help="Run directories.")
    ],
    uri: Annotated[str | None, tyro.conf.arg(help="Another MLflow than that of the recipe.")] = None,
) -> int:
    """Make the MLflow runs of run directories again, or whole, from their journals and ledgers."""
    from jobs.rebuild import rebuild as run

    return run(runs, uri, _report())


def export(
    run_dir: RunArg,
    output: Annotated[Path, tyro.conf.arg(help="The folder to write; must not exist.")],
    stage: Annotated[int | None, tyro.conf.arg(help="Default: the newest stage with a checkpoint.")] = None,
) -> int:
    """Write a stage's weights as a folder that Hugging Face's transformers loads without this project."""
    from jobs.export import export as run

    return run(_open(run_dir), output, stage, _report())


def embed(
    model_dir: ModelArg,
    source: Annotated[
        Path,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="INPUT", help="A folder of videos, a video, or a text file with a sentence a line."
        ),
    ],
    output: Annotated[Path, tyro.conf.arg(help="A .parquet or .npy file.")],
    clip_s: Annotated[
        float, tyro.conf.arg(help="Seconds of the clips that videos are cut into; best as in training.")
    ] = 2.0,
    stride_s: Annotated[
        float | None,
        tyro.conf.arg(help="Seconds from one clip's start to the next; less than --clip-s: they overlap."),
    ] = None,
    batch_size: Annotated[int, tyro.conf.arg(help="Clips encoded at once.")] = 16,
    device: Annotated[Literal["cpu", "cuda"], tyro.conf.arg(help="Where the model runs.")] = "cpu",
) -> int:
    """Encode videos, clip by clip, or sentences with an exported model."""
    from jobs.embed import embed as run

    return run(model_dir, source, output, clip_s, batch_size, device, _report(), stride_s)


def search(
    embeddings: Annotated[
        Path,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="EMBEDDINGS", help="A .parquet file of svitt embed."),
    ],
    model_dir: ModelArg,
    sentence: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="SENTENCE", help="What the clips shall show.")
    ],
    top: Annotated[int, tyro.conf.arg(help="How many clips to show.")] = 5,
) -> int:
    """Find the embedded clips that a sentence describes best."""
    from jobs.search_clips import search as run

    return run(embeddings, model_dir, sentence, top, _report())


def plan(
    recipe: RecipeArg,
    workspace: Workspace = Path(),
    set_: Overrides = (),
    memory: Annotated[
        str | None, tyro.conf.arg(help="Memory of one device, as 8GiB. Default: cluster.device_memory.")
    ] = None,
    devices: Annotated[
        int | None, tyro.conf.arg(help="Devices that train. Default: cluster.num_workers.")
    ] = None,
    host_memory: Annotated[
        str | None, tyro.conf.arg(help="Memory of the host that they share. Default: this machine's.")
    ] = None,
    write: Annotated[
        Path | None, tyro.conf.arg(help="Writes the recipe with the settings found to this file.")
    ] = None,
    verify: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="Then rehearses a step of each stage here, under the enforced limit."),
    ] = False,
) -> int:
    """Say what fits in a device's memory, stage by stage, and find the fastest settings that do."""
    from jobs.plan import Wanted, run_plan

    resolved = _resolve(recipe, workspace, set_)
    amount = memory or resolved.cluster.device_memory
    if amount is None:
        raise ConfigError("svitt plan", ["give --memory, as 8GiB, or set cluster.device_memory"])
    wanted = Wanted(
        _amount("--memory", amount),
        resolved.cluster.num_workers if devices is None else devices,
        None if host_memory is None else _amount("--host-memory", host_memory),
        verify,
    )
    return run_plan(resolved, load_recipe_tree(recipe, set_), wanted, write, _report())


def _amount(option: str, text: str) -> int:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise ConfigError(option, [str(error)]) from error


def _bench_model(
    record: Annotated[Path, tyro.conf.arg(help="JSON file that the figures are written to.")] = Path(
        "bench-model.json"
    ),
    threads: Annotated[int | None, tyro.conf.arg(help="Compute threads. Default: all cores.")] = None,
    quick: Annotated[
        bool, tyro.conf.arg(help="4 frames and few samples: minutes instead of half an hour.")
    ] = False,
    frames: Annotated[
        tuple[int, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="N", help="Only this frame count, and no fit of the growth; may be repeated."),
    ] = (),
    only: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(
            metavar="TEXT",
            help="Only cases with this in their title, such as 'layer fused'; may be repeated.",
        ),
    ] = (),
    device: Annotated[
        Literal["cpu", "cuda"], tyro.conf.arg(help="cpu in float32, cuda in bfloat16.")
    ] = "cpu",
    clips: Annotated[int, tyro.conf.arg(help="Clips of one step; a GPU wants some 32 to be busy.")] = 1,
) -> int:
    """Time and memory of attention and encoder, against torch's and Hugging Face's dense models."""
    from jobs.bench_cases import Setup
    from jobs.bench_model import Plan, bench_model

    setup = Setup(device, "float32" if device == "cpu" else "bfloat16", clips)
    plan = replace(Plan.quick() if quick else Plan(), only=only, setup=setup)
    if frames:
        plan = replace(plan, frames=frames, growth_frames=())
    num_threads = len(os.sched_getaffinity(0)) if threads is None else threads
    return bench_model(plan, num_threads, record, _report())


def _bench_data(
    recipe: RecipeArg,
    workspace: Workspace = Path(),
    set_: Overrides = (),
    record: Annotated[Path, tyro.conf.arg(help="JSON file that the figures are written to.")] = Path(
        "bench-data.json"
    ),
    threads: Annotated[
        int | None, tyro.conf.arg(help="Threads of our loader, workers of the other. Default: all cores.")
    ] = None,
    quick: Annotated[bool, tyro.conf.arg(help="Few samples of little: under a minute.")] = False,
    batches: Annotated[int | None, tyro.conf.arg(help="Batches of 16 clips in a round of loading.")] = None,
    shards: Annotated[int | None, tyro.conf.arg(help="Shards built in a round of preparing.")] = None,
    rounds: Annotated[int | None, tyro.conf.arg(help="Samples of everything.")] = None,
    skip: Annotated[
        Literal["loading", "preparing"] | None, tyro.conf.arg(help="A part not to measure.")
    ] = None,
) -> int:
    """Loading, against a DataLoader on the videos, and preparing, against decoding alone."""
    from jobs.bench_data import DataPlan, bench_data

    plan = DataPlan.quick() if quick else DataPlan()
    plan = replace(
        plan,
        batches=plan.batches if batches is None else batches,
        shards=plan.shards if shards is None else shards,
        loading_rounds=0 if skip == "loading" else rounds or plan.loading_rounds,
        preparing_rounds=0 if skip == "preparing" else rounds or plan.preparing_rounds,
    )
    num_threads = len(os.sched_getaffinity(0)) if threads is None else threads
    return bench_data(_resolve(recipe, workspace, set_), plan, num_threads, record, _report())


def _bench_train(
    record: Annotated[Path, tyro.conf.arg(help="JSON file that the figures are written to.")] = Path(
        "bench-train.json"
    ),
    threads: Annotated[
        int | None,
        tyro.conf.arg(help="Compute threads of batch, shared by the ranks of engines. Default: all cores."),
    ] = None,
    quick: Annotated[bool, tyro.conf.arg(help="The tiny model, small batches, one sample.")] = False,
    only: Annotated[
        tuple[Literal["batch", "engines", "overhead"], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="PART", help="batch, engines or overhead; may be repeated. Default: all."),
    ] = (),
    size: Annotated[
        Literal["tiny", "small", "base"] | None,
        tyro.conf.arg(help="Model of batch and engines. Default: small."),
    ] = None,
    frames: Annotated[
        int | None, tyro.conf.arg(help="Frames of a clip, of batch and engines. Default: 4.")
    ] = None,
    micro_batch: Annotated[int | None, tyro.conf.arg(help="Clips encoded at once. Default: 8.")] = None,
    batches: Annotated[
        tuple[int, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(
            metavar="N", help="Clips of a step of batch; may be repeated. Default: 64 256 1024 4096."
        ),
    ] = (),
    pass_batch: Annotated[
        int | None, tyro.conf.arg(help="Clips of the step in one pass and in two. Default: 16.")
    ] = None,
    engine_batch: Annotated[
        int | None, tyro.conf.arg(help="Clips of a step of engines. Default: 32.")
    ] = None,
    engine: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="NAME", help="Only plain and this one, such as 'ZeRO 2'; may be repeated."),
    ] = (),
    rounds: Annotated[int | None, tyro.conf.arg(help="Samples taken in turn. Default: 3.")] = None,
    limit_s: Annotated[float | None, tyro.conf.arg(help="Longest time of one case. Default: 5400.")] = None,
    recipe: Annotated[str, tyro.conf.arg(help="Of overhead: a recipe file or shipped name.")] = "demo",
    workspace: Annotated[
        Path, tyro.conf.arg(help="Of overhead: where the recipe's shards are prepared.")
    ] = Path("demo"),
    set_: Overrides = (),
    stage: Annotated[
        int | None, tyro.conf.arg(help="Of overhead: which of the recipe's. Default: 1.")
    ] = None,
    steps: Annotated[
        int | None, tyro.conf.arg(help="Of overhead. Default: ten times checkpoint.every_steps.")
    ] = None,
) -> int:
    """The step: contrastive batch against memory, engines, and what the pipeline costs around it."""
    from jobs.bench_train import PLAIN, TrainPlan, bench_train, with_options

    plan = with_options(
        TrainPlan.quick() if quick else TrainPlan(),
        parts=only,
        size=size,
        num_frames=frames,
        micro_batch_size=micro_batch,
        batches=batches,
        pass_batch=pass_batch,
        engine_batch=engine_batch,
        engines=tuple(dict.fromkeys((PLAIN, *engine))) if engine else (),
        rounds=rounds,
        limit_s=limit_s,
        stage=stage,
        steps=steps,
    )
    resolved = _resolve(recipe, workspace, set_) if "overhead" in plan.parts else None
    num_threads = len(os.sched_getaffinity(0)) if threads is None else threads
    return bench_train(plan, resolved, num_threads, record, _report())


def bench(
    what: Annotated[
        Annotated[int, tyro.conf.subcommand("model", constructor=_bench_model, prefix_name=False)]
        | Annotated[int, tyro.conf.subcommand("data", constructor=_bench_data, prefix_name=False)]
        | Annotated[int, tyro.conf.subcommand("train", constructor=_bench_train, prefix_name=False)],
        tyro.conf.arg(name=""),
    ],
) -> int:
    """Measure on this machine, and write a record: model, data or train."""
    # What was measured has run by now; this is its exit code.
    return what


VERBS = {
    verb.__name__: verb
    for verb in (
        demo,
        synth,
        clips,
        prepare,
        submit,
        resume,
        status,
        stop,
        logs,
        pretrain,
        control,
        evaluate,
        report,
        compare,
        lineage,
        champion,
        rebuild,
        export,
        embed,
        search,
        plan,
        bench,
    )
}


def main() -> int:
    """Runs one verb. What a user can mend ends in a message and exit code 2, not in a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(RedactingFilter())
    prepare_process()
    try:
        return tyro.extras.subcommand_cli_from_dict(VERBS, prog="svitt", description="Pretrains SViTT-Ego.")
    except Exception as error:
        if not type(error).__module__.startswith(("pipeline.", "model.", "infra.", "jobs.")):
            raise
        print(f"svitt: {redacted(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("svitt: interrupted; the same command continues", file=sys.stderr)
        return 130


def _report() -> ProgressReport:
    return ProgressReport(Console())


def _resolve(recipe: str, workspace: Path, overrides: tuple[str, ...]) -> Recipe:
    return resolve_paths(load_recipe(recipe, overrides), workspace)


def _run_dir(recipe: Recipe, run_dir: Path | None) -> Path:
    return run_dir if run_dir is not None else Path(recipe.workspace) / "runs" / recipe.name


def _open(run_dir: Path) -> RunDir:
    return RunDir(run_dir.resolve())


if __name__ == "__main__":
    sys.exit(main())
