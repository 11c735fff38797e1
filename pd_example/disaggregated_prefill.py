"""The hand-over without servers: two ``vllm.LLM`` objects in two processes.

    python pd_example/disaggregated_prefill.py [MODEL]

One process computes the KV cache of some prompts and says where it is; the other
fetches it and generates. Devices and cores are assigned as by ``vllm-pd up``.
MODEL is a checkpoint folder or a Hugging Face name; default: the demo model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import uuid
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
try:
    import vllm_pd
except ImportError:
    python = Path(os.environ.get("VENV", REPO / ".venv")) / "bin" / "python"
    if not python.exists() or python == Path(sys.executable):
        sys.exit("vllm_pd is not installed; bash pd_example/disaggregated_prefill.sh sets it up")
    os.execv(python, [str(python), __file__, *sys.argv[1:]])

PROMPTS = [
    "Disaggregated prefill-decode serving",
    "The router sends every request",
    "A lease is",
]
MAX_TOKENS = 32
WAIT_S = 600.0


def plan_two_instances(model: str | None, folder: Path) -> tuple[str, list[tuple[str, Any]]]:
    """Return the model's path, and environment and ``LLM`` options of both processes."""
    from vllm_pd.config import Topology
    from vllm_pd.demo.model import write_demo_model
    from vllm_pd.launcher.devices import find_machine
    from vllm_pd.launcher.model import check_model, is_quantized
    from vllm_pd.launcher.planning import Model, make_plan
    from vllm_pd.session.keys import write_cluster_key

    if model is None:
        write_demo_model(folder / "demo-model")
        path = str(folder / "demo-model")
    else:
        path = check_model(model)
    write_cluster_key(folder / "cluster.key")
    plan, warnings = make_plan(
        Topology(device=os.environ.get("DEVICE") or None),
        find_machine(os.environ.get("DEVICE") or None, os.environ),
        model=Model(path, path, is_quantized(path)),
        cluster_key_file=folder / "cluster.key",
        environ=os.environ,
    )
    for warning in warnings:
        print(f"warning: {warning}")
    instances = []
    for role in ("prefill", "decode"):
        spec = next(process for process in plan.processes if process.role == role)
        options = dict(zip(spec.argv, spec.argv[1:], strict=False))
        llm_options = {
            "tensor_parallel_size": int(options["--tensor-parallel-size"]),
            "kv_transfer_config": json.loads(options["--kv-transfer-config"]),
            "enforce_eager": "--enforce-eager" in spec.argv,
            "dtype": options.get("--dtype", "auto"),
        }
        instances.append((json.dumps(spec.env), llm_options))
    return path, instances


def make_llm(path: str, env: str, options: dict[str, Any]) -> Any:
    """Start an engine; the environment must be set before vLLM is imported."""
    os.environ.update(json.loads(env))
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(**options.pop("kv_transfer_config"))
    return LLM(model=path, kv_transfer_config=transfer, disable_log_stats=False, **options)


def prefill(path: str, env: str, options: dict[str, Any], handed: Queue[Any], done: Any) -> None:
    """Compute the prompts' KV cache and keep it until the other side has fetched it."""
    from vllm import SamplingParams

    llm = make_llm(path, env, options)
    params = [
        SamplingParams(
            max_tokens=1,
            extra_args={
                "kv_transfer_params": {"do_remote_decode": True, "transfer_id": uuid.uuid4().hex}
            },
        )
        for _ in PROMPTS
    ]
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        handed.put((output.prompt, output.kv_transfer_params))
    done.wait(WAIT_S)
    llm.llm_engine.engine_core.shutdown()  # multiprocessing waits for the engine's processes


def decode(path: str, env: str, options: dict[str, Any], handed: Queue[Any], done: Any) -> None:
    """Fetch the prompts' KV cache and generate from it."""
    from vllm import SamplingParams

    try:
        llm = make_llm(path, env, options)
        received = [handed.get(timeout=WAIT_S) for _ in PROMPTS]
        params = [
            SamplingParams(
                max_tokens=MAX_TOKENS, temperature=0, extra_args={"kv_transfer_params": kv_params}
            )
            for _, kv_params in received
        ]
        prompts = [prompt for prompt, _ in received]
        for output in llm.generate(prompts, params, use_tqdm=False):
            print(f"\nprompt:  {output.prompt}")
            print(f"answer:  {output.outputs[0].text}")
        num_tokens = {
            metric.labels["source"]: metric.value
            for metric in llm.get_metrics()
            if metric.name == "vllm:prompt_tokens_by_source"
        }
        moved = num_tokens.get("external_kv_transfer", 0)
        print(f"\n{moved} of {sum(num_tokens.values())} prompt tokens came from the other process")
        llm.llm_engine.engine_core.shutdown()
    finally:
        done.set()


def main() -> int:
    """Run both processes to their end; non-zero if one failed."""
    from vllm_pd.errors import PDError

    parser = argparse.ArgumentParser(description="Hand KV cache over without servers.")
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hugging Face name")
    model: str | None = parser.parse_args().model
    context = multiprocessing.get_context("spawn")
    handed, done = context.Queue(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, instances = plan_two_instances(model, Path(folder))
        except PDError as exc:
            print(f"error: {exc}", file=sys.stderr)
            return 1
        processes = [
            context.Process(target=target, args=(path, *instance, handed, done))
            for target, instance in zip((prefill, decode), instances, strict=True)
        ]
        for process in processes:
            process.start()
        # One that dies early must not leave the other waiting.
        while all(process.is_alive() for process in processes) and not done.wait(0.5):
            pass
        if not done.is_set():
            print("error: a process died before the answers were there", file=sys.stderr)
            for process in processes:
                process.terminate()
        for process in processes:
            process.join(60)
        return int(any(process.exitcode != 0 for process in processes))


if __name__ == "__main__":
    print(f"vllm-pd {vllm_pd.__version__}: prefill and decode in two processes, no servers")
    sys.exit(main())
