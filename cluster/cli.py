"""The command line `baton`. Heavy parts are imported by the command that needs them."""

import asyncio
import errno
import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from typer.core import TyperGroup

from cluster.config import ClusterConfig
from cluster.config_file import load_config
from core.errors import BatonError, ConfigError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """An error of ours is its message and status 1, never a traceback, and so is a full disk;
        an interrupt that no command has more to say of is one word and status 130.
        """
        try:
            return super().invoke(ctx)
        except BatonError as error:
            for line in error.message.splitlines() or [type(error).__name__]:
                prefix = "" if line.startswith(" ") else "error: "
                print(f"{prefix}{line}", file=sys.stderr)
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno not in _DISK:
                raise
            place = error.filename or "the output"
            print(f"error: {place} cannot be written: {error.strerror}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(
    cls=_Group, help="Show, check and describe the cluster config.", no_args_is_help=True
)
app.add_typer(config_app, name="config")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Cluster config, a YAML file.")
]
ModelOption = Annotated[
    Path | None, typer.Option(help="Checkpoint folder; wins over model.path of the config.")
]
PortOption = Annotated[
    int | None, typer.Option(help="Port of the router; 0 takes a free one.", min=0, max=65535)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
RunOption = Annotated[
    str | None, typer.Option("--run", help="Which cluster, when several are running.")
]


def main() -> None:
    """Run the command of `sys.argv`; see cluster/entry.py. SIGTERM ends it as an interrupt does:
    nothing of it is left. `up` and `demo` hear both themselves.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"baton {version('baton')}")
        raise typer.Exit


@app.callback()
def baton(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and end.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Serve a large language model with prefill and decode on separate pools of workers."""


@app.command()
def up(
    config: ConfigOption = None,
    model: ModelOption = None,
    port: PortOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a cluster in the foreground; Ctrl-C stops it."""
    settings = _settings(config, model, port)
    from cluster.up import run_up  # noqa: PLC0415 - imports Ray

    run_up(settings, as_json=as_json)


@app.command()
def down(
    run: RunOption = None,
    every: Annotated[bool, typer.Option("--all", help="Stop all clusters of this user.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds for an orderly stop.", min=0)] = 60.0,
) -> None:
    """Stop a running cluster and wait until nothing of it is left, nor of killed ones."""
    from cluster.run_dir import live_runs, runs_root  # noqa: PLC0415
    from cluster.runs import choose_run, stop_run  # noqa: PLC0415
    from cluster.sweep import sweep_dead_runs  # noqa: PLC0415

    for run_id in sweep_dead_runs(runs_root()):
        print(f"removed what run {run_id} had left behind")
    living = live_runs(runs_root())
    if not living and run is None:
        print("no cluster is running")
        return
    for one in living if every else [choose_run(run)]:
        orderly = stop_run(one, timeout_s)
        print(f"cluster {one.run_id} " + ("stopped" if orderly else "had to be killed"))


@app.command()
def status(
    run: RunOption = None,
    leases: Annotated[bool, typer.Option(help="Who holds which blocks for how long.")] = False,
    transfers: Annotated[bool, typer.Option(help="Who read how much KV from whom.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the workers of a running cluster, their load and their KV cache."""
    from cluster.runs import choose_run  # noqa: PLC0415
    from cluster.status_view import read_status, show_status, status_json  # noqa: PLC0415
    from cluster.worker_control import GrpcWorkerControl  # noqa: PLC0415

    seen = asyncio.run(read_status(choose_run(run), GrpcWorkerControl()))
    if as_json:
        print(status_json(seen))
    else:
        show_status(seen, Console(), leases=leases, transfers=transfers)


@app.command()
def demo(
    model: ModelOption = None,
    config: ConfigOption = None,
) -> None:
    """Start a cluster, chat with it, show where the time went, check every answer, stop it."""
    try:
        from cluster.demo import run_demo  # noqa: PLC0415 - imports Ray, torch and transformers
    except ModuleNotFoundError as error:
        if error.name not in {"openai", "httpx"}:
            raise
        raise ConfigError("the demo needs the openai client: pip install 'baton[demo]'") from error
    raise typer.Exit(run_demo(config, model))


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="Which one; without, list them.")] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats, under a minute.")] = False,
    part: Annotated[
        list[str] | None, typer.Option(help="Only this part of it; may be given again.")
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(
            help="A trace to replay (routing, router, reproduce, validate); may be given again.",
            dir_okay=False,
        ),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Other systems too: see make peers (bench router).")
    ] = False,
    profiles: Annotated[
        Path | None,
        typer.Option(help="Folder of measured profiles (bench validate).", file_okay=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON object alone.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON object and the plot.", file_okay=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for the plot.", dir_okay=False)
    ] = None,
) -> None:
    """Measure on this machine what the design promises; the last line is one JSON object."""
    from benchmarks.run import Options, describe_benches, run_bench  # noqa: PLC0415

    if name is None:
        print(describe_benches())
        return
    options = Options(
        quick=quick,
        parts=tuple(part or ()),
        peers=peers,
        traces=tuple(trace or ()),
        profiles=profiles,
        only_json=as_json,
        out=out,
        plot=plot,
    )
    run_bench(name, options)


