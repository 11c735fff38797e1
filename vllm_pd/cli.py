"""The ``vllm-pd`` command. Parses options; the layers below do the work.

Errors are one line on stderr and a non-zero exit code: 1 for what went wrong,
2 for an option that is wrong, 130 for an interrupt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from vllm_pd import __version__
from vllm_pd.errors import ConfigError, PDError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
fault_app = typer.Typer()
app.add_typer(fault_app, name="fault")

# typer.exceptions has no public name for it; BadParameter is a direct child.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
_INTERRUPTED = 130

RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        envvar="VLLM_PD_RUN_DIR",
        help="Folder for state, logs and key. \\[default: ~/.local/state/vllm-pd]",
    ),
]


def main() -> None:
    """Entry point of the ``vllm-pd`` command."""
    sys.exit(run_cli(sys.argv[1:]))


def run_cli(args: Sequence[str]) -> int:
    """Run one command; return its exit code. Errors of ours are printed, not raised."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=list(args), prog_name="vllm-pd", standalone_mode=False)
    except PDError as exc:
        _print_error(str(exc))
        return _INTERRUPTED if _was_interrupted(exc) else 1
    except _UsageError as exc:
        _print_error(exc.format_message())
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # "vllm-pd logs | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return result if isinstance(result, int) else 0


def _print_error(message: str) -> None:
    sys.stderr.write(f"vllm-pd: error: {' '.join(message.split())}\n")


def _was_interrupted(error: PDError) -> bool:
    from vllm_pd.launcher.launch import UpInterruptedError

    return isinstance(error, UpInterruptedError)


def _console() -> Console:
    return Console(soft_wrap=True)


def _run_dir(path: Path | None) -> Any:
    from vllm_pd.launcher.run_dir import RunDir, default_run_dir

    return RunDir(path or default_run_dir(os.environ))


@app.callback(invoke_without_command=True)
def _vllm_pd(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Disaggregated prefill-decode serving for unmodified vLLM.

    Prefill instances compute a prompt's KV cache, decode instances generate
    from it, and a router in front speaks the OpenAI API.

    [bold]vllm-pd up[/bold] starts all of it, [bold]vllm-pd down[/bold] stops it.
    """
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def up(
    *,
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM_ARGS]", help="Options for every 'vllm serve'."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="MODEL",
            help="Checkpoint folder or Hugging Face name. \\[default: a small demo model]",
        ),
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(
            envvar="PREFILL",
            metavar="NxTP",
            help="Prefill instances and the tensor-parallel size of each, e.g. 1x4. "
            "\\[default: 1x4 with eight devices, half of fewer, 1x1 on CPU]",
        ),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(envvar="DECODE", metavar="NxTP", help="Decode instances, likewise."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            envvar="DEVICE",
            metavar="npu|cuda|cpu",
            help="What to run on. \\[default: the first of these that is found]",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="Topology file (YAML) for everything that has no option here; options win.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(envvar="PORT", help="The router's port. \\[default: 8000]"),
    ] = None,
    prefill_port: Annotated[
        int | None,
        typer.Option(
            envvar="PREFILL_PORT",
            help="Port of the first prefill instance, the others follow. \\[default: 8100]",
        ),
    ] = None,
    decode_port: Annotated[
        int | None,
        typer.Option(
            envvar="DECODE_PORT",
            help="Port of the first decode instance, the others follow. \\[default: 8200]",
        ),
    ] = None,
    run_dir: RunDirOption = None,
    transport: Annotated[
        str | None,
        typer.Option(
            envvar="VLLM_PD_TRANSPORT",
            metavar="auto|hccl|shm|tcp",
            help="How KV blocks move. \\[default: auto, the best that both ends offer]",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="The model's name at the API. \\[default: as given by --model]"),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest sequence, in tokens. \\[default: the model's]"),
    ] = None,
) -> None:
    """Start prefill instances, decode instances and the router; return when they answer.

    They run in the background, watched by a supervisor that restarts what dies.

    [dim]$[/dim] vllm-pd up
    [dim]$[/dim] vllm-pd up --model Qwen/Qwen2.5-7B-Instruct --prefill 1x4 --decode 2x2
    [dim]$[/dim] vllm-pd up --model ./checkpoint -- --max-num-seqs 64
    """
    from vllm_pd.launcher import commands
    from vllm_pd.launcher.options import UpOptions, topology_from

    _check_faults(os.environ)

    options = UpOptions(
        config=config,
        model=model,
        served_model_name=served_model_name,
        device=device,
        prefill=prefill,
        decode=decode,
        port=port,
        prefill_port=prefill_port,
        decode_port=decode_port,
        transport=transport,
        max_model_len=max_model_len,
        args=tuple(args or ()),
    )
    makers = commands.Makers(demo_model=_write_demo_model, cluster_key=_write_cluster_key)
    commands.up(topology_from(options), _run_dir(run_dir), makers, _console())


def _write_demo_model(folder: Path) -> None:
    from vllm_pd.demo.model import write_demo_model

    write_demo_model(folder)


def _write_cluster_key(path: Path) -> None:
    from vllm_pd.session.keys import write_cluster_key

    write_cluster_key(path)


@app.command()
def down(
    run_dir: RunDirOption = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="With an unreadable state file: stop the processes that write to the logs "
            "of this run folder, and remove the file.",
        ),
    ] = False,
) -> None:
    """Stop exactly what 'up' started: router, then prefill, then decode.

    Running it twice is harmless. No other process is ever touched.
    """
    from vllm_pd.launcher import commands

    commands.down(_run_dir(run_dir), _console(), force=force)


@app.command()
def status(
    run_dir: RunDirOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Show what runs.

    Exit code 0: everything is ready; 1: something is not; 3: nothing runs.
    """
    from vllm_pd.launcher import commands

    return commands.status(_run_dir(run_dir), _console(), as_json=as_json)


@app.command()
def logs(
    name: Annotated[
        str | None,
        typer.Argument(help="E.g. prefill-0, decode-0, router, supervisor. \\[default: all]"),
    ] = None,
    num_lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines of each log.")] = 50,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on as lines are added.")
    ] = False,
    run_dir: RunDirOption = None,
) -> None:
    """Show the logs, also those of a start that failed."""
    from vllm_pd.launcher import commands

    commands.logs(_run_dir(run_dir), name, _console(), num_lines=num_lines, following=follow)


