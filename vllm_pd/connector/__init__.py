"""The KV connector: the only package that imports vllm.

Importing this module must stay cheap: vLLM calls ``register`` in every process.
"""

from __future__ import annotations

CONNECTORS = ("PDConnector", "HcclConnector")


def register() -> None:
    """Make the connectors known to vLLM by name (entry point ``vllm.general_plugins``).

    Safe to call more than once per process, as vLLM may.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in CONNECTORS:
        try:
            KVConnectorFactory.register_connector(name, "vllm_pd.connector.connector", name)
        except ValueError:  # registered already
            return