TraceOption = Annotated[
    str,
    typer.Option(
        help="Requests: a trace file of any known format, or a generator such as"
        " poisson:rate=4,prompt=1000,shared=512 (shared: whole blocks of 512 tokens, rounded down)."
    ),
]
RequestsOption = Annotated[
    int | None, typer.Option(help="So many requests: the first ones, or repeated.", min=1)
]
MostPromptOption = Annotated[
    int | None, typer.Option(help="Longer prompts are cut to so many tokens.", min=1)
]
PlotOption = Annotated[Path | None, typer.Option(help="PNG file for the plot.", dir_okay=False)]


@app.command()
def simulate(
    trace: TraceOption,
    *,
    config: ConfigOption = None,
    rate_scale: Annotated[
        float, typer.Option(help="Times the trace's rate.", min=1e-6, max=1e6)
    ] = 1.0,
    requests: RequestsOption = None,
    max_prompt_tokens: MostPromptOption = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Run a trace through the cluster of a config under a virtual clock; the result is simulated.

    The last line is one JSON object.
    """
    from cluster.simulate import Options, run_simulate  # noqa: PLC0415

    options = Options(
        trace=trace,
        rate_scale=rate_scale,
        requests=requests,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        only_json=as_json,
        plot=plot if plot is not None or as_json else Path("baton-simulate.png"),
    )
    run_simulate(_simulated(config), options)


@app.command()
def goodput(
    trace: TraceOption,
    *,
    config: ConfigOption = None,
    system: Annotated[
        list[str] | None, typer.Option(help="Only this system; may be given again.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of each run.", min=50)] = 3000,
    max_prompt_tokens: MostPromptOption = None,
    seeds: Annotated[int, typer.Option(help="Repeats, for the intervals.", min=1, max=10)] = 5,
    share: Annotated[
        float, typer.Option(help="Of the requests, to keep both targets.", min=0.01, max=1)
    ] = 0.9,
    rate_scale: Annotated[
        float,
        typer.Option(help="Times the trace's rate, where the search begins.", min=1e-6, max=1e6),
    ] = 1.0,
    processes: Annotated[int, typer.Option(help="0: one per core.", min=0)] = 0,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Find the highest rate at which several systems keep both targets, simulated, at equal GPUs.

    The last line is one JSON object.
    """
    from cluster.goodput import Options, run_goodput  # noqa: PLC0415
    from simulator.goodput import Question  # noqa: PLC0415

    options = Options(
        question=Question(
            trace=trace,
            requests=requests,
            share=share,
            first_scale=rate_scale,
            max_prompt_tokens=max_prompt_tokens,
        ),
        systems=tuple(system or ()),
        seeds=seeds,
        processes=processes,
        only_json=as_json,
        plot=plot if plot is not None or as_json else Path("baton-goodput.png"),
    )
    run_goodput(_simulated(config), options)


@app.command()
def profile(
    url: Annotated[str, typer.Option(help="The router: http://HOST:PORT.")],
    out: Annotated[Path, typer.Option(help="The profile, a JSON file.", dir_okay=False)],
    *,
    api_key: Annotated[
        str | None, typer.Option(help="One of router.api_keys.", envvar="BATON_API_KEY")
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="A prompt length; may be given again.", min=1)
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Answers at once; may be given again.", min=1)
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Prompt length of these; may be given again.", min=1)
    ] = None,
    answer_tokens: Annotated[int, typer.Option(help="Length of an answer.", min=8)] = 64,
    repeats: Annotated[int, typer.Option(help="Prompts of each length.", min=1)] = 5,
    decode_workers: Annotated[int, typer.Option(help="That share a batch.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="What the workers run on, for the file.")] = "unknown",
    tp: Annotated[int, typer.Option(help="Tensor parallel degree, for the file.", min=1)] = 1,
    block_size: Annotated[
        int, typer.Option(help="engine.block_size of the cluster, for the room of its KV.", min=1)
    ] = 16,
    vocab: Annotated[int, typer.Option(help="Token ids below this are sent.", min=2)] = 256,
    timeout_s: Annotated[float, typer.Option(help="For one answer.", min=1)] = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Measure a running cluster with real requests; write a profile that simulations read.

    The last line is one JSON object.
    """
    from cluster.profile import ProfileOptions, run_profile  # noqa: PLC0415

    run_profile(
        ProfileOptions(
            url=url,
            api_key=api_key,
            out=out,
            prompts=tuple(prompt or (64, 256, 1024, 2048)),
            batches=tuple(batch or (1, 4, 16)),
            contexts=tuple(context or (128, 1024)),
            answer_tokens=answer_tokens,
            repeats=repeats,
            decode_workers=decode_workers,
            device=device,
            tp=tp,
            block_size=block_size,
            vocab=vocab,
            timeout_s=timeout_s,
            only_json=as_json,
        )
    )


@app.command()
def plan(
    trace: TraceOption,
    *,
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a name such as llama-3-8b.")],
    gpu: Annotated[
        list[str], typer.Option(help="A kind, h100, or at most so many of it, a100:16; repeatable.")
    ],
    gpus: Annotated[int, typer.Option(help="GPUs in all.", min=1, max=4096)],
    slo: Annotated[str, typer.Option(help="TTFT/TPOT in ms, and percent of requests: 500/50/90.")],
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests/s to serve, to learn if fewer GPUs would do, or these are too few.",
            min=1e-6,
        ),
    ] = None,
    affinity: Annotated[
        str, typer.Option(help="high: KV may cross nodes; low: it stays within one.")
    ] = "high",
    node_gpus: Annotated[int, typer.Option(help="GPUs of a node.", min=1)] = 8,
    chunk: Annotated[
        list[int] | None, typer.Option(help="Tokens per step to try; may be given again.", min=1)
    ] = None,
    requests: Annotated[
        int, typer.Option(help="Of the trace; longer runs repeat them.", min=100)
    ] = 1200,
    max_prompt_tokens: MostPromptOption = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same plans.")] = 0,
    processes: Annotated[int, typer.Option(help="0: one per core.", min=0)] = 0,
    write: Annotated[
        Path | None, typer.Option(help="Write the best plan as a cluster config.", dir_okay=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the GPUs, tensor parallelism, P:D ratio and chunk size of the highest simulated goodput.

    The last line is one JSON object.
    """
    from cluster.plan import CHUNKS, Options, run_plan  # noqa: PLC0415

    options = Options(
        model=model,
        gpu=tuple(gpu),
        gpus=gpus,
        slo=slo,
        trace=trace,
        rate_rps=rate,
        affinity=affinity,
        node_gpus=node_gpus,
        chunks=tuple(chunk or CHUNKS),
        requests=requests,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        processes=processes,
        only_json=as_json,
        write=write,
    )
    run_plan(options)


@config_app.command()
def show(
    config: ConfigOption = None, model: ModelOption = None, as_json: JsonOption = False
) -> None:
    """Print all settings, defaults filled in; API keys and passwords are masked."""
    from cluster.redis_registry import without_password  # noqa: PLC0415 - imports the client

    without_model = config is None and model is None
    settings = _settings(config, Path() if without_model else model, None)
    tree = settings.model_dump(mode="json")
    tree["router"]["api_keys"] = ["***" for _ in settings.router.api_keys]
    if settings.registry.url is not None:
        tree["registry"]["url"] = without_password(settings.registry.url)
    if without_model:
        tree["model"]["path"] = None
    print(json.dumps(tree) if as_json else yaml.safe_dump(tree, sort_keys=False), end="")
    if as_json:
        print()


@config_app.command()
def check(
    config: ConfigOption = None, model: ModelOption = None, as_json: JsonOption = False
) -> None:
    """Check config, checkpoint, port, registry and GPUs; status 1 and one sentence per problem."""
    from cluster.config_file import BadConfig  # noqa: PLC0415
    from cluster.preflight import find_problems, port_problems  # noqa: PLC0415

    try:
        settings = _settings(config, model, None)
        problems = [*find_problems(settings), *port_problems(settings)]
    except BadConfig as bad:
        problems = bad.problems
    if as_json:
        print(json.dumps({"ok": not problems, "problems": problems}))
    elif problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    else:
        print(
            f"ok: {settings.model.name} on {settings.prefill.workers} prefill and"
            f" {settings.decode.workers} decode workers"
        )
    if problems:
        raise typer.Exit(1)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of the config, with what every key means."""
    print(json.dumps(ClusterConfig.model_json_schema(), indent=2))


def _simulated(config: Path | None) -> ClusterConfig:
    """The config of a cluster that need not have a checkpoint yet."""
    return load_config(config, needs_model=False)


def _settings(config: Path | None, model: Path | None, port: int | None) -> ClusterConfig:
    overrides: dict[str, object] = {}
    if model is not None:
        overrides["model.path"] = model
    if port is not None:
        overrides["router.port"] = port
    return load_config(config, overrides)