@app.command()
def doctor(
    device: Annotated[
        str | None,
        typer.Option(envvar="DEVICE", metavar="npu|cuda|cpu", help="What is to be used."),
    ] = None,
) -> int:
    """Check this machine: devices, versions, driver, network, ports, memory, clock.

    Prints one line each, with what to do. Exit code 1: there is a problem.
    """
    from vllm_pd.launcher.doctor import examine, exit_code

    checks = examine(device, os.environ)
    for check in checks:
        typer.echo(str(check))
    return exit_code(checks)


@app.command()
def router(
    *,
    prefill: Annotated[
        list[str] | None, typer.Option(help="URL of a prefill instance; repeatable.")
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="URL of a decode instance; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    workers: Annotated[
        int | None, typer.Option(help="Processes that share the port. \\[default: 1]")
    ] = None,
    ssl_certfile: Annotated[
        str | None, typer.Option(help="Certificate to serve HTTPS with, and its chain, PEM.")
    ] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Its private key, PEM.")] = None,
    ssl_ca_certs: Annotated[
        str | None, typer.Option(help="Authorities of the clients' certificates, PEM.")
    ] = None,
    ssl_cert_reqs: Annotated[
        int | None, typer.Option(help="2: every client has to have a certificate; 1: may have.")
    ] = None,
    options: Annotated[
        str, typer.Option(metavar="JSON", help="Further keys of the router's configuration.")
    ] = "{}",
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="URL of a collector for traces of the requests.")
    ] = None,
) -> int:
    """Run the router in the foreground, before instances that already run.

    [dim]$[/dim] vllm-pd router --prefill http://10.0.0.1:8100 --decode http://10.0.0.2:8200
    """
    from vllm_pd.config import RouterConfig, from_mapping

    _log_as_vllm()
    values = _json_object(options, source="--options")
    values |= {
        "host": host,
        "port": port,
        "prefill_urls": prefill or [],
        "decode_urls": decode or [],
    }
    given = {
        "workers": workers,
        "otlp_traces_endpoint": otlp_traces_endpoint,
        "ssl_certfile": ssl_certfile,
        "ssl_keyfile": ssl_keyfile,
        "ssl_ca_certs": ssl_ca_certs,
        "ssl_cert_reqs": ssl_cert_reqs,
    }
    values |= {key: value for key, value in given.items() if value is not None}
    config = from_mapping(RouterConfig, values, source="router")
    if config.workers > 1:
        from vllm_pd.router.workers import parent

        return parent.run(config)
    from vllm_pd.router.serving import run

    return run(config)


@app.command("_route", hidden=True)
def route(
    link: Annotated[int, typer.Option()],
    board: Annotated[int, typer.Option()],
    listen: Annotated[list[int], typer.Option()],
) -> int:
    """Run one of several router processes; started by 'router'."""
    from vllm_pd.router.workers import child

    _log_as_vllm("(worker pid=%(process)d) ")
    return child.run(link, board, listen)


