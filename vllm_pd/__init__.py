"""Disaggregated prefill-decode serving for unmodified vLLM."""

__version__ = "0.1.0"
