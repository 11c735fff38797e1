"""Ascend NPUs for vllm-pd: KV cache over HCCL, and what an NPU's KV cache looks like.

``vllm_pd`` finds this package by its entry points and never imports it. Importing a
module here loads neither torch_npu nor CANN; making a transport does.
"""

__version__ = "0.1.0"