def _log_as_vllm(prefix: str = "") -> None:
    """Log in lines that look as vLLM's, so that the logs of a deployment read alike."""
    import logging

    logging.basicConfig(
        level=logging.INFO,
        format=f"{prefix}%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )


def _json_object(text: str, *, source: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{source}: {exc}") from exc


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="File to make; readable by its owner alone.")],
) -> None:
    """Make a cluster key: instances with the same key trust each other.

    The file holds a key pair for the control channel and a certificate for TLS.
    'up' makes one by itself. Copy it to other hosts whose instances take part.
    """
    _write_cluster_key(path)
    typer.echo(f"wrote {path}")


@app.command("demo-model")
def demo_model(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Random weights, of the geometry below.")
    ] = False,
    hidden_size: Annotated[int, typer.Option(help="Width.")] = 256,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = 2,
    max_len: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = 4096,
    init_range: Annotated[float, typer.Option(help="Standard deviation of the weights.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Make a small checkpoint folder, without network.

    By default the demo model that 'up' serves: its text is readable. Untrained
    models are for tests: any geometry, output that depends on every prompt token.
    """
    from vllm_pd.demo.model import Geometry, write_untrained_model

    if not untrained:
        _write_demo_model(folder)
    else:
        try:
            geometry = Geometry(
                hidden_size=hidden_size,
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_size=hidden_size // max(1, heads),
                max_len=max_len,
                init_range=init_range,
                dtype=dtype,
            )
        except ValueError as exc:
            raise ConfigError(str(exc)) from exc
        write_untrained_model(folder, geometry, seed)
    typer.echo(f"wrote {folder}")


FaultNameArgument = Annotated[
    str, typer.Argument(help="E.g. prefill-0, decode-0, router; 'status' lists them.")
]


@fault_app.callback(invoke_without_command=True)
def _fault(context: typer.Context) -> None:
    """Make a running deployment fail on purpose, to see what follows.

    Faults of transfers are switched on before 'up' by the environment variable
    VLLM_PD_FAULTS; 'fault check' explains its value.

    [dim]$[/dim] VLLM_PD_FAULTS=corrupt=0.1,drop=0.01 vllm-pd up
    [dim]$[/dim] vllm-pd fault kill prefill-0
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@fault_app.command("kill")
def fault_kill(name: FaultNameArgument, run_dir: RunDirOption = None) -> None:
    """SIGKILL a process and all of its children; the supervisor restarts it."""
    from vllm_pd.launcher import faults

    faults.kill(_run_dir(run_dir), name, _console())


@fault_app.command("pause")
def fault_pause(
    name: FaultNameArgument,
    seconds: Annotated[float, typer.Option(help="How long.")] = 10.0,
    run_dir: RunDirOption = None,
) -> None:
    """Stop a process and all of its children for a while, as if its host were stuck."""
    from vllm_pd.launcher import faults

    faults.pause(_run_dir(run_dir), name, seconds, _console())


@fault_app.command("resume")
def fault_resume(name: FaultNameArgument, run_dir: RunDirOption = None) -> None:
    """Let a process go on whose 'fault pause' was killed."""
    from vllm_pd.launcher import faults

    faults.resume(_run_dir(run_dir), name, _console())


@fault_app.command("check")
def fault_check(
    spec: Annotated[str, typer.Argument(help="A value of VLLM_PD_FAULTS.")],
) -> None:
    """Check and explain a value of VLLM_PD_FAULTS."""
    from vllm_pd.transport.fault_spec import explain, parse_faults
    from vllm_pd.transport.registry import known_names

    for line in explain(parse_faults(spec, known_names())):
        typer.echo(line)


def _check_faults(environ: Mapping[str, str]) -> None:
    """Refuse a bad VLLM_PD_FAULTS before anything is started, and warn of a good one."""
    from vllm_pd.transport.fault_spec import VARIABLE, faults_from

    if not environ.get(VARIABLE):
        return
    from vllm_pd.transport.registry import known_names

    if (spec := faults_from(environ, known_names())) is not None:
        typer.echo(f"warning: {VARIABLE} is set: transfers will fail on purpose ({spec})")


@app.command("_supervise", hidden=True)
def supervise(
    run_dir: Annotated[Path, typer.Option()],
    event_fd: Annotated[int | None, typer.Option()] = None,
) -> int:
    """Run the deployment plan that stdin holds; started by 'up'."""
    from vllm_pd.launcher import supervisor
    from vllm_pd.launcher.plan import DeploymentPlan

    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=DeploymentPlan)
    return supervisor.supervise(plan, _run_dir(run_dir), event_fd=event_fd)


if __name__ == "__main__":
    main()
